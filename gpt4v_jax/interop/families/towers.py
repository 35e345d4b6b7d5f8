"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): both towers, and the image towers alone."""

from gpt4v_jax import config
from gpt4v_jax.interop.families import common
from gpt4v_jax.interop.families.common import key
from gpt4v_jax.interop.table import Family, Key, Row

_SELF = ("q_proj", "k_proj", "v_proj", "out_proj")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _stack(theirs: str, ours: str) -> tuple[Row, ...]:
    layer, block = f"{theirs}encoder.layers.{{i}}", f"{ours}/block_{{i}}"
    return (
        *common.attention(f"{layer}.self_attn", f"{block}/attention", _SELF),
        *common.norm(f"{layer}.layer_norm1", f"{block}/attention_norm"),
        *common.norm(f"{layer}.layer_norm2", f"{block}/mlp_norm"),
        *common.linear(f"{layer}.mlp.fc1", f"{block}/mlp/up"), *common.linear(f"{layer}.mlp.fc2", f"{block}/mlp/down"),
    )  # fmt: skip


def _image_rows(ours: str) -> tuple[Row, ...]:
    """ours: "" for the tower alone, "image/" in a pair."""
    pool, head = f"{ours}pool", "vision_model.head"
    qkv = tuple(f"{pool}/attention/{name}" for name in ("query", "key", "value"))
    return (
        *common.patches("vision_model.embeddings.patch_embedding", f"{ours}image/embed"),
        Row("vision_model.embeddings.class_embedding", f"{ours}image/class_token/value", "D -> D"),
        common.table("vision_model.embeddings.position_embedding.weight", f"{ours}image/position"),
        *common.norm("vision_model.pre_layrnorm", f"{ours}pre_norm"), *_stack("vision_model.", f"{ours}encoder"),
        *common.norm("vision_model.post_layernorm", f"{ours}encoder/norm"),
        *common.norm("vision_model.post_layernorm", f"{ours}pool_norm"),
        *common.linear("visual_projection", f"{ours}head"),
        Row(f"{head}.probe", f"{pool}/probe/value", "1 1 D -> D"),
        Row(f"{head}.attention.in_proj_weight", tuple(f"{p}/kernel" for p in qkv), "(N H) D -> D N H"),
        Row(f"{head}.attention.in_proj_bias", tuple(f"{p}/bias" for p in qkv), "(N H) -> N H"),
        *common.from_heads(f"{head}.attention.out_proj", f"{pool}/attention/out"),
        *common.norm(f"{head}.layernorm", f"{pool}/norm"),
        *common.linear(f"{head}.mlp.fc1", f"{pool}/mlp/up"), *common.linear(f"{head}.mlp.fc2", f"{pool}/mlp/down"),
    )  # fmt: skip


_TEXT_ROWS = (
    common.table("text_model.embeddings.token_embedding.weight", "text/text/embed"),
    common.table("text_model.embeddings.position_embedding.weight", "text/text/position"),
    *_stack("text_model.", "text/backbone"), *common.norm("text_model.final_layer_norm", "text/backbone/norm"),
)


def _stack_keys(theirs: str, ours: str, act: str, eps: float, sizes: tuple[int, int, int, int]) -> tuple[Key, ...]:
    width, hidden, depth, heads = sizes
    return (
        key(f"{theirs}hidden_size", f"{ours}.width", width), key(f"{theirs}num_hidden_layers", f"{ours}.depth", depth),
        key(f"{theirs}intermediate_size", f"{ours}.hidden", hidden),
        key(f"{theirs}num_attention_heads", f"{ours}.heads", heads),
        key(f"{theirs}hidden_act", f"{ours}.activation", act, common.MLP),
        key(f"{theirs}layer_norm_eps", f"{ours}.norm_eps", eps),
    )  # fmt: skip


def _image_keys(theirs: str, ours: str, act: str, eps: float, patch: int, mean: tuple, std: tuple) -> tuple[Key, ...]:
    return (
        *_stack_keys(theirs, f"{ours}encoder", act, eps, (768, 3072, 12, 12)), Key(f"{theirs}num_channels", (), 3),
        key(f"{theirs}image_size", f"{ours}size", 224), key(f"{theirs}patch_size", f"{ours}patch", patch),
        *common.pixels(ours, mean, std),
    )  # fmt: skip


