"""The table of published sizes, one row each: a preset is the values that differ from the dataclass's defaults.

    config.model.update(presets.MODELS["gpt2"])                              # in a config file
    config.model.update(config_lib.sections(presets.MODELS["t5-small"]))     # where a section is None by default
    config.parse(presets.IMAGES["vit-b/16"], config.Image)                   # a ViT, which is no config of a run
    python -m gpt4v_jax.plan --preset gpt2                                   # what it costs

The values are those of the public config.json of each model, as gpt4v_jax.interop reads it.
"""

from gpt4v_jax import config


def _sizes(depth: int, width: int, heads: int, **more) -> dict:
    return {"depth": depth, "width": width, "heads": heads} | more


# ---- language models

_GPT2_BLOCK = {"norm": "layer", "norm_eps": 1e-5, "activation": "gelu_tanh", "bias": config.BIASES}
_LLAMA_BLOCK = {"norm": "rms", "norm_eps": 1e-5, "activation": "swiglu"}
_QWEN_BLOCK = {"norm": "rms", "norm_eps": 1e-6, "activation": "swiglu", "rope_theta": 1e6}
_GEMMA_BLOCK = {"norm": "rms_plus_one", "norm_eps": 1e-6, "activation": "geglu", "head_dim": 256}
_GEMMA2_BLOCK = _GEMMA_BLOCK | {"norm_place": "sandwich", "attention_scale": 256**-0.5}
_BERT_BLOCK = {"norm": "layer", "norm_eps": 1e-12, "norm_place": "post", "activation": "gelu", "bias": config.BIASES}
_T5_BLOCK = {"norm": "rms", "norm_eps": 1e-6, "activation": "relu", "attention_scale": 1.0, "head_dim": 64,
             "buckets": 32, "bucket_distance": 128}  # fmt: skip
_BART_BLOCK = _BERT_BLOCK | {"norm_eps": 1e-5}


def _gpt2(*sizes: int) -> dict:
    return {"position": "learned", "vocab": 50257, "context": 1024, "backbone": _GPT2_BLOCK | _sizes(*sizes)}


def _decoder(block: dict, vocab: int, context: int, *sizes: int, tied: bool = False, **more) -> dict:
    """Built like Llama: rotary positions, gated MLP. sizes: depth, width, heads; more: of the block."""
    return {"vocab": vocab, "context": context, "tied": tied, "backbone": block | _sizes(*sizes, **more)}


def _gemma(block: dict, context: int, depth: int, width: int, heads: int, vocab: int = 256_000, **more) -> dict:
    model = _decoder(block, vocab, context, depth, width, heads, tied=True, **more)
    return model | {"embed_scale": width**0.5}


def _bert(vocab: int, *sizes: int) -> dict:
    """With the head for masked tokens; without the pooler and the head for next sentences."""
    return {"vocab": vocab, "context": 512, "causal": False, "position": "learned", "token_types": 2,
            "embed_norm": True, "head_hidden": "gelu", "head_bias": True,
            "backbone": _BERT_BLOCK | _sizes(*sizes)}  # fmt: skip


def _t5(depth: int, width: int, heads: int, hidden: int) -> dict:
    block = _T5_BLOCK | _sizes(depth, width, heads, hidden=hidden)
    return {"vocab": 32128, "context": 512, "position": "none", "logit_scale": width**-0.5, "source": block,
            "backbone": block | {"pattern": ("cross",)}}  # fmt: skip


def _bart(*sizes: int) -> dict:
    """depth of the encoder and of the decoder each, width, heads."""
    block = _BART_BLOCK | _sizes(*sizes)
    return {"vocab": 50265, "context": 1024, "position": "learned", "position_offset": 2, "embed_norm": True,
            "head_bias": True, "source": block, "backbone": block | {"pattern": ("cross",)}}  # fmt: skip


