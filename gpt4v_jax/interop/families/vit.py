"""Image encoders: ViT (Dosovitskiy et al. 2020) and DINOv2 (Oquab et al. 2023)."""

from gpt4v_jax import config
from gpt4v_jax.interop.families import common
from gpt4v_jax.interop.families.common import key
from gpt4v_jax.interop.table import Family, Key, Row

_QKV = ("attention.query", "attention.key", "attention.value", "output.dense")
_FIXED = {"class_token": True, "encoder.norm": "layer"}


def _keys(patch: int, eps: float, mean: tuple, std: tuple) -> tuple[Key, ...]:
    return (
        key("image_size", "size", 224), key("patch_size", "patch", patch), key("hidden_size", "encoder.width", 768),
        key("num_hidden_layers", "encoder.depth", 12), key("num_attention_heads", "encoder.heads", 12),
        key("hidden_act", "encoder.activation", "gelu", common.MLP), key("layer_norm_eps", "encoder.norm_eps", eps),
        *common.pixels("", mean, std),
        Key("num_channels", (), 3),
    )  # fmt: skip


def _rows(prefix: str, norms: tuple[str, str]) -> tuple[Row, ...]:
    layer, block = f"{prefix}encoder.layer.{{i}}", "encoder/block_{i}"
    return (
        Row(f"{prefix}embeddings.cls_token", "image/class_token/value", "1 1 D -> D"),
        Row(f"{prefix}embeddings.mask_token", "image/mask_token/value", "1 D -> D"),
        Row(f"{prefix}embeddings.position_embeddings", "image/position/table", "1 T D -> T D"),
        *common.patches(f"{prefix}embeddings.patch_embeddings.projection", "image/embed"),
        *common.attention(f"{layer}.attention", f"{block}/attention", _QKV),
        *common.norm(f"{layer}.{norms[0]}", f"{block}/attention_norm"),
        *common.norm(f"{layer}.{norms[1]}", f"{block}/mlp_norm"), *common.norm(f"{prefix}layernorm", "encoder/norm"),
    )  # fmt: skip


def _bias(theirs: dict) -> dict:
    return {"encoder.bias": common.biases(qkv=theirs.get("qkv_bias", True), out=True, mlp=True)}


def _vit_read(theirs: dict) -> dict:
    classes = 0
    if "ViTForImageClassification" in (theirs.get("architectures") or ()):
        classes = len(theirs.get("id2label") or ()) or theirs.get("num_labels", 2)
    return _bias(theirs) | {"classes": classes, "pool": "class" if classes else "none"}


def _vit_write(c: config.Image) -> dict:
    labels = {str(i): f"LABEL_{i}" for i in range(c.classes)}
    bare = {} if c.classes else {"architectures": ["ViTModel"]}
    ids = {label: int(i) for i, label in labels.items()}
    return bare | {"qkv_bias": "qkv" in c.encoder.bias, "id2label": labels, "label2id": ids}


def _swiglu_hidden(width: int, ratio) -> int:
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def _dinov2_read(theirs: dict) -> dict:
    width, ratio = theirs.get("hidden_size", 768), theirs.get("mlp_ratio", 4)
    swiglu = {"encoder.activation": "swiglu", "encoder.hidden": _swiglu_hidden(width, ratio)}
    return _bias(theirs) | {"encoder.hidden": int(width * ratio)} | (swiglu if theirs.get("use_swiglu_ffn") else {})


def _dinov2_write(c: config.Image) -> dict:
    width, hidden, swiglu = c.encoder.width, c.encoder.hidden, c.encoder.activation == "swiglu"
    ratios = [r for r in range(1, 33) if (_swiglu_hidden(width, r) if swiglu else width * r) == hidden]
    if not ratios:
        raise config.InputError(f"a dinov2 has no hidden={hidden} at width={width}: its mlp_ratio is a whole number")
    act = {"hidden_act": "gelu"} if swiglu else {}
    return act | {"qkv_bias": "qkv" in c.encoder.bias, "mlp_ratio": ratios[0], "use_swiglu_ffn": swiglu}


VIT = Family(
    "vit", ("ViTForImageClassification", "ViTModel"), config.Image, (
        *_keys(16, 1e-12, (0.5,) * 3, (0.5,) * 3), key("intermediate_size", "encoder.hidden", 3072),
    ), (
        *_rows("vit.", ("layernorm_before", "layernorm_after")), *common.linear("classifier", "head"),
        *common.linear("vit.encoder.layer.{i}.intermediate.dense", "encoder/block_{i}/mlp/up"),
        *common.linear("vit.encoder.layer.{i}.output.dense", "encoder/block_{i}/mlp/down"),
    ), _FIXED, _vit_read, _vit_write, base="vit.", unread=r"pooler\.", preprocessor="ViTImageProcessor",
)  # fmt: skip

_MLP = "dinov2.encoder.layer.{i}.mlp"
_GATE = "encoder/block_{i}/mlp/gate/kernel"
_GATE_UP = ("encoder/block_{i}/mlp/gate", "encoder/block_{i}/mlp/up")
DINOV2 = Family(
    "dinov2", ("Dinov2Model",), config.Image, (
        *_keys(14, 1e-6, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        key("layerscale_value", "encoder.layer_scale", 1.0), key("use_mask_token", "mask_token", True),
    ), (
        *_rows("dinov2.", ("norm1", "norm2")),
        *common.linear(f"{_MLP}.fc1", "encoder/block_{i}/mlp/up", only=f"!{_GATE}"),
        *common.linear(f"{_MLP}.fc2", "encoder/block_{i}/mlp/down", only=f"!{_GATE}"),
        Row(f"{_MLP}.weights_in.weight", tuple(f"{p}/kernel" for p in _GATE_UP), "F D -> D F", only=_GATE),
        Row(f"{_MLP}.weights_in.bias", tuple(f"{p}/bias" for p in _GATE_UP), "F -> F", only=_GATE),
        *common.linear(f"{_MLP}.weights_out", "encoder/block_{i}/mlp/down", only=_GATE),
        Row("dinov2.encoder.layer.{i}.layer_scale1.lambda1", "encoder/block_{i}/attention_scale/value", "D -> D"),
        Row("dinov2.encoder.layer.{i}.layer_scale2.lambda1", "encoder/block_{i}/mlp_scale/value", "D -> D"),
    ), _FIXED, _dinov2_read, _dinov2_write, base="dinov2.",
    preprocessor="BitImageProcessor",
)  # fmt: skip

FAMILIES = (VIT, DINOV2)
