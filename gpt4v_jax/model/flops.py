"""Analytic cost of a model: parameters and floating-point operations a module (2 x multiply-accumulates).

XLA's own count is of no use for a whole model: it counts a loop's body once.
"""

import math

import jax

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding


def parameters(params) -> dict[str, int]:
    """-> {module: number of parameters}, by the first name of the path, and the backbone's blocks as one."""
    counts: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        module = sharding.path_name(path).split("/")[0]
        counts[module] = counts.get(module, 0) + math.prod(x.shape)
    return counts


def forward(model: config.Model, layout: batch_lib.Layout, causal: bool = False) -> dict[str, int]:
    """-> {module: FLOPs of one row's forward pass}: matrix products and attention.

    Attention is counted whole (every query meets every key) or, with `causal`, for the T (T + 1) / 2 pairs of a causal
    stream; publications differ in this, so say which.
    """
    T = layout.context
    pairs = T * (T + 1) // 2 if causal else T * T
    width = model.backbone.width
    flops = {"backbone": backbone(model.backbone, T, pairs), "head": 2 * T * width * model.vocab}
    if layout.size:
        M, values = layout.patch_budget, layout.patch**2 * 3
        encoder = model.image.encoder
        flops["image"] = 2 * M * values * (encoder.width if encoder else width)
        if encoder:
            flops["image"] += backbone(encoder, M, M * layout.grid**2) + 2 * M * encoder.width * width
    return flops


def backbone(c: config.Backbone, positions: int, pairs: int) -> int:
    """FLOPs of one forward pass over `positions` positions, with attention between `pairs` (query, key) pairs."""
    project = 2 * c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mlp = 2 * c.width * c.hidden * (3 if c.activation == "swiglu" else 2)
    return c.depth * (positions * (project + mlp) + pairs * 4 * c.heads * c.head_dim)


def train_step(model: config.Model, layout: batch_lib.Layout, rows: int, causal: bool = False) -> int:
    """FLOPs of one training step; the backward pass costs twice the forward pass."""
    return 3 * rows * sum(forward(model, layout, causal).values())
