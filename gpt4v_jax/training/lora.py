"""LoRA (Hu et al. 2021): a matrix W stands still, and beside it a product a b of a low rank is trained.

The model knows nothing of it. Leaves "lora/<path of W>/a" [inputs..., rank] and ".../b" [rank, outputs...] stand beside
the other parameters, and `merged` adds alpha / rank x a b to W before the model reads it. That saves the optimizer's
state of W, but not its gradient, which is made on the way to those of a and b.
"""

import math
import re
import zlib

import flax
import jax
import jax.numpy as jnp

from gpt4v_jax import config
from gpt4v_jax.model.layers import inputs


def leaves_of(path: str) -> tuple[str, str]:
    """-> the paths of a matrix's a and b."""
    return f"lora/{path}/a", f"lora/{path}/b"


def shapes(params, c: config.LoRA) -> dict[str, tuple[int, ...]]:
    """Parameters or their shapes -> {path of a leaf: its shape}; {} with rank 0.

    Raises InputError for a pattern that no matrix matches, and for a rank that is larger than a side of one.
    """
    if not c.rank:
        return {}
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    matrices = [path for path, x in flat.items() if x.ndim > 1 and path.endswith(("kernel", "table"))]
    try:
        chosen = [path for path in matrices if re.search(c.pattern, path)]
    except re.error as error:
        raise config.InputError(f"lora.pattern={c.pattern!r} is not a regular expression: {error}") from None
    if not chosen:
        examples = ", ".join(matrices[:: max(len(matrices) // 3, 1)][:3])
        raise config.InputError(f"lora.pattern={c.pattern!r} matches no matrix; there are, for example, {examples}")
    made = {}
    for path in chosen:
        shape = flat[path].shape
        n = inputs(path, len(shape))
        smaller = min(math.prod(shape[:n]), math.prod(shape[n:]))
        if c.rank > smaller:
            raise config.InputError(
                f"lora.rank={c.rank} is larger than the smaller side of {path} {shape}, {smaller}: lower it, or leave "
                "this matrix out with lora.pattern"
            )
        made |= zip(leaves_of(path), ((*shape[:n], c.rank), (c.rank, *shape[n:])), strict=True)
    return made


def added(params, c: config.LoRA, seed: int):
    """-> the parameters with LoRA's leaves: a from (seed, its path), b 0, so that the model is what it was."""
    if not c.rank:
        return params
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path, shape in shapes(params, c).items():
        if path.endswith("/a"):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            flat[path] = jax.random.normal(key, shape) * math.prod(shape[:-1]) ** -0.5
        else:
            flat[path] = jnp.zeros(shape)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def merged(params, c: config.LoRA):
    """-> the parameters that the model reads: W + alpha / rank x a b for W, and no leaves of LoRA."""
    if not c.rank:
        return params
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path, x in list(flat.items()):
        a, b = (flat.pop(leaf, None) for leaf in leaves_of(path))
        if a is not None:
            flat[path] = (x + c.alpha / c.rank * jnp.tensordot(a, b, 1, precision="highest")).astype(x.dtype)
    return flax.traverse_util.unflatten_dict(flat, sep="/")
