"""Pure functions of attention: the mask law, positions, attention itself, and the cache as a value.

The alphabet is layers.py's. Attention: softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, eq. 1).
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config

CHUNK = 64  # queries at a time: on a CPU the T x T scores of a chunk stay in the processor's cache
BLOCK = 64  # keys at a time, of rows that decode each at a place of its own
LARGE = 4096  # scores of two blocks, from which on XLA makes the same of every number of blocks at once
NOBODY = np.iinfo(np.int32).max  # a page that there is not
MASKED = -1e30


@flax.struct.dataclass
class Pages:
    """Whose the pages of a cache are (Kwon et al. 2023, PagedAttention): a row takes as many as it is long."""

    table: jax.Array  # [B,N] int32: page n of each row; NOBODY from its last one on
    owner: jax.Array  # [P] int32: the row of each page; of one that nobody has, any


@flax.struct.dataclass
class Cache:
    """What decoding remembers: per layer k (after rope) and v, and what the mask law needs of every slot.

    All rows share one cursor, or have one each; a row's unused slots have document 0, which no query sees, so prompts
    of different lengths need no shifting. `next_position` is one more than the largest position so far. With pages, P
    pages of S slots are in the place of B rows of S slots, and a row goes on from page to page.
    """

    k: tuple[jax.Array, ...]  # depth x [B,K,S,H]: as the products of a step read it, so that none moves it first
    v: tuple[jax.Array, ...]
    document: jax.Array  # [B,S] int32
    step: jax.Array  # [B,S] int32
    index: jax.Array  # [B,S] int32
    cursor: jax.Array  # [] int32: slots used; [B]: by each row
    next_position: jax.Array  # [B,A] int32
    last_step: jax.Array  # [B] int32
    last_index: jax.Array  # [B] int32
    memory: tuple[tuple[jax.Array, jax.Array], ...]  # k, v [B,K,M,H] of what each block with a memory reads; M grows
    memory_parts: tuple[jax.Array, jax.Array, jax.Array]  # document, step, kind of the memory, [B,M] int32 each
    pages: Pages | None = None

    @property
    def place(self):
        """-> where what comes next goes, as `entered` has it."""
        if self.pages is None:
            return self.cursor
        table, size = self.pages.table, self.document.shape[1]
        page = jnp.take_along_axis(table, self.cursor[:, None] // size, axis=1, mode="fill", fill_value=NOBODY)
        return page[:, 0], self.cursor % size


def empty_cache(model: config.Backbone, rows: int, slots: int, axes: int = 1) -> Cache:
    """model: config.Model.decoder; axes: A of Batch.position."""

    def heads(n):
        return jnp.zeros((rows, model.kv_heads, n, model.head_dim))

    kv, memory = (heads(slots),) * model.depth, ((heads(0), heads(0)),) * model.count(*config.READS)
    zeros, row, none = (jnp.zeros(shape, jnp.int32) for shape in ((rows, slots), rows, (rows, 0)))
    position = jnp.zeros((rows, axes), jnp.int32)
    return Cache(kv, kv, zeros, zeros, zeros, jnp.int32(0), position, row, row, memory, (none, none, none))


IN_SLOTS = ("k", "v", "document", "step", "index")  # of Cache: a value for each slot


def slots(x) -> int:
    """-> which axis of one of a cache's arrays, [B,S] or [B,K,S,H], is its slots."""
    return max(x.ndim - 2, 1)


def entered(x, new, cursor):
    """-> x, [B,S] or [B,K,S,H], with `new` of T slots from the cursor, [] or [B], on. Of pages it is a pair, [B] page
    and [B] slot: `new` has one slot a row, and what goes to a page that there is not is dropped."""
    if isinstance(cursor, tuple):
        page, slot = cursor
        if slots(x) == 1:
            return x.at[page, slot].set(new[:, 0], mode="drop")
        return x.at[page, :, slot].set(new[:, :, 0], mode="drop")
    if jnp.ndim(cursor):
        enter = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=slots(x) - 1)
        return jax.vmap(enter)(x, new, cursor)
    return jax.lax.dynamic_update_slice_in_dim(x, new, cursor, axis=slots(x))


