"""Published sizes: parameters counted by eval_shape equal a closed form and the published figure, exactly; and every
preset is what the model's public config.json is read as."""

import dataclasses
import functools
import math

import pytest

from gpt4v_jax import config
from gpt4v_jax.interop import families, hf
from gpt4v_jax.model import flops, presets


@functools.cache
def count(ours) -> int:
    return sum(math.prod(x.shape) for x in hf.abstract_params(ours).values())


def count_of(name: str) -> int:
    return count(presets.named(name))


def layers(d: int, F: int = 0, cross: int = 0) -> int:
    """A block with LayerNorms and biases everywhere: attention, `cross` more of them, MLP, and their norms."""
    F = F or 4 * d
    attention = 4 * d * d + 4 * d  # query, key, value, out
    mlp = 2 * d * F + F + d
    return (1 + cross) * attention + mlp + (2 + cross) * 2 * d


def test_a_block():
    assert layers(768) == 12 * 768**2 + 13 * 768
    assert layers(768, cross=1) == 16 * 768**2 + 19 * 768


# ---- language models


@pytest.mark.parametrize("name, L, d, published", [
    ("gpt2", 12, 768, 124_439_808),
    ("gpt2-medium", 24, 1024, 354_823_168),
    ("gpt2-large", 36, 1280, 774_030_080),
    ("gpt2-xl", 48, 1600, 1_557_611_200),
])  # fmt: skip
def test_gpt2(name, L, d, published):
    V, T = 50257, 1024
    assert count_of(name) == V * d + T * d + L * layers(d) + 2 * d == published  # the head is the embedding


@pytest.mark.parametrize("name, V, L, d, q, k, F, more, tables, published", [
    # q, k: widths of all queries and of all keys; more: per block, beside matrices and two norms; tables: of V
    ("llama-2-7b", 32000, 32, 4096, 4096, 4096, 11008, 0, 2, 6_738_415_616),
    ("llama-2-13b", 32000, 40, 5120, 5120, 5120, 13824, 0, 2, 13_015_864_320),
    ("llama-3.1-8b", 128256, 32, 4096, 4096, 1024, 14336, 0, 2, 8_030_261_248),
    ("mistral-7b-v0.1", 32000, 32, 4096, 4096, 1024, 14336, 0, 2, 7_241_732_096),
    ("smollm2-135m", 49152, 30, 576, 576, 192, 1536, 0, 1, 134_515_008),
    ("smollm2-360m", 49152, 32, 960, 960, 320, 2560, 0, 1, 361_821_120),
    ("qwen2-0.5b", 151936, 24, 896, 896, 128, 4864, 896 + 2 * 128, 1, 494_032_768),  # biases of q, k, v
    ("qwen2-7b", 152064, 28, 3584, 3584, 512, 18944, 3584 + 2 * 512, 2, 7_615_616_512),
    ("qwen3-0.6b", 151936, 28, 1024, 2048, 1024, 3072, 2 * 128, 1, 596_049_920),  # norms of q and k
    ("gemma-2b", 256_000, 18, 2048, 2048, 256, 16384, 0, 1, 2_506_172_416),
    ("gemma-7b", 256_000, 28, 3072, 4096, 4096, 24576, 0, 1, 8_537_680_896),
    ("gemma-2-2b", 256_000, 26, 2304, 2048, 1024, 9216, 2 * 2304, 1, 2_614_341_888),  # two more norms
    ("gemma-3-1b", 262_144, 26, 1152, 1024, 256, 6912, 2 * 1152 + 2 * 256, 1, None),  # four norms, q and k
])  # fmt: skip
def test_decoders(name, V, L, d, q, k, F, more, tables, published):
    block = 2 * d * q + 2 * d * k + 3 * d * F + 2 * d + more  # query and out, key and value, a gated MLP, two norms
    closed = tables * V * d + L * block + d
    assert count_of(name) == closed == (published or closed)


@pytest.mark.parametrize("name, V, L, d, bare, with_head", [
    ("bert-base-uncased", 30522, 12, 768, 109_482_240, 109_514_298),
    ("bert-large-uncased", 30522, 24, 1024, 335_141_888, None),
    ("bert-base-chinese", 21128, 12, 768, 102_267_648, None),
])  # fmt: skip
def test_bert(name, V, L, d, bare, with_head):
    """Ours is ForMaskedLM: BertModel, less its pooler, which is as large as the dense layer of the head, and the
    head's norm and bias."""
    dense = d * d + d
    stem = V * d + 512 * d + 2 * d + 2 * d + L * layers(d)  # tokens, positions, types, norm
    assert stem + dense == bare
    closed = stem + dense + 2 * d + V
    assert count_of(name) == closed == (with_head or closed)


