"""How a trained model's matrices are held where it answers: outputs first, as floats or as integers of 8 bits.

int8: symmetric, one scale for each output, w is about round(w / s) s with s = max |w| / 127 (Krishnamoorthi 2018,
sec. 2); vectors keep 15 bits. w8a8: vectors have 8 bits, too, one scale for each (Dettmers et al. 2022, sec. 2).
"""

import dataclasses
import functools
import math
import re

import flax
import jax
import jax.numpy as jnp

from gpt4v_jax.model.layers import Turned, inputs
from gpt4v_jax.training.workdir import Trained

KINDS = ("float32", "int8", "w8a8")
MATRICES = r"(kernel|text/embed/table)$"  # all but tables of positions; norms, biases and scales are no matrices


def turned(trained: Trained, kind: str = "float32") -> Trained:
    """-> the same model with kernels and the table of tokens as layers.Turned, one matrix at a time; all else stays.

    float32: what XLA multiplies few vectors by faster on a CPU; elsewhere, and of matrices that lie on several
    devices, nothing is turned.
    """
    return dataclasses.replace(trained, params=of_params(trained.params, kind))


def of_params(params, kind: str):
    """A tree of parameters -> the same tree with Turned in place of its matrices. Turned ones stay as they are."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict({path: _leaf(path, x, kind) for path, x in flat.items()}, sep="/")


def _leaf(path: str, x, kind: str):
    if isinstance(x, Turned) or not re.search(MATRICES, path):
        return x
    if kind == "float32" and (jax.default_backend() != "cpu" or x.dtype != jnp.float32 or len(x.devices()) > 1):
        return x
    if path.endswith("table"):
        return Turned(x) if kind == "float32" else _rounded(x, kind)
    x = x.reshape(math.prod(x.shape[: inputs(path, x.ndim)]), -1)
    return Turned(_transposed(x)) if kind == "float32" else _rounded(x.T, kind)


@jax.jit
def _transposed(x):
    return x.T


@functools.partial(jax.jit, static_argnames="kind")
def _rounded(x, kind: str) -> Turned:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=1), 1e-30) / 127
    return Turned(jnp.round(x / scale[:, None]).astype(jnp.int8), scale, digits=1 if kind == "w8a8" else 2)