def extend(cache: Cache, batch: batch_lib.Batch) -> tuple[jax.Array, jax.Array, Cache]:
    """Enters a batch's positions: -> (its steps [B,T], its indices [B,T], the cache with all but k and v moved on).

    k and v of these positions are written by the layers, at the cursor as it was.
    """
    real = batch.document > 0
    step = cache.last_step[:, None] + jnp.cumsum(batch.ar, axis=1)
    index = cache.last_index[:, None] + jnp.cumsum(real, axis=1)
    last = jnp.max(jnp.where(real, step, cache.last_step[:, None]), axis=1)
    # Over three axes text goes on behind the largest of all of them, which a count of positions would miss.
    seen = jnp.max(jnp.where(real, batch.position.max(-1) + 1, cache.next_position[:, :1]), axis=1)
    return step, index, cache.replace(
        document=entered(cache.document, batch.document, cache.place),
        step=entered(cache.step, step, cache.place),
        index=entered(cache.index, index, cache.place),
        cursor=cache.cursor + batch.tokens.shape[1],
        next_position=jnp.broadcast_to(seen[:, None], cache.next_position.shape),
        last_step=last,
        last_index=index[:, -1],
    )


@flax.struct.dataclass
class Sight:
    """Everything that attention needs to know besides q, k, v: who the queries are, who the keys are.

    `index` is the running number of a row's real positions, by which windows and relative positions go: slots of a
    cache have holes, and positions of pictures may repeat. Of what is None there is no law.
    """

    q_document: jax.Array  # [B,T]
    q_step: jax.Array  # [B,T]
    k_document: jax.Array  # [B,S]
    k_step: jax.Array  # [B,S]
    q_index: Any = None  # [B,T]; None where blocks have neither window nor relative positions
    k_index: Any = None  # [B,S]
    q_item: Any = None  # [B,T]: the medium that a query belongs to
    k_item: Any = None  # [B,S]: which queries alone see this key; 0: all
    k_kind: Any = None  # [B,S]: of each kind, from 1 on, a query sees only the keys of the latest step
    reach: int = flax.struct.field(pytree_node=False, default=0)
    cursor: Any = None  # with a cache: where this batch's k and v go, Cache.place
    pages: Pages | None = None  # of the cache: keys are [P,S]
    alone: bool = flax.struct.field(pytree_node=False, default=False)  # no bit depends on how many keys nobody sees

    def part(self, rows: slice, keys: slice) -> "Sight":
        """-> of these queries and these keys."""
        at = {"q": rows, "k": keys}
        fields = {name: getattr(self, name) for name in ("q_document", "q_step", "k_document", "k_step", "q_index",
                                                         "k_index", "q_item", "k_item", "k_kind")}  # fmt: skip
        return Sight(**{name: x if x is None else x[:, at[name[0]]] for name, x in fields.items()})

    def of_pages(self) -> "Sight":
        """-> the sight of each page's row on it: queries are [P,T], too."""
        asks = {name: getattr(self, name) for name in ("q_document", "q_step", "q_index", "q_item")}
        return self.replace(pages=None, **jax.tree.map(lambda x: x[self.pages.owner], asks))


def within(document, step, reach: int) -> Sight:
    """The sight of a whole stream [B,T] on itself. reach: how many positions ahead a query may see at most."""
    index = jnp.cumsum(document > 0, axis=1)
    return Sight(document, step, document, step, index, index, reach=reach)


def bidirectional(document) -> Sight:
    """Every position of a document, or of an item, sees all of it."""
    return within(document, jnp.zeros_like(document), reach=document.shape[1])


def distance(sight: Sight) -> jax.Array:
    """-> [B,T,S] int32: how far a key lies behind its query."""
    return sight.q_index[:, :, None] - sight.k_index[:, None, :]


def visible(sight: Sight, window: int = 0) -> jax.Array:
    """The mask law -> [B,T,S] bool. window: a query sees only the keys less than so many positions away; 0: all."""
    same = sight.q_document[:, :, None] == sight.k_document[:, None, :]
    past = sight.k_step[:, None, :] <= sight.q_step[:, :, None]
    near = jnp.abs(distance(sight)) < window if window else True
    seen = same & past & (sight.q_document > 0)[:, :, None] & near
    if sight.k_item is not None:
        seen &= (sight.k_item == 0)[:, None, :] | (sight.k_item[:, None, :] == sight.q_item[:, :, None])
    return seen if sight.k_kind is None else _latest(seen, sight)


