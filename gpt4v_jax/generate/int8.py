"""Weights of 8 bits: a trained model that needs a quarter of the memory, and less time where memory is what limits.

Symmetric, one scale for each output: w is about round(w / s) s with s = max |w| / 127 (Krishnamoorthi 2018, sec. 2).
"""

import dataclasses
import math
import re

import flax
import jax
import jax.numpy as jnp

from gpt4v_jax.model.layers import Int8, inputs
from gpt4v_jax.training.workdir import Trained

MATRICES = r"(kernel|text/embed/table)$"  # all but tables of positions; norms, biases and scales are no matrices


def quantized(trained: Trained) -> Trained:
    """-> the same model with kernels and the table of tokens as layers.Int8, one matrix at a time; all else stays."""
    return dataclasses.replace(trained, params=of_params(trained.params))


def of_params(params):
    """A tree of parameters -> the same tree with Int8 in place of its matrices. Int8 stays as it is."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict({path: _leaf(path, x) for path, x in flat.items()}, sep="/")


def _leaf(path: str, x):
    if isinstance(x, Int8) or not re.search(MATRICES, path):
        return x
    if path.endswith("kernel"):
        n = inputs(path, x.ndim)
        x = x.reshape(math.prod(x.shape[:n]), -1).T
    return _rows(x)


@jax.jit
def _rows(x) -> Int8:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=1), 1e-30) / 127
    return Int8(jnp.round(x / scale[:, None]).astype(jnp.int8), scale)
