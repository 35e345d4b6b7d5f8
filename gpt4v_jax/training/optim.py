"""Optimizers by name, schedules and per-parameter masks -> one optax chain.

The path of a leaf of the state ends with its parameter's path: by that `sharding` finds its place.
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gpt4v_jax import config
from gpt4v_jax.model.layers import inputs
from gpt4v_jax.sharding import path_name


def schedule(c: config.Optim, steps: int) -> optax.Schedule:
    """Linear warm-up from lr / warmup to lr, whatever follows; then as `c.schedule` says.

    cosine, linear: towards `final` x lr, which the step after the last would have. wsd: lr, and in the last `cooldown`
    x steps linearly towards `final` x lr (Hu et al. 2024). rsqrt: lr sqrt(warmup / step), however long the run (Vaswani
    et al. 2017).
    """
    after = max(steps - c.warmup, 1)
    if c.schedule == "cosine":
        decay = optax.cosine_decay_schedule(c.lr, after, alpha=c.final)
    elif c.schedule == "linear":
        decay = optax.linear_schedule(c.lr, c.lr * c.final, after)
    elif c.schedule == "wsd":
        down = min(round(c.cooldown * steps), after)  # where they do not both fit, warm-up goes first
        slope = optax.linear_schedule(c.lr, c.lr * c.final, max(down, 1))
        decay = optax.join_schedules([optax.constant_schedule(c.lr), slope], [after - down])
    elif c.schedule == "rsqrt":
        decay = _rsqrt(c.lr, max(c.warmup, 1))
    else:
        decay = optax.constant_schedule(c.lr)
    if not c.warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(c.lr / c.warmup, c.lr, c.warmup), decay], [c.warmup])


def _rsqrt(lr: float, warmup: int) -> optax.Schedule:
    return lambda after: lr * jnp.sqrt(warmup / (warmup + jnp.maximum(after, 0)))


def matching(pattern: str, params):
    """-> a tree of bool: does the parameter's path match? Raises InputError when a given pattern matches none."""
    try:
        tree = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(pattern) and bool(re.search(pattern, path_name(path))), params
        )
    except re.error as error:
        raise config.InputError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if pattern and not any(jax.tree.leaves(tree)):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise config.InputError(f"pattern {pattern!r} matches no parameter; there are, for example, {paths[:3]}")
    return tree


def frozen(c: config.Optim, lora: config.LoRA, params):
    """-> a tree of bool: which parameters do not move; None where all do. `c.frozen` does not, and with LoRA nothing
    does but its own leaves and `lora.also`."""
    if not c.frozen and not lora.rank:
        return None
    still = matching(c.frozen, params)
    if lora.rank:

        def one(path, named, also):
            return named or not (also or path_name(path).startswith("lora/"))

        still = jax.tree_util.tree_map_with_path(one, still, matching(lora.also, params))
    if all(jax.tree.leaves(still)):
        raise config.InputError(f"frozen={c.frozen!r} matches every parameter that moves: nothing would be trained")
    return still


def moving(c: config.Optim, lora: config.LoRA, params) -> int:
    """-> how many values are trained."""
    still = frozen(c, lora, params) or jax.tree.map(lambda x: False, params)
    sizes = jax.tree.map(lambda x, left: 0 if left else math.prod(x.shape), params, still)
    return sum(jax.tree.leaves(sizes))


def make(c: config.Optim, steps: int, params, lora: config.LoRA = config.LoRA()):  # noqa: B008, frozen
    """clip -> the optimizer `c.name`, with decoupled decay on `c.decay` -> learning rates times `c.lr_factors`.

    -> optax.GradientTransformation. Frozen parameters pass all of it by: they have no state, and the clip does not
    count their gradients.
    """
    tx = _named(c, schedule(c, steps), matching(c.decay, params))
    tx = optax.chain(optax.clip_by_global_norm(c.clip), tx) if c.clip else optax.chain(tx)
    still = frozen(c, lora, params)
    if still:
        labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "moving", still)
        tx = optax.partition({"moving": tx, "frozen": optax.set_to_zero()}, labels)
    if c.lr_factors:  # an update is the learning rate times something, decay included: it may as well be scaled last
        factors = _factors(c.lr_factors, params)
        tx = optax.chain(tx, optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)))
    return _stored_as_bfloat16(tx) if c.state_dtype == "bfloat16" else tx


