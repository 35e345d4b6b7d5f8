"""The smallest model of every family, with random parameters, and its folder, which tests then spoil."""

import functools
import json
from pathlib import Path

import flax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from gpt4v_jax.interop import families, hf
from gpt4v_jax.interop.families import FAMILIES

_TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 48}  # fmt: skip
_GQA = _TEXT | {"num_key_value_heads": 2, "rope_theta": 500.0}
_IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
THEIRS = {
    "gpt2": {"vocab_size": 32, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "llama": _GQA | {"rms_norm_eps": 1e-5}, "mistral": _GQA | {"sliding_window": 8},
    "qwen2": _GQA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": _GQA | {"head_dim": 8}, "gemma": _GQA | {"head_dim": 8}, "gemma2": _GQA | {"head_dim": 8},
    "gemma3_text": _GQA | {"head_dim": 8, "sliding_window_pattern": 2},
    "vit": _IMAGE, "dinov2": _IMAGE | {"mlp_ratio": 2}, "clip_vision_model": _IMAGE, "siglip_vision_model": _IMAGE,
    "clip": {"vision_config": _IMAGE, "text_config": _TEXT, "projection_dim": 8},
    "siglip": {"vision_config": _IMAGE, "text_config": _TEXT | {"projection_size": 16}},
    "bert": _TEXT,
    "t5": {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
           "tie_word_embeddings": False},
    "bart": {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
             "max_position_embeddings": 48},
}  # fmt: skip


@functools.cache
def _shapes(ours):
    return {path: x.shape for path, x in hf.abstract_params(ours).items()}


def imported(model_type: str, dtype=jnp.float32, seed=0, **theirs) -> hf.Imported:
    """A model with random parameters. theirs: more values of its config.json."""
    values = {"model_type": model_type} | THEIRS[model_type] | theirs
    ours, rng = families.read_config(values), np.random.default_rng(seed)
    flat = {path: jnp.array(rng.normal(size=shape), dtype) for path, shape in _shapes(ours).items()}
    return hf.Imported(FAMILIES[model_type], ours, flax.traverse_util.unflatten_dict(flat, sep="/"), values)


def flat(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


def same(one, other) -> None:
    """Two trees of parameters are bit-equal, and of the same dtypes."""
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path, x in one.items():
        assert x.dtype == other[path].dtype, path
        np.testing.assert_array_equal(x, other[path], err_msg=path)


def folder(path: Path, model_type: str = "llama", save: dict | None = None, **theirs) -> Path:
    """Writes a model's folder. save: arguments of hf.save."""
    hf.save(imported(model_type, **theirs), path, **save or {})
    return path


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors")


def change(folder: Path, file="config.json", **values) -> None:
    """Some values of a JSON file."""
    path = folder / file
    there = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(there | values))
