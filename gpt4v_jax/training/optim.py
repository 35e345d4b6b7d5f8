"""Schedules and per-parameter masks -> one optax chain."""

import re

import jax
import optax
from optax import contrib

from gpt4v_jax import config
from gpt4v_jax.sharding import path_name


def schedule(c: config.Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from lr / warmup, then to `final` x lr at the last step."""
    after = max(steps - c.warmup, 1)
    if c.schedule == "cosine":
        decay = optax.cosine_decay_schedule(c.lr, after, alpha=c.final)
    elif c.schedule == "linear":
        decay = optax.linear_schedule(c.lr, c.lr * c.final, after)
    else:
        decay = optax.constant_schedule(c.lr)
    if not c.warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(c.lr / c.warmup, c.lr, c.warmup), decay], [c.warmup])


def matching(pattern: str, params):
    """-> a tree of bool: does the parameter's path match? Raises InputError when a given pattern matches none."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(pattern) and bool(re.search(pattern, path_name(path))), params
    )
    if pattern and not any(jax.tree.leaves(tree)):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise config.InputError(f"pattern {pattern!r} matches no parameter; there are, for example, {paths[:3]}")
    return tree


def make(c: config.Optim, steps: int, params) -> optax.GradientTransformation:
    """clip -> AdamW or Muon with decoupled decay on `c.decay` -> zero updates on `c.frozen`.

    With muon only its matrices decay; tables, norms and the head are left to (Nesterov) Adam without decay.
    """
    lr, decay = schedule(c, steps), matching(c.decay, params)
    if c.name == "adamw":
        tx = optax.adamw(lr, c.b1, c.b2, weight_decay=c.weight_decay, mask=decay)
    else:
        # consistent_rms makes a Muon update as large as AdamW's: one learning rate serves both (Liu et al. 2025)
        tx = contrib.muon(
            lr, beta=c.momentum, weight_decay=c.weight_decay, weight_decay_mask=decay, adam_b1=c.b1, adam_b2=c.b2,
            adam_weight_decay=0.0, muon_weight_dimension_numbers=_matrices, consistent_rms=0.2,
        )  # fmt: skip
    parts = [optax.clip_by_global_norm(c.clip)] if c.clip else []
    parts.append(tx)
    if c.frozen:
        parts.append(optax.masked(optax.set_to_zero(), matching(c.frozen, params)))
    return optax.chain(*parts)


def _matrices(params):
    """Which axes of each kernel inside the blocks are its inputs and which its outputs; None: left to AdamW."""

    def one(path, x):
        name = path_name(path)
        if not re.search(r"(block_\d+/.*|image/embed)/kernel$", name):
            return None
        inputs = x.ndim - 1 if name.endswith("attention/out/kernel") else 1
        return contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))

    return jax.tree_util.tree_map_with_path(one, params)
