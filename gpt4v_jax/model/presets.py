"""The table of published sizes, one row each: a preset is the values that differ from the dataclass's defaults.

    config.model.update(presets.MODELS["gpt2"])                      # in a config file
    config.parse(presets.IMAGES["vit-b/16"], config.Image)           # a ViT, which is no config of a run
"""

from gpt4v_jax import config

_GPT2 = {"position": "learned", "tied": True, "vocab": 50257, "context": 1024}
_GPT2_BLOCK = {"norm": "layer", "norm_eps": 1e-5, "activation": "gelu_tanh", "bias": config.BIASES}
_LLAMA = {"position": "rope", "tied": False}
_LLAMA_BLOCK = {"norm": "rms", "norm_eps": 1e-5, "activation": "swiglu", "bias": ()}


def _gpt2(depth: int, width: int, heads: int) -> dict:
    return _GPT2 | {"backbone": _GPT2_BLOCK | {"depth": depth, "width": width, "heads": heads}}


def _llama(depth: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, context: int, theta: float):
    sizes = {"depth": depth, "width": width, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    return _LLAMA | {"vocab": vocab, "context": context, "backbone": _LLAMA_BLOCK | sizes | {"rope_theta": theta}}


def _vit(depth: int, width: int, heads: int, patch: int) -> dict:
    encoder = {"depth": depth, "width": width, "heads": heads, "norm": "layer", "norm_eps": 1e-6,
               "activation": "gelu", "bias": config.BIASES}  # fmt: skip
    return {"size": 224, "patch": patch, "class_token": True, "pool": "class", "classes": 1000, "encoder": encoder}


MODELS = {  # config.Model
    "gpt2": _gpt2(12, 768, 12),  # Radford et al. 2019
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096, 10_000.0),  # Touvron et al. 2023
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000, 4096, 10_000.0),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 131072, 500_000.0),  # without its rope scaling
}

IMAGES = {  # config.Image, a ViT with its classifier (Dosovitskiy et al. 2020)
    "vit-ti/16": _vit(12, 192, 3, 16),
    "vit-s/16": _vit(12, 384, 6, 16),
    "vit-b/16": _vit(12, 768, 12, 16),
    "vit-b/32": _vit(12, 768, 12, 32),
    "vit-l/16": _vit(24, 1024, 16, 16),
    "vit-h/14": _vit(32, 1280, 16, 14),
}
