"""Analytic cost of a model: parameters and floating-point operations by module.

An operation is a multiplication or an addition, so a product of [m,k] and [k,n] costs 2 m k n: twice its multiply-
accumulates. Only matrix products and the two products of attention count; norms, softmax, activations, tables and the
scores between the towers of a pair do not. The backward pass of a product is two products of its size.

Attention has two counts, and publications differ in which they use. Full: every query of a row meets every key (in an
image encoder, every key of its picture). Causal: the pairs that the mask of one unbroken document lets through: about
half where the stream is causal, fewer in blocks with a window, all where it is not causal, as in an image encoder. (A
picture in a causal stream is a block that sees itself whole; that is not counted.)

XLA's own count is of no use for a whole model: it counts a loop's body once.
"""

import math
import re
from collections.abc import Callable

import jax

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.model.layers import GATED

# Path of a parameter -> the part of the model that it is counted with; the first pattern that is found is replaced.
PARTS = (
    (r"\bpool/.*", "pool"),
    (r"block_\d+/(attention|cross|mlp)/.*", r"\1"),
    (r"(block_\d+/)?\w*norm/(scale|bias)$", "norms"),
    (r"block_\d+/\w+_scale/value$", "scales"),
    (r"/(kernel|bias|table|value)$", ""),
)


def module(path: str) -> str:
    """"backbone/block_0/mlp/up/kernel" -> "backbone": the first name of a parameter's path."""
    return path.split("/")[0]


def part(path: str) -> str:
    """"backbone/block_0/mlp/up/kernel" -> "backbone/mlp": all blocks are one, and so are norms."""
    path = re.sub(r"\b(image|text)/\1/", r"\1/", path)  # the embedder in an image, or in a text tower
    for pattern, name in PARTS:
        if re.search(pattern, path):
            return re.sub(pattern, name, path)
    return path


def parameters(params, name: Callable[[str], str] = module) -> dict[str, int]:
    """-> {module: number of parameters}; `name` says which module a path belongs to."""
    counts: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        key = name(sharding.path_name(path))
        counts[key] = counts.get(key, 0) + math.prod(x.shape)
    return counts


def forward(model: config.Model, layout: batch_lib.Layout, causal: bool = False) -> dict[str, int]:
    """-> {module: FLOPs of one row's forward pass}; with `causal` the causal count of attention, else the full one."""
    flops: dict[str, int] = {}
    for name, count in parts(model, layout, causal).items():
        flops[module(name)] = flops.get(module(name), 0) + count
    return flops


def train_step(model: config.Model, layout: batch_lib.Layout, rows: int, causal: bool = False) -> int:
    """FLOPs of one training step; the backward pass costs twice the forward pass."""
    return 3 * rows * sum(forward(model, layout, causal).values())


# ---- FLOPs by part, under the names that `part` gives to parameters


def parts(ours, layout: batch_lib.Layout | None = None, causal: bool = False) -> dict[str, int]:
    """-> {part: FLOPs of the forward pass of one row of a Model, one picture of an Image, or one pair of Towers}.

    layout: of a Model, its row and its pictures.
    """
    if isinstance(ours, config.Image):
        return image_tower(ours)
    if isinstance(ours, config.Towers):
        return _within("image", image_tower(ours.image)) | _within("text", _text_tower(ours, causal))
    return _model(ours, layout, causal)


def _model(c: config.Model, layout: batch_lib.Layout, causal: bool) -> dict[str, int]:
    T, S, D = layout.context, layout.source, c.backbone.width
    flops = {}
    for name in layout.media:
        flops |= _within(name, _media(getattr(c, name), D, *layout.budget(name)))
    if c.source:
        flops |= _within("source", stack(c.source, S, windows=causal))
    flops |= _within("backbone", stack(c.backbone, T, causal and c.causal, causal, memory=S))
    if c.head_hidden:
        flops["head_hidden"] = 2 * T * D * D
    return flops | {"head": 2 * T * D * c.vocab}


def _media(c: config.Image | config.Video | config.Audio, stream: int, items: int, patches: int) -> dict[str, int]:
    """`patches` patches of `items` media, all of a size, on their way into a stream of this width: class tokens are
    encoded, but do not enter it."""
    width = c.encoder.width if c.encoder else stream
    if isinstance(c, config.Audio) and c.front == "conv":
        convolutions = 2 * patches * c.patch * 3 * c.bins * width + 2 * patches * (c.patch + 1) * width * width
        flops = {"front": convolutions}
    else:
        flops = {"embed": 2 * patches * c.values * width}
    if c.encoder:
        one = stack(c.encoder, patches // items + (isinstance(c, config.Image) and c.class_token))
        flops |= _within("encoder", {name: items * count for name, count in one.items()})
        flops["connector"] = 2 * patches * c.encoder.width * stream
    return flops


def image_tower(c: config.Image) -> dict[str, int]:
    """-> {part: FLOPs of one picture} in an ImageTower."""
    D, S = c.encoder.width, _positions(c)
    flops = {"image/embed": _patches(c, D)} | _within("encoder", stack(c.encoder, S))
    if c.pool == "map":  # one query reads all positions
        flops["pool"] = _attention(c.encoder, 1, S, S) + _mlp(c.encoder, 1)
    if c.classes:
        flops["head"] = 2 * (S if c.pool == "none" else 1) * D * c.classes
    return flops


def _text_tower(c: config.Towers, causal: bool) -> dict[str, int]:
    text = c.text
    flops = _within("backbone", stack(text.backbone, text.context, causal and text.causal, causal))
    return flops | {"head": 2 * text.backbone.width * c.width}  # of the one position that is pooled


def stack(c: config.Backbone, positions: int, causal: bool = False, windows: bool = False, memory: int = 0):
    """-> {"attention", "mlp", "cross": FLOPs} of all blocks over `positions` positions, cross blocks reading `memory`.

    causal, windows: count only the pairs that causality, and a local block's window, let through.
    """
    flops = {"attention": 0, "mlp": c.depth * _mlp(c, positions)}
    for kind in c.kinds:
        window = c.window if windows and kind == "local" else 0
        flops["attention"] += _attention(c, positions, positions, pairs(positions, causal, window))
    if "cross" in c.kinds:
        flops["cross"] = c.kinds.count("cross") * _attention(c, positions, memory, positions * memory)
    return flops


def pairs(positions: int, causal: bool, window: int = 0) -> int:
    """(query, key) pairs of a stream with itself; causal: no key lies ahead; window: none is that far away or more."""
    reach = min(window or positions, positions)
    behind = reach * (reach + 1) // 2 + (positions - reach) * reach  # the query's own position included
    return behind if causal else 2 * behind - positions


def _attention(c: config.Backbone, queries: int, keys: int, met: int) -> int:
    """Queries and output of `queries` positions, keys and values of `keys`, and the two products of `met` pairs."""
    project = 4 * c.width * c.head_dim * (queries * c.heads + keys * c.kv_heads)
    return project + 4 * met * c.heads * c.head_dim


def _mlp(c: config.Backbone, positions: int) -> int:
    return 2 * positions * c.width * c.hidden * (3 if c.activation in GATED else 2)


def _patches(c: config.Image, width: int) -> int:
    """The linear map of one picture's patches."""
    return 2 * c.grid**2 * c.patch**2 * 3 * width


def _positions(c: config.Image) -> int:
    """Of one picture in an encoder: its patches and the class token."""
    return c.grid**2 + c.class_token


def _within(name: str, flops: dict[str, int]) -> dict[str, int]:
    return {part(f"{name}/{key}"): count for key, count in flops.items()}