_LLAMA3_ROPE = {"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}

MODELS = {  # config.Model
    # Radford et al. 2019
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    # Touvron et al. 2023; Dubey et al. 2024
    "llama-2-7b": _decoder(_LLAMA_BLOCK, 32000, 4096, 32, 4096, 32, hidden=11008),
    "llama-2-13b": _decoder(_LLAMA_BLOCK, 32000, 4096, 40, 5120, 40, hidden=13824),
    "llama-3.1-8b": _decoder(_LLAMA_BLOCK, 128256, 131072, 32, 4096, 32, hidden=14336, kv_heads=8,
                             rope_theta=500_000.0, rope_scaling=_LLAMA3_ROPE),
    # Allal et al. 2025
    "smollm2-135m": _decoder(_LLAMA_BLOCK, 49152, 8192, 30, 576, 9, hidden=1536, kv_heads=3, rope_theta=100_000.0,
                             tied=True),
    "smollm2-360m": _decoder(_LLAMA_BLOCK, 49152, 8192, 32, 960, 15, hidden=2560, kv_heads=5, rope_theta=100_000.0,
                             tied=True),
    # Jiang et al. 2023
    "mistral-7b-v0.1": _decoder(_LLAMA_BLOCK, 32000, 32768, 32, 4096, 32, hidden=14336, kv_heads=8,
                                pattern=("local",), window=4096),
    # Yang et al. 2024, 2025
    "qwen2-0.5b": _decoder(_QWEN_BLOCK, 151936, 131072, 24, 896, 14, hidden=4864, kv_heads=2, bias=("qkv",), tied=True),
    "qwen2-7b": _decoder(_QWEN_BLOCK, 152064, 131072, 28, 3584, 28, hidden=18944, kv_heads=4, bias=("qkv",)),
    "qwen3-0.6b": _decoder(_QWEN_BLOCK, 151936, 40960, 28, 1024, 16, hidden=3072, kv_heads=8, head_dim=128,
                           qk_norm=True, tied=True),
    # Gemma Team 2024, 2024b, 2025
    "gemma-2b": _gemma(_GEMMA_BLOCK, 8192, 18, 2048, 8, hidden=16384, kv_heads=1),
    "gemma-7b": _gemma(_GEMMA_BLOCK, 8192, 28, 3072, 16, hidden=24576),
    "gemma-2-2b": _gemma(_GEMMA2_BLOCK, 8192, 26, 2304, 8, hidden=9216, kv_heads=4, pattern=("local", "global"),
                         window=4096, attention_cap=50.0) | {"logit_cap": 30.0},
    "gemma-3-1b": _gemma(_GEMMA2_BLOCK, 32768, 26, 1152, 4, hidden=6912, kv_heads=1, vocab=262_144, qk_norm=True,
                         pattern=("local",) * 5 + ("global",), window=512, rope_theta=1e6, local_theta=1e4),
    # Devlin et al. 2018
    "bert-base-uncased": _bert(30522, 12, 768, 12),
    "bert-large-uncased": _bert(30522, 24, 1024, 16),
    "bert-base-chinese": _bert(21128, 12, 768, 12),
    # Raffel et al. 2020; Lewis et al. 2019. T5 has no table of positions, so its context is Model's default.
    "t5-small": _t5(6, 512, 8, 2048),
    "t5-base": _t5(12, 768, 12, 3072),
    "bart-base": _bart(6, 768, 12),
    "bart-large": _bart(12, 1024, 16),
}  # fmt: skip

# ---- image encoders

_VIT_BLOCK = {"norm": "layer", "norm_eps": 1e-12, "activation": "gelu", "bias": config.BIASES}
_CLIP_BLOCK = {"norm": "layer", "norm_eps": 1e-5, "activation": "quick_gelu", "bias": config.BIASES}
_SIGLIP_BLOCK = {"norm": "layer", "norm_eps": 1e-6, "activation": "gelu_tanh", "bias": config.BIASES}
_DINOV2_BLOCK = {"norm": "layer", "norm_eps": 1e-6, "activation": "gelu", "bias": config.BIASES, "layer_scale": 1.0}
_CLIP_PIXELS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _vit(patch: int, *sizes: int) -> dict:
    """With the classifier of ImageNet."""
    return {"size": 224, "patch": patch, "class_token": True, "pool": "class", "classes": 1000,
            "encoder": _VIT_BLOCK | _sizes(*sizes)}  # fmt: skip


def _clip_image(size: int, patch: int, classes: int, *sizes: int) -> dict:
    """With the projection into the space that texts share, `classes` wide."""
    return _CLIP_PIXELS | {"size": size, "patch": patch, "class_token": True, "pre_norm": True, "patch_bias": False,
                           "pool": "class", "pool_norm": True, "classes": classes, "head_bias": False,
                           "encoder": _CLIP_BLOCK | _sizes(*sizes)}  # fmt: skip


def _siglip_image(size: int, patch: int, *sizes: int, **more) -> dict:
    return {"size": size, "patch": patch, "pool": "map", "encoder": _SIGLIP_BLOCK | _sizes(*sizes, **more)}


def _dinov2(*sizes: int) -> dict:
    return _IMAGENET_PIXELS | {"size": 518, "patch": 14, "class_token": True, "mask_token": True,
                               "encoder": _DINOV2_BLOCK | _sizes(*sizes)}  # fmt: skip


IMAGES = {  # config.Image
    # Dosovitskiy et al. 2020, Touvron et al. 2020
    "vit-ti/16": _vit(16, 12, 192, 3),
    "vit-s/16": _vit(16, 12, 384, 6),
    "vit-b/16": _vit(16, 12, 768, 12),
    "vit-b/32": _vit(32, 12, 768, 12),
    "vit-l/16": _vit(16, 24, 1024, 16),
    "vit-h/14": _vit(14, 32, 1280, 16),
    # Radford et al. 2021
    "clip-image-b/32": _clip_image(224, 32, 512, 12, 768, 12),
    "clip-image-b/16": _clip_image(224, 16, 512, 12, 768, 12),
    "clip-image-l/14": _clip_image(224, 14, 768, 24, 1024, 16),
    "clip-image-l/14-336": _clip_image(336, 14, 768, 24, 1024, 16),
    # Zhai et al. 2023
    "siglip-image-b/16-224": _siglip_image(224, 16, 12, 768, 12),
    "siglip-image-b/16-512": _siglip_image(512, 16, 12, 768, 12),
    "siglip-image-l/16-256": _siglip_image(256, 16, 24, 1024, 16),
    "siglip-image-so400m/14-224": _siglip_image(224, 14, 27, 1152, 16, hidden=4304),
    "siglip-image-so400m/14-384": _siglip_image(384, 14, 27, 1152, 16, hidden=4304),
    # Oquab et al. 2023
    "dinov2-small": _dinov2(12, 384, 6),
    "dinov2-base": _dinov2(12, 768, 12),
    "dinov2-large": _dinov2(24, 1024, 16),
}

# ---- pairs of towers


def _text(block: dict, vocab: int, context: int, *sizes: int) -> dict:
    return {"vocab": vocab, "context": context, "position": "learned", "backbone": block | _sizes(*sizes)}


def _clip(image: str, *text: int) -> dict:
    """text: depth, width, heads of its tower."""
    picture = IMAGES[image]
    return {"image": picture, "text": _text(_CLIP_BLOCK, 49408, 77, *text), "width": picture["classes"]}


TOWERS = {  # config.Towers
    "clip-b/32": _clip("clip-image-b/32", 12, 512, 8),
    "clip-b/16": _clip("clip-image-b/16", 12, 512, 8),
    "clip-l/14": _clip("clip-image-l/14", 12, 768, 12),
    "clip-l/14-336": _clip("clip-image-l/14-336", 12, 768, 12),
    "siglip-b/16-224": {
        "image": IMAGES["siglip-image-b/16-224"], "width": 768, "text_bias": True, "logit_bias": True,
        "text": _text(_SIGLIP_BLOCK, 32000, 64, 12, 768, 12) | {"causal": False},
    },
}  # fmt: skip

KINDS = {config.Model: MODELS, config.Image: IMAGES, config.Towers: TOWERS}


def named(name: str) -> config.Model | config.Image | config.Towers:
    """-> the config of a preset, whatever its kind. Raises InputError for a name that no table has."""
    config.one_of("preset", name, tuple(known for table in KINDS.values() for known in table))
    return next(config.parse(table[name], kind) for kind, table in KINDS.items() if name in table)