def _text_keys(act: str, eps: float, vocab: int, context: int, sizes: tuple[int, int, int, int]) -> tuple[Key, ...]:
    return (
        *_stack_keys("text_config.", "text.backbone", act, eps, sizes),
        key("text_config.vocab_size", "text.vocab", vocab),
        key("text_config.max_position_embeddings", "text.context", context),
    )  # fmt: skip


def _fixed(ours: str, **values) -> dict:
    return {f"{ours}encoder.norm": "layer", f"{ours}encoder.bias": config.BIASES} | {
        f"{ours}{name}": value for name, value in values.items()
    }


_CLIP = {"class_token": True, "pre_norm": True, "pool": "class", "pool_norm": True, "patch_bias": False,
         "head_bias": False}  # fmt: skip
_TEXT = {"text.position": "learned", "text.backbone.norm": "layer", "text.backbone.bias": config.BIASES}
_CLIP_IMAGE = ("quick_gelu", 1e-5, 32, _CLIP_MEAN, _CLIP_STD)
_SIGLIP_IMAGE = ("gelu_pytorch_tanh", 1e-6, 16, (0.5,) * 3, (0.5,) * 3)


def _projected(theirs: dict) -> dict:
    """CLIPVisionModelWithProjection has a head, CLIPVisionModel has not."""
    with_head = "CLIPVisionModelWithProjection" in (theirs.get("architectures") or ())
    return {"classes": theirs.get("projection_dim", 512)} if with_head else {}


def _write_projected(c: config.Image) -> dict:
    with_head = {"architectures": ["CLIPVisionModelWithProjection"], "projection_dim": c.classes}
    return with_head if c.classes else {}


CLIP = Family(
    "clip", ("CLIPModel",), config.Towers, (
        *_image_keys("vision_config.", "image.", *_CLIP_IMAGE),
        *_text_keys("quick_gelu", 1e-5, 49408, 77, (512, 2048, 12, 8)),
        key("projection_dim", "width image.classes", 512),
    ), (
        *_image_rows("image/"), *_TEXT_ROWS, *common.linear("text_projection", "text/head"),
        Row("logit_scale", "scale/value", "->"),
    ), _fixed("image.", **_CLIP) | _TEXT, doubles=("text_config", "vision_config"),
    buffers=r"position_ids$", preprocessor="CLIPImageProcessor",
    extra={"vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "clip_text_model"}},
)  # fmt: skip
CLIP_IMAGE = Family(
    "clip_vision_model", ("CLIPVisionModel", "CLIPVisionModelWithProjection"), config.Image,
    _image_keys("", "", *_CLIP_IMAGE), _image_rows(""), _fixed("", **_CLIP), _projected,
    _write_projected, base="vision_model.", buffers=r"position_ids$",
    preprocessor="CLIPImageProcessor",
)  # fmt: skip
SIGLIP = Family(
    "siglip", ("SiglipModel",), config.Towers, (
        *_image_keys("vision_config.", "image.", *_SIGLIP_IMAGE),
        *_text_keys("gelu_pytorch_tanh", 1e-6, 32000, 64, (768, 3072, 12, 12)),
    ), (
        *_image_rows("image/"), *_TEXT_ROWS, *common.linear("text_model.head", "text/head"),
        Row("logit_scale", "scale/value", "1 ->"), Row("logit_bias", "bias/value", "1 ->"),
    ), _fixed("image.", pool="map") | _TEXT | {"text.causal": False, "text_bias": True, "logit_bias": True},
    lambda theirs: {"width": _projection_size(theirs.get("text_config", {}))},
    lambda c: {"text_config": {"projection_size": c.width}}, buffers=r"position_ids$",
    preprocessor="SiglipImageProcessor",
    extra={"vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"model_type": "siglip_text_model"}},
)  # fmt: skip
SIGLIP_IMAGE = Family(
    "siglip_vision_model", ("SiglipVisionModel",), config.Image, _image_keys("", "", *_SIGLIP_IMAGE), _image_rows(""),
    _fixed(""), lambda theirs: {"pool": "map" if theirs.get("vision_use_head", True) else "none"},
    lambda c: {"vision_use_head": c.pool == "map"}, base="vision_model.", buffers=r"position_ids$",
    preprocessor="SiglipImageProcessor",
)  # fmt: skip


def _projection_size(text: dict) -> int:
    return text.get("projection_size") or text.get("hidden_size", 768)


FAMILIES = (CLIP, CLIP_IMAGE, SIGLIP, SIGLIP_IMAGE)