def _named(c: config.Optim, lr: optax.Schedule, decay) -> optax.GradientTransformation:
    """With muon only its matrices decay; tables, norms and the head are left to (Nesterov) Adam without decay."""
    if c.name == "muon":
        # consistent_rms makes a Muon update as large as AdamW's: one learning rate serves both (Liu et al. 2025)
        return contrib.muon(
            lr, beta=c.momentum, weight_decay=c.weight_decay, weight_decay_mask=decay, adam_b1=c.b1, adam_b2=c.b2,
            adam_weight_decay=0.0, muon_weight_dimension_numbers=_matrices, consistent_rms=0.2,
        )  # fmt: skip
    if c.name == "adamw":  # Loshchilov & Hutter 2019
        parts = [optax.scale_by_adam(c.b1, c.b2)]
    elif c.name == "lion":  # Chen et al. 2023
        parts = [optax.scale_by_lion(c.b1, c.b2)]
    elif c.name == "adafactor":
        # Shazeer & Stern 2018: b2 = 1 - step^-0.8, no first moment, updates clipped to RMS 1. Left out is their factor
        # RMS(parameter), so that a learning rate means what it means for the others; and not optax.adafactor, which
        # does not multiply its decay by the learning rate.
        parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    else:  # sgd, with heavy-ball momentum (Polyak 1964)
        parts = [optax.trace(c.momentum)] if c.momentum else []
    return optax.chain(*parts, optax.add_decayed_weights(c.weight_decay, decay), optax.scale_by_learning_rate(lr))


def _matrices(params):
    """Which axes of each kernel inside the blocks are its inputs and which its outputs; None: left to AdamW."""

    def one(path, x):
        name = path_name(path)
        if not re.search(r"(block_\d+/.*|image/embed)/kernel$", name):
            return None
        n = inputs(name, x.ndim)
        return contrib.MuonDimensionNumbers(tuple(range(n)), tuple(range(n, x.ndim)))

    return jax.tree_util.tree_map_with_path(one, params)


def _factors(entries: tuple[str, ...], params):
    """-> a tree of float: the factor of the first "pattern=factor" that a parameter's path matches, or 1."""
    factors = [None] * len(jax.tree.leaves(params))
    for entry in entries:
        pattern, _, number = entry.rpartition("=")  # the last "=": a pattern may hold others
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not (pattern and 0 <= factor < math.inf):
            raise config.InputError(f"lr_factors={entry!r} is not pattern=factor, such as '^image/=0.1', factor >= 0")
        matches = jax.tree.leaves(matching(pattern, params))
        hits = [match and had is None for match, had in zip(matches, factors, strict=True)]
        if not any(hits):
            raise config.InputError(f"lr_factors={entry!r} is never used: earlier entries match all that it matches")
        factors = [factor if hit else had for hit, had in zip(hits, factors, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), [1.0 if f is None else f for f in factors])


def _stored_as_bfloat16(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, computed in float32; between steps its moments lie in bfloat16, rounded up or down by chance.

    Rounded to the nearest value, a moment that changes by less than 2^-9 of itself would stand still: with b2 = 0.999
    Adam's second one would grow and never shrink. By chance it is right on average (Zamirai et al. 2020).
    """

    def stored(state, convert):
        def one(path, x):
            # optax keeps Muon's constants in its state: they are no moment, and wrong in bfloat16
            moment = x.ndim and jnp.issubdtype(x.dtype, jnp.floating) and not path_name(path).endswith("/ns_coeffs")
            return convert(path_name(path), x) if moment else x

        return jax.tree_util.tree_map_with_path(one, state)

    def init(params):
        return stored(tx.init(params), lambda _, x: x.astype(jnp.bfloat16))

    def update(grads, state, params=None):
        state = stored(state, lambda _, x: x.astype(jnp.float32))
        updates, state = tx.update(grads, state, params)
        # Every schedule counts its steps in the state: a resumed run draws what the unbroken one draws.
        step = next(x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer))
        step = step.astype(jnp.uint32)
        return updates, stored(state, lambda path, x: _round(x, _hash(step + jnp.uint32(zlib.crc32(path.encode())))))

    return optax.GradientTransformation(init, update)


def _round(x: jax.Array, seed: jax.Array) -> jax.Array:
    """float32 -> one of its two neighbours in bfloat16, the nearer the likelier; what bfloat16 can hold stays."""
    noise = _hash(jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) ^ seed) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _hash(x: jax.Array) -> jax.Array:
    """Mixes the bits of a uint32 (Wellons' lowbias32): random enough to round by; jax.random compiles slowly a leaf."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
