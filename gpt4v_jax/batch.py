"""The contracts between data, model and fusion: `Layout`, `Batch` (data -> model), `Segment` (embedder -> fusion).

data never imports model and model never imports data; what both must know is here. One row of a batch is one stream of
T positions, which may hold several packed documents; every modality fills positions of it with vectors.

The ONE law of masks, for self-attention and cached decode alike: query i sees key j when
`document[i] == document[j] != 0` and `step[j] <= step[i]`, where step is the running count of `ar` over the row.
"""

import dataclasses
from typing import Any

import flax.struct
import numpy as np

from gpt4v_jax import config

Array = Any  # numpy on the way in, jax inside

TEXT, IMAGE = 0, 1  # Segment.kind


@dataclasses.dataclass(frozen=True)
class Layout:
    """What data and model must agree on, in plain Python. Derived from the model's config by `layout`, never set.

    T positions a row; `patch_budget` patches and `items` pictures a row (M and N of `Media`).
    """

    vocab: int
    context: int
    size: int  # pictures are size x size pixels; 0: none are read
    patch: int
    items: int
    prefix: str  # none | media: a picture is one block | media+prompt: with the prompt | all: a document is one block
    source: int = 0  # positions of Batch.source, which a separate encoder reads; 0: none

    @property
    def grid(self) -> int:
        return self.size // self.patch if self.size else 0

    def count(self, modality: str) -> tuple[int, tuple[int, int, int]]:
        """-> (positions in the stream, grid (time, rows, columns)) of one medium of `modality`."""
        if modality != "image":
            raise config.InputError(f"modality {modality!r} is none of: image")
        return self.grid**2, (1, self.grid, self.grid)

    @property
    def patch_budget(self) -> int:
        return self.items * self.grid**2

    @property
    def reach(self) -> int:
        """How many positions ahead of itself a query may see at most; keys beyond it need not be computed."""
        if self.prefix in ("media+prompt", "all"):
            return self.context - 1
        return max(self.grid**2 - 1, 0) if self.prefix == "media" else 0


PREFIX = {"concat": "media", "prefix_lm": "media+prompt"}  # Fusion.kind -> Layout.prefix


def layout(model: config.Model, data: config.Data) -> Layout:
    config.one_of("model.fusion.kind", model.fusion.kind, tuple(PREFIX))
    prefix = PREFIX[model.fusion.kind] if model.image.size else "none"
    return Layout(
        vocab=model.vocab,
        context=model.context,
        size=model.image.size,
        patch=model.image.patch,
        items=data.media if model.image.size else 0,
        prefix=prefix if model.causal else "all",
        source=model.context if model.source else 0,
    )


@flax.struct.dataclass
class Media:
    """The packed media of one modality: a row holds M patches of at most N items (Layout.patch_budget, .items)."""

    patch: Array  # [B,M,p] uint8: a patch's values, row by row, RGB
    index: Array  # [B,M,3] int32: (time, row, column) of the patch in its item
    item: Array  # [B,M] int32: which item of the row, from 1; 0 is padding
    at: Array  # [B,N] int32: stream index of the item's first placeholder; -1 is padding


@flax.struct.dataclass
class Source:
    """A second stream of S positions, which a separate encoder reads; a row's documents are those of its stream."""

    tokens: Array  # [B,S] int32
    position: Array  # [B,S,1] int32
    document: Array  # [B,S] int32


@flax.struct.dataclass
class Batch:
    """One step's data; a flat pytree of fixed shapes."""

    tokens: Array  # [B,T] int32: vocabulary id; at a media position the placeholder's id
    slot: Array  # [B,T] int32: which of the row's media features fills a media position; -1 elsewhere
    position: Array  # [B,T,1] int32: position in the document, from 0
    document: Array  # [B,T] int32: which packed document, contiguous, from 1; 0 is padding
    ar: Array  # [B,T] bool: True opens a causal step, False continues the block
    target: Array  # [B,T] int32: what this position must output (already shifted for next-token prediction)
    weight: Array  # [B,T] float32: loss weight of `target`
    image: Media | None = None
    source: Source | None = None
    token_type: Array | None = None  # [B,T] int32: row of the table of token types; None: 0 everywhere


@flax.struct.dataclass
class Segment:
    """What every modality's embedder returns: S vectors and what the mask law needs to know of them."""

    x: Array  # [B,S,D]
    document: Array  # [B,S] int32
    step: Array  # [B,S] int32: a medium takes the step of its first placeholder
    item: Array  # [B,S] int32: which medium of the row, from 1; 0 is text or padding
    kind: int = flax.struct.field(pytree_node=False, default=TEXT)


@flax.struct.dataclass
class Fused:
    """What a fusion hands to the backbone. The backbone does not know what a picture is."""

    stream: Array  # [B,T,D]


def empty(layout: Layout, rows: int) -> Batch:
    """-> a Batch of zeros in the layout's shapes, from which parameters are initialised."""
    T, M, N = layout.context, layout.patch_budget, layout.items
    image = None
    if M:
        image = Media(
            patch=np.zeros((rows, M, layout.patch**2 * 3), np.uint8),
            index=np.zeros((rows, M, 3), np.int32),
            item=np.zeros((rows, M), np.int32),
            at=np.full((rows, N), -1, np.int32),
        )
    return Batch(
        tokens=np.zeros((rows, T), np.int32),
        slot=np.full((rows, T), -1, np.int32),
        position=np.zeros((rows, T, 1), np.int32),
        document=np.zeros((rows, T), np.int32),
        ar=np.ones((rows, T), bool),
        target=np.zeros((rows, T), np.int32),
        weight=np.zeros((rows, T), np.float32),
        image=image,
        source=_empty_source(rows, layout.source) if layout.source else None,
    )


def _empty_source(rows: int, S: int) -> Source:
    tokens, position, document = (np.zeros((rows, S, *more), np.int32) for more in ((), (1,), ()))
    return Source(tokens, position, document)
