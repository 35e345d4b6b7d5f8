"""Analytic cost of a model: parameters and floating-point operations by module.

An operation is a multiplication or an addition, so a product of [m,k] and [k,n] costs 2 m k n: twice its multiply-
accumulates. Only matrix products and the two products of attention count; norms, softmax, activations, tables and the
scores between the two sides of pairs do not. The backward pass of a product is two products of its size. What is
computed again (remat; the first of the two passes of contrastive losses under accumulation) does not count.

Attention has two counts, and publications differ in which they use. Full: every query of a row meets every key (in an
image encoder, every key of its picture). Causal: the pairs that the mask of one unbroken document lets through: about
half where the stream is causal, fewer in blocks with a window, all where it is not causal, as in an image encoder. (A
picture in a causal stream is a block that sees itself whole; that is not counted.)

XLA's own count is of no use for a whole model: it counts a loop's body once.
"""

import dataclasses
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
    (r"block_\d+/(image_|video_|audio_|cross_)?(attention|cross|mlp)/.*", r"\2"),
    (r"(block_\d+/)?\w*norm/(scale|bias)$", "norms"),
    (r"block_\d+/(cross|cross_mlp)_gate/value$", "cross"),
    (r"block_\d+/probe/value$", "cross"),
    (r"(deep_\d+_)?connector(_up)?/(kernel|bias)$", "connector"),
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
    flops, features = {}, {name: layout.features(name) for name in layout.media}
    for name in layout.media:
        flops |= _within(name, _media(c, layout, name))
        if layout.tokens:
            flops |= _within("fusion", _resampled(c, layout, name))
    if c.encoder:
        flops |= _within("source", stack(c.encoder, S, windows=causal))
    memory, routed = S, 0
    if layout.place == "memory":
        memory = sum(layout.budget(name)[0] if c.fusion.kind == "pooled" else n for name, n in features.items())
    if c.fusion.kind == "experts":  # their own weights read them, and the text's do not know that they need not
        routed = sum(features.values())
    flops |= _within("backbone", stack(c.decoder, T, causal and c.causal, causal, memory, c.memory_width, routed))
    if c.head_hidden:
        flops["head_hidden"] = 2 * T * D * D
    if c.embed:
        flops["projection"] = 2 * 2 * layout.pairs * D * c.embed  # of media and of texts
    return flops | {"head": 2 * T * D * c.vocab}


def _media(model: config.Model, layout: batch_lib.Layout, name: str) -> dict[str, int]:
    """The media of one modality in a row, all of a size, up to their connector: class tokens are encoded, but go no
    further."""
    c, (items, patches), D, fusion = getattr(model, name), layout.budget(name), model.backbone.width, model.fusion
    width = c.encoder.width if c.encoder else D
    if isinstance(c, config.Audio) and c.front == "conv":
        convolutions = 2 * patches * c.patch * 3 * c.bins * width + 2 * patches * (c.patch + 1) * width * width
        flops = {"front": convolutions}
    else:
        flops = {"embed": 2 * patches * c.values * width}
    if c.encoder:
        used = dataclasses.replace(c.encoder, depth=c.encoder.depth + 1 + c.layer)
        one = stack(used, patches // items + (isinstance(c, config.Image) and c.class_token))
        flops |= _within("encoder", {name: items * count for name, count in one.items()})
    inputs = width * (math.prod(layout.box(name)) if fusion.connector == "pixel_shuffle" else 1)
    one = 2 * layout.encoded(name) * (inputs + D * (fusion.connector == "mlp2x_gelu")) * D
    bare = not c.encoder and fusion.connector in ("linear", "pool")
    connectors = fusion.inject + (not bare)
    return flops | ({"connector": connectors * one} if connectors else {})


def _resampled(c: config.Model, layout: batch_lib.Layout, name: str) -> dict[str, int]:
    """Learned queries of the media of one modality; each reads all of the row's vectors that the mask then hides."""
    queries = layout.budget(name)[0] * layout.tokens
    memory = layout.encoded(name) + (layout.context if c.fusion.kind == "q_former" else 0)
    blocks = dataclasses.replace(c.backbone, depth=c.fusion.depth, pattern=("cross",))
    return _within(f"{name}_resampler", stack(blocks, queries, memory=memory))


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


def stack(c: config.Backbone, positions: int, causal: bool = False, windows: bool = False, memory: int = 0,
          memory_width: int = 0, routed: int = 0):  # fmt: skip
    """-> {"attention", "mlp", "cross": FLOPs} of all blocks over `positions` positions, some reading `memory` vectors;
    of pooled ones memory_width is the width.

    causal, windows: count only the pairs that causality, and a local block's window, let through. routed: positions
    that further weights read, besides.
    """
    flops = {"attention": 0, "mlp": c.depth * _mlp(c, positions + routed)}
    for kind in c.kinds:
        window = c.window if windows and "local" in kind else 0
        met = pairs(positions, causal, window)
        flops["attention"] += _attention(c, positions + routed, positions + routed, met)
    if c.count("gated"):
        flops["mlp"] += c.count("gated") * _mlp(c, positions)
    if c.count("cross", "gated"):
        flops["cross"] = c.count("cross", "gated") * _attention(c, positions, memory, positions * memory)
    if c.count("pooled"):  # the query is one, what comes of it a position's
        one = 2 * c.width * c.head_dim * c.heads * (positions + 1) + 4 * memory_width * c.head_dim * c.kv_heads * memory
        flops["cross"] = c.count("pooled") * (one + 4 * positions * memory * c.heads * c.head_dim)
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