def _latest(seen_BTS, sight: Sight):
    """What is left of a mask when of each kind only the keys of the latest step are seen."""
    steps = jnp.broadcast_to(sight.k_step[:, None, :], seen_BTS.shape)
    for kind in range(1, 1 + len(batch_lib.MEDIA)):
        of_kind = (sight.k_kind == kind)[:, None, :]
        newest = jnp.max(steps, axis=-1, keepdims=True, initial=0, where=seen_BTS & of_kind)
        seen_BTS &= ~of_kind | (steps == newest)
    return seen_BTS


def bucket(behind, buckets: int, longest: int, both_ways: bool):
    """T5's bucket of a distance (Raffel et al. 2020, sec. 2.1): int32 of any shape -> the same shape, in [0, buckets).

    One bucket each for small distances, then logarithmically wider ones up to `longest`; both_ways: the upper half of
    the buckets is for keys ahead of the query, else those count as distance 0.
    """
    half = buckets // 2 if both_ways else buckets
    exact = half // 2
    far = np.arange(exact, longest + 1, dtype=np.float32)  # a table, so that no two logarithms round differently
    wide = exact + (np.log(far / exact) / math.log(longest / exact) * (half - exact)).astype(np.int32)
    table = jnp.asarray(np.minimum(np.concatenate([np.arange(exact), wide]), half - 1), jnp.int32)
    if both_ways:
        return table[jnp.minimum(jnp.abs(behind), longest)] + jnp.where(behind < 0, half, 0)
    return table[jnp.clip(behind, 0, longest)]


def frequencies(head_dim: int, theta: float, scaling: config.RopeScaling) -> tuple[np.ndarray, float]:
    """-> (radians a position of each pair of dimensions [H/2] float32, the factor of sin and cos)."""
    f = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling.kind == "linear":
        f = f / scaling.factor
    if scaling.kind == "llama3":  # by how often a frequency turns within the first training's context
        turns = scaling.original * f / (2 * np.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        f = (1 - kept) * f / scaling.factor + kept * f
    if scaling.kind != "yarn":
        return f.astype(np.float32), 1.0
    bounds = [
        head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]  # the dimensions that turn so often
    if scaling.truncate:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], head_dim - 1)
    kept = 1 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    f = (1 - kept) * f / scaling.factor + kept * f
    return f.astype(np.float32), scaling.attention or 0.1 * math.log(scaling.factor) + 1


def rope(x_BTNH, position_BTA, theta: float, scaling: config.RopeScaling = config.RopeScaling()):  # noqa: B008, frozen
    """Rotary position embedding (Su et al. 2021), halves convention: dimension i turns with dimension i + H/2.

    Over three axes (time, row, column) each turns a section of the dimensions of its own, 2 : 3 : 3 of them, the
    fastest ones by time (Wang et al. 2024, Qwen2-VL).
    """
    half, axes = x_BTNH.shape[-1] // 2, position_BTA.shape[-1]
    frequency, factor = frequencies(x_BTNH.shape[-1], theta, scaling)
    position = position_BTA
    if axes == 3:
        space = 3 * half // 8
        axis = np.repeat(np.arange(3), [half - 2 * space, space, space])
        position = position_BTA[..., axis]
    angle = position[:, :, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle) * factor, jnp.cos(angle) * factor
    a, b = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def scores(q_BTKGH, k_BSKH, mask_BTS, scale=None, cap: float = 0.0, bias_BNTS=None):
    """-> [B,K,G,T,S] float32: cap tanh(scale q k / cap) + bias, and MASKED added where the mask is False."""
    B, T, K, G, H = q_BTKGH.shape
    scale = H**-0.5 if scale is None else scale
    x = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH * scale, k_BSKH, preferred_element_type=jnp.float32)
    if cap:
        x = jnp.tanh(x / cap) * cap
    if bias_BNTS is not None:
        x += bias_BNTS.reshape(-1, K, G, *bias_BNTS.shape[2:])
    # An additive mask keeps the softmax one fused loop. It is uniform over a row that sees nothing: callers zero that.
    return x + jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]


