"""The contracts between data, model and fusion: `Layout`, `Batch` (data -> model), `Segment` (embedder -> fusion).

data never imports model and model never imports data; what both must know is here. One row of a batch is one stream of
T positions, which may hold several packed documents; every modality fills positions of it with vectors.

The ONE law of masks, for self-attention and cached decode alike: query i sees key j when
`document[i] == document[j] != 0` and `step[j] <= step[i]`, where step is the running count of `ar` over the row.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import numpy as np

from gpt4v_jax import config

Array = Any  # numpy on the way in, jax inside

MEDIA = ("image", "video", "audio")  # in this order everywhere; a Segment's kind is 1 + the number in this list
TEXT = 0


@dataclasses.dataclass(frozen=True)
class View:
    """A part of a medium that is encoded by itself: the whole of it, or a tile of a big picture."""

    grid: tuple[int, int, int]  # patches in time, rows, columns
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom; shares of the picture

    def __len__(self) -> int:
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What data and model must agree on, in plain Python. Derived from the model's config by `layout`, never set.

    T positions a row; of each of MEDIA `items` media and `patches` of their patches a row (N and M of `Media`).
    """

    vocab: int
    context: int
    prefix: str  # none | media: a medium is one block | media+prompt: with the prompt | all: a document is one block
    image: config.Image = config.Image()
    video: config.Video = config.Video()
    audio: config.Audio = config.Audio()
    items: tuple[int, int, int] = (0, 0, 0)
    patches: tuple[int, int, int] = (0, 0, 0)
    axes: int = 1  # A of Batch.position
    source: int = 0  # positions of Batch.source, which a separate encoder reads; 0: none
    place: str = "stream"  # where the vectors of media go: config.Fusion.place
    tokens: int = 0  # vectors that a view becomes; 0: as many as it has patches
    merges: int = 1  # so many patches squared become one vector; of a sound, so many
    pairs: int = 0  # P of Batch.pair
    wide: bool = False  # a block may be as long as a row, whatever `prefix` says: masked documents, prefixes

    def reads(self, modality: str) -> bool:
        config.one_of("modality", modality, MEDIA)
        return bool(getattr(self, modality))

    @property
    def media(self) -> tuple[str, ...]:
        """The modalities that rows have room for."""
        return tuple(name for name, items in zip(MEDIA, self.items, strict=True) if items)

    def budget(self, modality: str) -> tuple[int, int]:
        """-> (media, patches) that a row holds of `modality`."""
        k = MEDIA.index(modality)
        return self.items[k], self.patches[k]

    @property
    def room(self) -> tuple[int, ...]:
        """-> what packing may fill of a row: positions, then items and patches of each of MEDIA, then the source, if
        there is one."""
        media = (n for pair in zip(self.items, self.patches, strict=True) for n in pair)
        return (self.context, *media, *([self.source] if self.source else []))

    def encoded(self, modality: str) -> int:
        """-> the vectors that an embedder makes of a row's media of `modality`."""
        items, patches = self.budget(modality)
        return min(patches, items * math.prod(self.merged(modality, largest_view(getattr(self, modality)))))

    def features(self, modality: str) -> int:
        """-> the vectors that become of them, F: those that slots count."""
        return self.budget(modality)[0] * self.tokens if self.tokens else self.encoded(modality)

    def offset(self, modality: str) -> int:
        """-> the number, among all of a row's features, of the first one of `modality`."""
        return sum(self.features(name) for name in MEDIA[: MEDIA.index(modality)])

    def values(self, modality: str) -> tuple[int, type]:
        """-> (how many values a patch has, their dtype)."""
        c = getattr(self, modality)
        return c.values, np.float32 if modality == "audio" else np.uint8

    def views(self, modality: str, shape: tuple[int, ...] = ()) -> tuple[View, ...]:
        """-> the parts of one medium. shape: (height, width) of a picture, (frames,) of a clip, (mel frames,) of a
        sound; pictures that are made square need none."""
        config.one_of("modality", modality, MEDIA)
        if modality == "image":
            return _image_views(self.image, shape)
        c = getattr(self, modality)
        time = -(-shape[0] // c.tubelet) if modality == "video" else -(-shape[0] // c.patch)
        return (View((time, c.grid, c.grid) if modality == "video" else (time, 1, 1)),)

    def grid(self, modality: str, view: View) -> tuple[int, int, int]:
        """-> (time, rows, columns) of the vectors that a view becomes."""
        return (1, 1, self.tokens) if self.tokens else self.merged(modality, view)

    def merged(self, modality: str, view: View) -> tuple[int, int, int]:
        return tuple(-(-n // m) for n, m in zip(view.grid, self.box(modality), strict=True))

    def box(self, modality: str) -> tuple[int, int, int]:
        """-> the patches in time, rows, columns that become one vector."""
        return (self.merges, 1, 1) if modality == "audio" else (1, self.merges, self.merges)

    def laid(self, modality: str, shape: tuple[int, ...] = ()) -> tuple[tuple[int, int, int], ...]:
        """-> the grids of positions that one medium of this shape takes in the stream (or the source): one a view, or
        one anchor for all of it."""
        if self.place == "memory":
            return ((1, 1, 1),)
        return tuple(self.grid(modality, view) for view in self.views(modality, shape))

    def count(self, modality: str, shape: tuple[int, ...] = ()) -> int:
        """-> how many positions these are."""
        return sum(map(math.prod, self.laid(modality, shape)))

    @property
    def reach(self) -> int:
        """How many positions ahead of itself a query may see at most; keys beyond it need not be computed."""
        if self.wide or self.prefix in ("media+prompt", "all"):
            return self.context - 1
        if self.prefix != "media":
            return 0
        most = [0]
        for name in self.media:
            c = getattr(self, name)
            views = 1 + c.tiles if name == "image" else 1
            most.append(min(self.features(name), views * math.prod(self.grid(name, largest_view(c)))) - 1)
        return max(most)


def _image_views(c: config.Image, shape: tuple[int, ...]) -> tuple[View, ...]:
    whole = View((1, c.grid, c.grid))
    if c.resize == "native":  # NaViT (Dehghani et al. 2023): the aspect stays, and at most size x size pixels
        shrink = min(1.0, c.size / max(shape))
        rows, columns = (min(max(round(side * shrink / c.patch), 1), c.grid) for side in shape)
        return (View((1, rows, columns)),)
    if not c.tiles or max(shape) <= c.size:
        return (whole,)
    # As LLaVA-NeXT (Liu et al. 2024): of the grids of 2 to `tiles` tiles the nearest to the picture's aspect, of equal
    # ones that nearest to its number of pixels.
    fitting = [(r, q) for r in range(1, c.tiles + 1) for q in range(1, c.tiles // r + 1) if r * q > 1]

    def misfit(grid):
        aspect = abs(math.log(grid[0] * shape[1] / (grid[1] * shape[0])))
        return round(aspect, 6), abs(math.prod(grid) - math.prod(shape) / c.size**2), grid

    rows, columns = min(fitting, key=misfit)
    boxes = [(q / columns, r / rows, (q + 1) / columns, (r + 1) / rows) for r in range(rows) for q in range(columns)]
    return (whole, *(View((1, c.grid, c.grid), box) for box in boxes))


def largest_view(c: config.Image | config.Video | config.Audio) -> View:
    """-> the largest view that a medium can have."""
    if isinstance(c, config.Audio):
        return View((-(-round(c.seconds * 100) // c.patch), 1, 1))
    return View((-(-c.frames // c.tubelet) if isinstance(c, config.Video) else 1, c.grid, c.grid))


def largest(c: config.Image | config.Video | config.Audio) -> int:
    """-> the most patches that one medium can have."""
    return len(largest_view(c)) * (1 + c.tiles if isinstance(c, config.Image) else 1)


def _prefix(fusion: config.Fusion, media: bool) -> str:
    """-> Layout.prefix. Without media nothing attends both ways: but a prompt of text alone does under prefix_lm."""
    if fusion.kind in ("prefix_lm", "q_former"):  # what a q_former reads of the prompt stands in the media's block
        return "media+prompt"
    return "media" if media and fusion.place == "stream" else "none"


def layout(model: config.Model, data: config.Data) -> Layout:
    items, patches, fusion = [], [], model.fusion
    for name in MEDIA:
        c, budget = getattr(model, name), getattr(data, name)
        items.append(budget.per_row * (1 + c.tiles if name == "image" else 1) if c else 0)
        most = budget.per_row * largest(c) if c else 0
        patches.append(min(budget.patches or most, most))
    return Layout(
        vocab=model.vocab,
        context=model.context,
        prefix=_prefix(fusion, any(items)) if model.causal else "all",
        image=model.image,
        video=model.video,
        audio=model.audio,
        items=tuple(items),
        patches=tuple(patches),
        axes=model.axes,
        source=(model.source_context or model.context) if model.encoder else 0,
        place=fusion.place,
        tokens=fusion.tokens if fusion.kind in config.RESAMPLED else 0,
        merges=fusion.merges,
        pairs=sum(items) if model.embed else 0,  # each has a medium, so that this is enough
        wide=not {"masked", "prefix"}.isdisjoint(data.kinds),
    )


@flax.struct.dataclass
class Media:
    """The packed media of one modality: a row holds M patches of at most N items (Layout.budget).

    An item is a View: encoders attend within one.
    """

    patch: Array  # [B,M,p]: a patch's values; uint8 RGB of pixels, (frame,) row by row, or float32 log-mel frames
    index: Array  # [B,M,3] int32: (time, row, column) of the patch in its item
    item: Array  # [B,M] int32: which item of the row, from 1; 0 is padding
    at: Array  # [B,N] int32: stream index of the item's first placeholder; -1 is padding
    size: Array  # [B,N,3] int32: patches of the item in time, rows, columns; 0 is padding


@flax.struct.dataclass
class Source:
    """A second stream of S positions, which a separate encoder reads; a row's documents are those of its stream.

    A position is seen from the step of stream position `at` on: what a later turn brings, earlier answers do not see.
    """

    tokens: Array  # [B,S] int32
    position: Array  # [B,S,A] int32
    document: Array  # [B,S] int32
    at: Array  # [B,S] int32: index of the stream's position that comes next
    slot: Array  # [B,S] int32: as Batch.slot


@flax.struct.dataclass
class Pair:
    """Media and their texts, each a document of its own, and in it the position at which it is an embedding."""

    medium: Array  # [B,P] int32: stream index
    text: Array  # [B,P] int32: stream index
    id: Array  # [B,P] int32: equal where the texts are; -1 is padding


@flax.struct.dataclass
class Batch:
    """One step's data; a flat pytree of fixed shapes."""

    tokens: Array  # [B,T] int32: vocabulary id; at a media position the placeholder's id
    slot: Array  # [B,T] int32: which of the row's media features fills a media position; -1 elsewhere
    position: Array  # [B,T,A] int32: position in the document, from 0; A = 3: (time, row, column)
    document: Array  # [B,T] int32: which packed document, contiguous, from 1; 0 is padding
    ar: Array  # [B,T] bool: True opens a causal step, False continues the block
    target: Array  # [B,T] int32: what this position must output (already shifted for next-token prediction)
    weight: Array  # [B,T] float32: loss weight of `target`
    image: Media | None = None
    video: Media | None = None
    audio: Media | None = None
    source: Source | None = None
    pair: Pair | None = None
    token_type: Array | None = None  # [B,T] int32: row of the table of token types; None: 0 everywhere


@flax.struct.dataclass
class Segment:
    """What every modality's embedder returns: S vectors and what the mask law needs to know of them."""

    x: Array  # [B,S,D]
    document: Array  # [B,S] int32
    step: Array  # [B,S] int32: a medium takes the step of its first placeholder
    item: Array  # [B,S] int32: which medium of the row, from 1; 0 is text or padding
    kind: int = flax.struct.field(pytree_node=False, default=TEXT)
    deep: tuple[Array, ...] = ()  # further vectors [B,S,D] of the same patches, from earlier layers of an encoder


@flax.struct.dataclass
class Memory:
    """Vectors beside the stream that its blocks read, by the mask law."""

    x: Array  # [B,S,D]
    document: Array  # [B,S] int32
    step: Array  # [B,S] int32
    kind: Array  # [B,S] int32: 1 + the number in MEDIA; 0: text


@flax.struct.dataclass
class Route:
    """Which positions have weights of their own: those that hold features of a modality."""

    slot: Array  # [B,T] int32: number of the feature in the order of `at`; -1: text
    at: tuple[Array, ...]  # of each of `names` [B,F] int32: the stream index that each feature goes to
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


@flax.struct.dataclass
class Fused:
    """What a fusion hands to the backbone. The backbone does not know what a picture is."""

    stream: Array  # [B,T,D]
    memory: Memory | None = None  # what gated and pooled blocks read
    source: Array | None = None  # [B,S,D]: what a separate encoder reads
    inject: tuple[Array, ...] = ()  # [B,T,D] each: what the `inject` blocks add to the stream, in their order
    route: Route | None = None


def empty(layout: Layout, rows: int) -> Batch:
    """-> a Batch of zeros in the layout's shapes, from which parameters are initialised."""
    T = layout.context
    media = {}
    for name in layout.media:
        (N, M), (p, dtype) = layout.budget(name), layout.values(name)
        media[name] = Media(
            patch=np.zeros((rows, M, p), dtype),
            index=np.zeros((rows, M, 3), np.int32),
            item=np.zeros((rows, M), np.int32),
            at=np.full((rows, N), -1, np.int32),
            size=np.zeros((rows, N, 3), np.int32),
        )
    return Batch(
        tokens=np.zeros((rows, T), np.int32),
        slot=np.full((rows, T), -1, np.int32),
        position=np.zeros((rows, T, layout.axes), np.int32),
        document=np.zeros((rows, T), np.int32),
        ar=np.ones((rows, T), bool),
        target=np.zeros((rows, T), np.int32),
        weight=np.zeros((rows, T), np.float32),
        **media,
        source=_empty_source(rows, layout) if layout.source else None,
        pair=_empty_pair(rows, layout.pairs) if layout.pairs else None,
    )


def _empty_source(rows: int, layout: Layout) -> Source:
    zeros = np.zeros((rows, layout.source), np.int32)
    position = np.zeros((rows, layout.source, layout.axes), np.int32)
    return Source(zeros, position, zeros.copy(), zeros.copy(), zeros - 1)


def _empty_pair(rows: int, P: int) -> Pair:
    zeros = np.zeros((rows, P), np.int32)
    return Pair(zeros, zeros.copy(), zeros - 1)