@pytest.mark.parametrize("name, L, d, N, F, published", [
    ("t5-small", 6, 512, 8, 2048, 60_506_624),
    ("t5-base", 12, 768, 12, 3072, 222_903_552),
])  # fmt: skip
def test_t5(name, L, d, N, F, published):
    attention, mlp = 4 * d * (64 * N), 2 * d * F
    encoder = L * (attention + mlp + 2 * d)
    decoder = L * (2 * attention + mlp + 3 * d)
    closed = 32128 * d + encoder + decoder + 2 * d + 2 * 32 * N  # last norms, relative positions of both
    assert count_of(name) == closed == published


@pytest.mark.parametrize("name, L, d", [("bart-base", 6, 768), ("bart-large", 12, 1024)])
def test_bart(name, L, d):
    """With the bias of the logits, which transformers keep as a buffer."""
    V, positions = 50265, 1024 + 2
    assert count_of(name) == V * d + 2 * (positions * d + 2 * d) + L * (layers(d) + layers(d, cross=1)) + V


# ---- image encoders


@pytest.mark.parametrize("name, L, d, p, published", [
    ("vit-ti/16", 12, 192, 16, 5_717_416),
    ("vit-s/16", 12, 384, 16, 22_050_664),
    ("vit-b/16", 12, 768, 16, 86_567_656),
    ("vit-b/32", 12, 768, 32, 88_224_232),
    ("vit-l/16", 24, 1024, 16, 304_326_632),
    ("vit-h/14", 32, 1280, 14, 632_045_800),
])  # fmt: skip
def test_vit(name, L, d, p, published):
    n = (224 // p) ** 2
    # patches with bias; positions of the n patches, the class token and its position; blocks; last norm; the head
    closed = d * (3 * p * p + 1) + d * (n + 2) + L * layers(d) + 2 * d + 1000 * (d + 1)
    assert count_of(name) == closed == published


def clip_image(L: int, d: int, p: int, n: int, projected: int) -> int:
    """Patches without bias, n positions and a class token with its own, norms before and after, the projection."""
    return d * 3 * p * p + d * (n + 2) + 2 * d + L * layers(d) + 2 * d + d * projected


@pytest.mark.parametrize("name, L, d, p, size, projected, published", [
    ("clip-image-b/32", 12, 768, 32, 224, 512, 87_849_216),
    ("clip-image-l/14", 24, 1024, 14, 224, 768, 303_966_208),
    ("clip-image-l/14-336", 24, 1024, 14, 336, 768, 304_293_888),
])  # fmt: skip
def test_clip_image(name, L, d, p, size, projected, published):
    assert count_of(name) == clip_image(L, d, p, (size // p) ** 2, projected) == published


def siglip_image(L: int, d: int, F: int, p: int, n: int, head: bool = True) -> int:
    """Patches with bias, n positions, blocks, last norm; MAP head: the query, attention, norm and MLP."""
    body = d * (3 * p * p + 1) + d * n + L * layers(d, F) + 2 * d
    return body + head * (d + layers(d, F) - 2 * d)


@pytest.mark.parametrize("name, L, d, F, p, size, published", [
    ("siglip-image-b/16-224", 12, 768, 3072, 16, 224, 92_884_224),
    ("siglip-image-b/16-512", 12, 768, 3072, 16, 512, 93_520_128),
    ("siglip-image-l/16-256", 24, 1024, 4096, 16, 256, 315_956_224),
    ("siglip-image-so400m/14-224", 27, 1152, 4304, 14, 224, 427_680_704),
    ("siglip-image-so400m/14-384", 27, 1152, 4304, 14, 384, 428_225_600),  # 384 // 14 = 27 patches a side
])  # fmt: skip
def test_siglip_image(name, L, d, F, p, size, published):
    assert count_of(name) == siglip_image(L, d, F, p, (size // p) ** 2) == published


def test_siglip_without_its_head():
    bare = dataclasses.replace(presets.named("siglip-image-so400m/14-224"), pool="none")
    assert count(bare) == siglip_image(27, 1152, 4304, 14, 256, head=False) == 412_442_352


@pytest.mark.parametrize("name, L, d", [
    ("dinov2-small", 12, 384), ("dinov2-base", 12, 768), ("dinov2-large", 24, 1024),
])  # fmt: skip
def test_dinov2(name, L, d):
    """Two scales a block; positions of 37 x 37 patches and the class token; class and mask token."""
    n = 37 * 37
    assert count_of(name) == d * (3 * 14 * 14 + 1) + d * (n + 1) + 2 * d + L * (layers(d) + 2 * d) + 2 * d


@pytest.mark.parametrize("name, image, L, d, projected, published", [
    ("clip-b/32", (12, 768, 32, 49), 12, 512, 512, 151_277_313),
    ("clip-l/14", (24, 1024, 14, 256), 12, 768, 768, 427_616_513),
])  # fmt: skip
def test_clip(name, image, L, d, projected, published):
    text = 49408 * d + 77 * d + L * layers(d) + 2 * d + d * projected
    assert count_of(name) == clip_image(*image, projected) + text + 1 == published  # and the scale of the scores


@pytest.mark.parametrize("name, whole, image", [
    ("clip-b/32", 151.28, 87.85), ("clip-b/16", 149.62, 86.19), ("clip-l/14", 427.62, 303.97),
    ("clip-l/14-336", 427.94, 304.29), ("siglip-b/16-224", 203.16, 92.88),
])  # fmt: skip
def test_towers_of_open_clip(name, whole, image):
    """Millions, to the digits of open_clip's docs/model_profile.csv."""
    towers = presets.named(name)
    assert (round(count(towers) / 1e6, 2), round(count(towers.image) / 1e6, 2)) == (whole, image)


def test_siglip():
    d = 768
    text = 32000 * d + 64 * d + 12 * layers(d) + 2 * d + d * d + d
    assert count_of("siglip-b/16-224") == siglip_image(12, d, 4 * d, 16, 196) + text + 2  # scale and bias of the scores


# ---- the models' public config.json, each with the keys that matter


def llama(vocab, context, depth, width, heads, hidden, kv_heads, **more) -> dict:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "vocab_size": vocab, "max_position_embeddings": context, "num_hidden_layers": depth, "hidden_size": width,
            "num_attention_heads": heads, "intermediate_size": hidden, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False} | more  # fmt: skip


def gpt2(depth, width, heads) -> dict:
    return {"model_type": "gpt2", "n_layer": depth, "n_embd": width, "n_head": heads, "n_positions": 1024,
            "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}  # fmt: skip


def bert(vocab, depth, width, heads) -> dict:
    return {"model_type": "bert", "vocab_size": vocab, "num_hidden_layers": depth, "hidden_size": width,
            "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_act": "gelu", "type_vocab_size": 2,
            "max_position_embeddings": 512, "layer_norm_eps": 1e-12}  # fmt: skip


def t5(depth, width, heads) -> dict:
    return {"model_type": "t5", "d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": depth,
            "num_heads": heads, "vocab_size": 32128, "relative_attention_num_buckets": 32,
            "layer_norm_epsilon": 1e-6}  # fmt: skip


def bart(depth, width, heads) -> dict:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in {"layers": depth, "attention_heads": heads, "ffn_dim": 4 * width}.items()}  # fmt: skip
    return sides | {"model_type": "bart", "d_model": width, "vocab_size": 50265, "max_position_embeddings": 1024,
                    "activation_function": "gelu", "scale_embedding": False}  # fmt: skip


def encoder(depth, width, heads, **more) -> dict:
    return {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads,
            "intermediate_size": 4 * width} | more  # fmt: skip


def vit(patch, *sizes) -> dict:
    return {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 224,
            "patch_size": patch, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True,
            "id2label": {str(i): "" for i in range(1000)}} | encoder(*sizes)  # fmt: skip


_QUICK = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_PIXELS = {"preprocessor": {"image_mean": [0.48145466, 0.4578275, 0.40821073],
                                 "image_std": [0.26862954, 0.26130258, 0.27577711]}}  # fmt: skip


def clip_vision(size, patch, projected, *sizes) -> dict:
    return {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"], "image_size": size,
            "patch_size": patch, "projection_dim": projected} | _QUICK | _CLIP_PIXELS | encoder(*sizes)  # fmt: skip


def clip(size, patch, projected, image, text) -> dict:
    text = encoder(*text, vocab_size=49408, max_position_embeddings=77) | _QUICK
    image = encoder(*image, image_size=size, patch_size=patch) | _QUICK
    towers = {"vision_config": image, "text_config": text, "projection_dim": projected}
    return {"model_type": "clip"} | towers | _CLIP_PIXELS


def siglip_vision(size, patch, *sizes, **more) -> dict:
    """Its act and eps are the class's defaults, gelu_pytorch_tanh and 1e-6."""
    return {"model_type": "siglip_vision_model", "image_size": size, "patch_size": patch} | encoder(*sizes) | more


def dinov2(*sizes) -> dict:
    pixels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
            "mlp_ratio": 4, "layerscale_value": 1.0, "qkv_bias": True, "preprocessor": pixels} | encoder(*sizes)


_SMOL = {"rope_theta": 100_000.0, "tie_word_embeddings": True}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
          "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}  # fmt: skip
PUBLIC = {
    "gpt2": gpt2(12, 768, 12), "gpt2-medium": gpt2(24, 1024, 16), "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "llama-2-7b": llama(32000, 4096, 32, 4096, 32, 11008, 32),
    "llama-2-13b": llama(32000, 4096, 40, 5120, 40, 13824, 40),
    "llama-3.1-8b": llama(128256, 131072, 32, 4096, 32, 14336, 8, rope_theta=500_000.0, rope_scaling={
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}),
    "smollm2-135m": llama(49152, 8192, 30, 576, 9, 1536, 3, **_SMOL),
    "smollm2-360m": llama(49152, 8192, 32, 960, 15, 2560, 5, **_SMOL),
    "mistral-7b-v0.1": llama(32000, 32768, 32, 4096, 32, 14336, 8, model_type="mistral", sliding_window=4096),
    "qwen2-0.5b": llama(151936, 131072, 24, 896, 14, 4864, 2, **_QWEN, model_type="qwen2", tie_word_embeddings=True),
    "qwen2-7b": llama(152064, 131072, 28, 3584, 28, 18944, 4, **_QWEN, model_type="qwen2"),
    "qwen3-0.6b": llama(151936, 40960, 28, 1024, 16, 3072, 8, **_QWEN, model_type="qwen3", head_dim=128,
                        tie_word_embeddings=True),
    "gemma-2b": llama(256_000, 8192, 18, 2048, 8, 16384, 1, **_GEMMA, model_type="gemma"),
    "gemma-7b": llama(256_000, 8192, 28, 3072, 16, 24576, 16, **_GEMMA, model_type="gemma"),
    "gemma-2-2b": llama(256_000, 8192, 26, 2304, 8, 9216, 4, **_GEMMA, model_type="gemma2", sliding_window=4096,
                        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256),
    "gemma-3-1b": llama(262_144, 32768, 26, 1152, 4, 6912, 1, **_GEMMA | {"rope_theta": 1e6}, model_type="gemma3_text",
                        sliding_window=512, sliding_window_pattern=6, rope_local_base_freq=1e4,
                        query_pre_attn_scalar=256),
    "bert-base-uncased": bert(30522, 12, 768, 12), "bert-large-uncased": bert(30522, 24, 1024, 16),
    "bert-base-chinese": bert(21128, 12, 768, 12),
    "t5-small": t5(6, 512, 8), "t5-base": t5(12, 768, 12),
    "bart-base": bart(6, 768, 12), "bart-large": bart(12, 1024, 16),
    "vit-ti/16": vit(16, 12, 192, 3), "vit-s/16": vit(16, 12, 384, 6), "vit-b/16": vit(16, 12, 768, 12),
    "vit-b/32": vit(32, 12, 768, 12), "vit-l/16": vit(16, 24, 1024, 16), "vit-h/14": vit(14, 32, 1280, 16),
    "clip-image-b/32": clip_vision(224, 32, 512, 12, 768, 12),
    "clip-image-b/16": clip_vision(224, 16, 512, 12, 768, 12),
    "clip-image-l/14": clip_vision(224, 14, 768, 24, 1024, 16),
    "clip-image-l/14-336": clip_vision(336, 14, 768, 24, 1024, 16),
    "siglip-image-b/16-224": siglip_vision(224, 16, 12, 768, 12),
    "siglip-image-b/16-512": siglip_vision(512, 16, 12, 768, 12),
    "siglip-image-l/16-256": siglip_vision(256, 16, 24, 1024, 16),
    "siglip-image-so400m/14-224": siglip_vision(224, 14, 27, 1152, 16, intermediate_size=4304),
    "siglip-image-so400m/14-384": siglip_vision(384, 14, 27, 1152, 16, intermediate_size=4304),
    "dinov2-small": dinov2(12, 384, 6), "dinov2-base": dinov2(12, 768, 12), "dinov2-large": dinov2(24, 1024, 16),
    "clip-b/32": clip(224, 32, 512, (12, 768, 12), (12, 512, 8)),
    "clip-b/16": clip(224, 16, 512, (12, 768, 12), (12, 512, 8)),
    "clip-l/14": clip(224, 14, 768, (24, 1024, 16), (12, 768, 12)),
    "clip-l/14-336": clip(336, 14, 768, (24, 1024, 16), (12, 768, 12)),
    "siglip-b/16-224": {"model_type": "siglip", "vision_config": siglip_vision(224, 16, 12, 768, 12),
                        "text_config": encoder(12, 768, 12, vocab_size=32000, max_position_embeddings=64)},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({name for table in presets.KINDS.values() for name in table}))
def test_equals_the_public_config(name):
    ours, theirs = presets.named(name), families.read_config(PUBLIC[name])
    assert type(ours) is type(theirs) and config.differences(ours, theirs) == {}


def test_every_family_has_a_preset():
    from gpt4v_jax.interop.families import FAMILIES

    assert {values["model_type"] for values in PUBLIC.values()} == set(FAMILIES)
    assert PUBLIC.keys() == {name for table in presets.KINDS.values() for name in table}
    assert len(PUBLIC) == sum(len(table) for table in presets.KINDS.values())  # a name is of one kind only


def count_of_transformers(name: str, architecture: str) -> int:
    """Parameters of the reference, tied ones once, and the buffers that we hold as parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = getattr(transformers, architecture)
    values = {key: value for key, value in PUBLIC[name].items() if key not in ("preprocessor", "architectures")}
    with torch.device("meta"):
        model = made(made.config_class(**values))
    model.tie_weights()
    buffers = sum(x.numel() for key, x in model.named_buffers() if key == "final_logits_bias")
    return sum(p.numel() for p in model.parameters()) + buffers


@pytest.mark.parametrize("name, architecture", [
    ("gemma-3-1b", "Gemma3ForCausalLM"), ("bart-base", "BartForConditionalGeneration"),
    ("bert-large-uncased", "BertForMaskedLM"), ("dinov2-base", "Dinov2Model"), ("clip-b/16", "CLIPModel"),
    ("siglip-b/16-224", "SiglipModel"),
])  # fmt: skip
def test_equals_transformers(name, architecture):
    """One of each kind without an exact published figure."""
    assert count_of(name) == count_of_transformers(name, architecture)


# ---- presets in configs


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b", "gemma-3-1b", "bert-base-uncased"])
def test_a_config_takes_a_preset(name):
    values = config.default()
    values.model.update(presets.MODELS[name])
    assert config.from_flag(values).model == presets.named(name)


def test_a_config_takes_a_preset_with_more_sections():
    """`source` and `image.encoder` are None by default, so a ConfigDict does not know their keys."""
    values = config.default()
    values.model.update(config.sections(presets.MODELS["t5-small"]))
    values.model.source.dropout = 0.1
    t5_small = presets.named("t5-small")
    source = dataclasses.replace(t5_small.source, dropout=0.1)
    assert config.parse(values.to_dict()).model == dataclasses.replace(t5_small, source=source)

    values = config.default()
    values.model.image.update(config.sections(presets.IMAGES["siglip-image-b/16-224"]))
    assert config.from_flag(values).model.image == presets.named("siglip-image-b/16-224")


def test_unknown_preset():
    with pytest.raises(config.InputError, match=r"preset='gpt2-xll' is none of gpt2, .*\(did you mean 'gpt2-xl'\?\)"):
        presets.named("gpt2-xll")


def test_parameters_by_part():
    counts = flops.parameters(hf.abstract_params(presets.named("t5-small")), flops.part)
    assert counts["backbone/cross"] == counts["source/attention"] == 6 * 4 * 512 * 512
    assert sum(counts.values()) == 60_506_624