def weights(q_BTKGH, k_BSKH, mask_BTS, scale=None, cap: float = 0.0, bias_BNTS=None):
    """-> attention weights [B,K,G,T,S] in float32; a row without a visible key is exactly 0."""
    x = scores(q_BTKGH, k_BSKH, mask_BTS, scale, cap, bias_BNTS)
    return jax.nn.softmax(x, axis=-1) * mask_BTS.any(-1)[:, None, None, :, None]


def _attend(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, scale, cap, bias_BNTS):
    """weights(...) @ v -> [B,T,K,G,H]. The sum of exponentials divides the result, H wide, not the weights, S wide.

    That saves passes over the scores, forward and backward.
    """
    x = scores(q_BTKGH, k_BSKH, mask_BTS, scale, cap, bias_BNTS)
    # The largest score cancels: it needs no gradient.
    powers = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    total_BTKG = powers.sum(-1).transpose(0, 3, 1, 2)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", powers.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    out *= (mask_BTS.any(-1)[:, :, None, None] / total_BTKG)[..., None]
    return out.astype(v_BSKH.dtype)


def _attend_pages(q_PKGH, k_PKSH, v_PKSH, mask_PS, table_BN, scale, cap, bias_PNS=None):
    """Attention of rows to the pages that `table_BN` gives them, each page as its row's query sees it -> [B,K,G,H].

    Every page is the same product, and a row's are joined in its own order (running largest score: Milakov & Gimelshein
    2018, algorithm 3), so that no bit depends on where they lie or on whose the others are.
    """
    P, K, G, H = q_PKGH.shape
    scale = H**-0.5 if scale is None else scale
    x = jnp.einsum("PKGH,PKSH->PKGS", q_PKGH * scale, k_PKSH, preferred_element_type=jnp.float32)
    if cap:
        x = jnp.tanh(x / cap) * cap
    if bias_PNS is not None:
        x += bias_PNS.reshape(x.shape)
    x += jnp.where(mask_PS, 0.0, MASKED)[:, None, None]
    largest_PKG = x.max(-1)
    powers = jnp.where(mask_PS[:, None, None], jnp.exp(x - largest_PKG[..., None]), 0)
    outs = jnp.einsum("PKGS,PKSH->PKGH", powers.astype(v_PKSH.dtype), v_PKSH, preferred_element_type=jnp.float32)
    while (half := powers.shape[-1] // 2) > 0:  # in one order, whatever XLA thinks of sums
        powers = powers[..., :half] + powers[..., half:]
    there_BN, table_BN = table_BN < P, jnp.minimum(table_BN, P - 1)

    def join(n, carry):
        largest, total, out = carry
        page, there = table_BN[:, n], there_BN[:, n, None, None]
        one = jnp.where(there, largest_PKG[page], MASKED)
        new = jnp.maximum(largest, one)
        kept, more = jnp.exp(largest - new), jnp.exp(one - new)
        # What is not the row's is left out, not multiplied by 0: there may be NaN in it.
        add_total = jnp.where(there, powers[page, ..., 0] * more, 0)
        add_out = jnp.where(there[..., None], outs[page] * more[..., None], 0)
        return new, total * kept + add_total, out * kept[..., None] + add_out

    BKG = len(table_BN), K, G
    start = jnp.full(BKG, MASKED), jnp.zeros(BKG), jnp.zeros((*BKG, H))
    _, total, out = jax.lax.fori_loop(0, there_BN.sum(1).max(), join, start)
    return out / jnp.where(total > 0, total, 1)[..., None]


def _attend_blocks(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, scale, cap):
    """`_attend` of one query a row, BLOCK keys of a head a page, so that none of them moves."""
    (B, _, K, G, H), S = q_BTKGH.shape, k_BSKH.shape[1]
    N = S // BLOCK
    k, v = (x.swapaxes(1, 2).reshape(B * K * N, 1, BLOCK, H) for x in (k_BSKH, v_BSKH))  # as the cache has them
    q = jnp.repeat(q_BTKGH.reshape(B * K, 1, G, H), N, axis=0)
    mask = jnp.broadcast_to(mask_BTS, (B, K, S)).reshape(B * K * N, BLOCK)
    out = _attend_pages(q, k, v, mask, jnp.arange(B * K * N).reshape(B * K, N), scale, cap)
    return out.reshape(B, 1, K, G, H).astype(v_BSKH.dtype)


def _attend_alone(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, scale, cap, bias_BNTS):
    """`_attend`, BLOCK keys at a time up to the last one that a row sees, with the same bits however many there are.

    The order of a sum, and so its last bits, depend on its length: here each has the same length, and a block that a
    row does not see changes nothing of it. Running largest score: Milakov & Gimelshein 2018, algorithm 3. One
    query of many rows and heads, which sees most blocks, has them all at once.
    """
    (B, T, K, G, H), S = q_BTKGH.shape, k_BSKH.shape[1]
    behind = max(-S % BLOCK, 2 * BLOCK - S)  # a loop over one block would cut nothing, and be compiled otherwise
    if behind:
        k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, behind), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
        mask_BTS = jnp.pad(mask_BTS, ((0, 0), (0, 0), (0, behind)))
        bias_BNTS = None if bias_BNTS is None else jnp.pad(bias_BNTS, ((0, 0), (0, 0), (0, 0), (0, behind)))

    if T == 1 and bias_BNTS is None and B * K * G * 2 * BLOCK >= LARGE:
        return _attend_blocks(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, scale, cap)

    # A block at a time out of the arrays as the cache has them: else all of them would be turned before the loop.
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def one(i, carry):
        largest_BKGT, total_BKGT, out_BTKGH = carry
        k, v, mask, bias = (x if x is None else jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis)
                            for x, axis in ((k_BKSH, 2), (v_BKSH, 2), (mask_BTS, 2), (bias_BNTS, 3)))  # fmt: skip
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        x = scores(q_BTKGH, k, mask, scale, cap, bias)
        largest = jnp.maximum(largest_BKGT, x.max(-1))
        kept, powers = jnp.exp(largest_BKGT - largest), jnp.exp(x - largest[..., None])
        more = jnp.einsum("BKGTS,BSKH->BTKGH", powers.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = out_BTKGH * kept.transpose(0, 3, 1, 2)[..., None] + more
        return largest, total_BKGT * kept + powers.sum(-1), out

    last = jnp.max(jnp.where(mask_BTS, jnp.arange(1, S + behind + 1), 0))
    start = jnp.full((B, K, G, T), MASKED), jnp.zeros((B, K, G, T)), jnp.zeros((B, T, K, G, H))
    _, total, out = jax.lax.fori_loop(0, -(-last // BLOCK), one, start)
    seen = mask_BTS.any(-1)[:, :, None, None]
    return (out * (seen / jnp.where(seen, total.transpose(0, 3, 1, 2), 1))[..., None]).astype(v_BSKH.dtype)


def attend(q_BTNH, k_BSKH, v_BSKH, sight: Sight, scale=None, cap: float = 0.0, window: int = 0, bias=None):
    """-> [B,T,N,H]. N / K query heads share a kv-head.

    Without a cache the queries go in chunks that meet only the keys from `window` before their start up to their end
    plus `sight.reach`, so that the causal half is never computed and no T x S array is made.
    scale, cap: those of `scores`. bias: distance [B,T,S] -> what is added to the scores [B,N,T,S].
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    if not S:  # a memory without media: there is no largest score
        return jnp.zeros_like(q_BTNH)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if sight.pages is not None:
        of = sight.of_pages()
        mask_PS, bias_PNS = visible(of, window)[:, 0], None if bias is None else bias(distance(of))[:, :, 0]
        out = _attend_pages(q_BTKGH[sight.pages.owner, 0], k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask_PS,
                            sight.pages.table, scale, cap, bias_PNS)  # fmt: skip
        return out.astype(v_BSKH.dtype).reshape(B, T, N, H)
    chunk = CHUNK if sight.cursor is None else T
    how, out = _attend_alone if sight.alone else _attend, []
    for start in range(0, T, chunk):
        rows, keys = slice(start, min(start + chunk, T)), slice(0, S)
        if sight.cursor is None:
            keys = slice(max(start - window + 1, 0) if window else 0, min(rows.stop + sight.reach, S))
        part = sight.part(rows, keys)
        bias_BNTS = None if bias is None else bias(distance(part))
        mask = visible(part, window)
        out.append(how(q_BTKGH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], mask, scale, cap, bias_BNTS))
    return (jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]).reshape(B, T, N, H)
