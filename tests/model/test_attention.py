"""The mask law by brute force; attention in chunks, with shared kv-heads, with rope, and where nothing is seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.model import attention
from tests import tiny


def normal(seed, *shape):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sight_of(ar, document, reach=0):
    document = jnp.array([document], jnp.int32)
    step = jnp.cumsum(jnp.array([ar]), axis=1)
    return attention.Sight(document, step, document, step, reach=reach)


def plain(q, k, v, sight):
    """Attention in one piece, in numpy: softmax over the visible keys alone."""
    mask = np.asarray(attention.visible(sight))
    q, k, v = map(np.asarray, (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    out = np.zeros(q.shape, np.float32)
    for b, t, n in np.ndindex(*q.shape[:3]):
        if mask[b, t].any():
            score = k[b, mask[b, t], n] @ q[b, t, n] / np.sqrt(q.shape[3])
            p = np.exp(score - score.max())
            out[b, t, n] = p / p.sum() @ v[b, mask[b, t], n]
    return out


def test_mask_law():
    rng = np.random.default_rng(0)
    q_document, k_document = rng.integers(0, 3, (2, 9)), rng.integers(0, 3, (2, 11))
    q_step, k_step = rng.integers(0, 5, (2, 9)), rng.integers(0, 5, (2, 11))
    mask = np.asarray(attention.visible(attention.Sight(*map(jnp.array, (q_document, q_step, k_document, k_step)))))
    for b, i, j in np.ndindex(2, 9, 11):
        sees = q_document[b, i] == k_document[b, j] != 0 and k_step[b, j] <= q_step[b, i]
        assert mask[b, i, j] == sees, (b, i, j)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_chunked_equals_whole(chunk, monkeypatch):
    """13 positions; a block of 4 lies across the borders of chunks, and two documents and padding, too."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    sight = sight_of([1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1], [1] * 7 + [2] * 5 + [0], reach=3)
    q, k, v = normal(0, 1, 13, 2, 4), normal(1, 1, 13, 2, 4), normal(2, 1, 13, 2, 4)
    np.testing.assert_allclose(attention.attend(q, k, v, sight), plain(q, k, v, sight), atol=2e-6)


@pytest.mark.parametrize("T", [64, 100])
def test_any_length(T):
    sight = sight_of([True] * T, [1] * T)
    q, k, v = normal(0, 1, T, 2, 4), normal(1, 1, T, 1, 4), normal(2, 1, T, 1, 4)
    np.testing.assert_allclose(attention.attend(q, k, v, sight), plain(q, k, v, sight), atol=2e-6)


def test_grouped_queries_are_repeated_heads():
    sight = sight_of([True] * 6, [1] * 6)
    q, k, v = normal(0, 1, 6, 6, 4), normal(1, 1, 6, 2, 4), normal(2, 1, 6, 2, 4)
    repeated = attention.attend(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), sight)
    np.testing.assert_allclose(attention.attend(q, k, v, sight), repeated, atol=1e-6)


def test_rope_sees_distances_only():
    q, k = normal(0, 1, 6, 2, 8), normal(1, 1, 6, 2, 8)
    at = jnp.arange(6)[None, :, None]

    def scores(shift):
        return jnp.einsum("BTNH,BSNH->BNTS", *(attention.rope(x, at + shift, 100.0) for x in (q, k)))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)
    assert not np.allclose(scores(0), jnp.einsum("BTNH,BSNH->BNTS", q, k), atol=0.1)


def test_rope_by_hand():
    """Dimension i turns with dimension i + H/2, by position x theta^(-2i/H): (x + iy) e^(i angle)."""
    x, at, theta = np.asarray(normal(0, 1, 3, 1, 4)), np.array([[0, 1, 7]]), 100.0
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * at[..., None, None] * theta ** -np.array([0, 0.5]))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(attention.rope(jnp.array(x), jnp.array(at)[..., None], theta), expected, atol=1e-5)


# ---- windows, caps, biases


def by_hand(q, k, v, mask, scale, cap=0.0, bias=None):
    """softmax(cap tanh(scale q k / cap) + bias) v over the visible keys, one query and one head at a time."""
    q, k, v = map(np.asarray, (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    out = np.zeros(q.shape, np.float32)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            score = k[b, seen, n] @ q[b, t, n] * scale
            score = cap * np.tanh(score / cap) if cap else score
            score = score + (bias[b, n, t, seen] if bias is not None else 0)
            p = np.exp(score - score.max())
            out[b, t, n] = p / p.sum() @ v[b, seen, n]
    return out


@pytest.mark.parametrize("chunk", [3, 4, 64])
@pytest.mark.parametrize("window", [1, 5, 13])
def test_a_window_counts_positions_of_the_row(chunk, window, monkeypatch):
    """A query sees `window` positions, its own included, and never another document's."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    document = np.array([[1] * 6 + [2] * 6 + [0]])
    sight = attention.within(jnp.array(document), jnp.arange(13)[None], reach=0)
    q, k, v = (normal(i, 1, 13, 2, 4) for i in range(3))
    i, j = np.indices((13, 13))
    mask = (document[0, i] == document[0, j]) & (document[0, i] > 0) & (j <= i) & (i - j < window)
    out = jax.jit(lambda *qkv: attention.attend(*qkv, sight, window=window))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, mask[None], 0.5), atol=2e-6)


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_window_of_a_bidirectional_stream_looks_both_ways(chunk, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    sight = attention.bidirectional(jnp.ones((1, 10), jnp.int32))
    q, k, v = (normal(i, 1, 10, 2, 4) for i in range(3))
    i, j = np.indices((10, 10))
    out = jax.jit(lambda *qkv: attention.attend(*qkv, sight, window=3))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, (abs(i - j) < 3)[None], 0.5), atol=2e-6)


def test_a_window_in_a_cache_with_holes():
    """Slots of padding between prompt and answer are no positions: the window reaches over them."""
    document = np.array([[1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
    index, step = np.cumsum(document, axis=1), np.tile(np.arange(8), (2, 1))
    sight = attention.Sight(
        *map(jnp.array, (document[:, 6:7], step[:, 6:7], document, step, index[:, 6:7], index)), cursor=6
    )
    q, k, v = normal(0, 2, 1, 2, 4), normal(1, 2, 8, 1, 4), normal(2, 2, 8, 1, 4)
    mask = np.zeros((2, 1, 8), bool)
    mask[0, 0, [1, 2, 5, 6]] = mask[1, 0, [3, 4, 5, 6]] = True
    out = attention.attend(q, k, v, sight, window=4)
    np.testing.assert_allclose(out, by_hand(q, k, v, mask, 0.5), atol=2e-6)


@pytest.mark.parametrize("chunk", [3, 64])
def test_scale_cap_and_bias(chunk, monkeypatch):
    """In this order, and the bias by distance, in every chunk; two query heads share a kv-head."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    sight = attention.within(jnp.array([[1] * 8]), jnp.arange(8)[None], reach=0)
    q, k, v = normal(0, 1, 8, 4, 4) * 3, normal(1, 1, 8, 2, 4), normal(2, 1, 8, 2, 4)
    i, j = np.indices((8, 8))
    bias = np.sin(np.arange(4)[:, None, None] + 2.0 * (i - j))[None]

    def bias_of(behind_BTS):
        return jnp.sin(jnp.arange(4)[None, :, None, None] + 2.0 * behind_BTS[:, None])

    out = jax.jit(lambda *qkv: attention.attend(*qkv, sight, scale=0.7, cap=1.5, bias=bias_of))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, (j <= i)[None], 0.7, 1.5, bias), atol=3e-6)
    for other in ((0.5, 1.5, bias), (0.7, 0.0, bias), (0.7, 1.5, None)):
        assert np.abs(by_hand(q, k, v, (j <= i)[None], *other) - out).max() > 0.01, "each of the three matters"


def test_buckets_by_hand():
    """Raffel et al. 2020: half of the buckets for single distances, the others ever wider up to the longest."""
    behind = np.array([-3, -1, 0, 1, 3, 4, 5, 6, 8, 15, 16, 1000])
    # 8 buckets up to 16: 0 1 2 3, then 4 + floor(4 ln(d / 4) / ln 4): 4 from 4, 5 from 5.7, 6 from 8, 7 from 11.3
    assert attention.bucket(jnp.array(behind), 8, 16, False).tolist() == [0, 0, 0, 1, 3, 4, 4, 5, 6, 7, 7, 7]
    # both ways: 4 each, ahead in the upper half; 0 1, then 2 + floor(2 ln(d / 2) / ln 8): 2 from 2, 3 from 5.7
    assert attention.bucket(jnp.array(behind), 8, 16, True).tolist() == [6, 5, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3]


# ---- frequencies of rope


def frequencies(scaling, H=16, theta=10_000.0):
    return attention.frequencies(H, theta, scaling)


BASE = 10_000.0 ** (-np.arange(8) / 8)


def test_plain_and_linear_frequencies():
    plain, factor = frequencies(config.RopeScaling())
    np.testing.assert_allclose(plain, BASE, rtol=1e-6)
    linear, linear_factor = frequencies(config.RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, BASE / 4, rtol=1e-6)
    assert factor == linear_factor == 1


def test_llama3_frequencies():
    """Wavelengths below original / high stay, above original / low are divided, between them it goes smoothly."""
    original, low, high, factor = 1000, 1.0, 4.0, 8.0
    expected = []
    for f in BASE:
        wavelength = 2 * np.pi / f
        if wavelength < original / high:
            expected.append(f)
        elif wavelength > original / low:
            expected.append(f / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * f / factor + smooth * f)
    kept, divided = (sum(np.isclose(expected, x, rtol=1e-9)) for x in (BASE, BASE / factor))
    assert min(kept, divided, 8 - kept - divided) > 0, "all three are tried"
    found, attention_factor = frequencies(config.RopeScaling("llama3", factor, original, low, high))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert attention_factor == 1


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_frequencies(truncate):
    """Peng et al. 2023, eqs. 17 to 23: a ramp over dimensions between those that turn beta_fast and beta_slow times."""
    original, factor, fast, slow = 1000, 8.0, 32.0, 1.0
    dimension = [16 * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(10_000.0)) for turns in (fast, slow)]
    if truncate:
        dimension = [np.floor(dimension[0]), np.ceil(dimension[1])]
    ramp = np.clip((np.arange(8) - dimension[0]) / (dimension[1] - dimension[0]), 0, 1)
    scaling = config.RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, truncate=truncate)
    found, attention_factor = frequencies(scaling)
    np.testing.assert_allclose(found, ramp * BASE / factor + (1 - ramp) * BASE, rtol=1e-6)
    assert 0 < ((ramp > 0) & (ramp < 1)).sum() < 7
    assert attention_factor == pytest.approx(0.1 * np.log(8) + 1)
    given = config.RopeScaling("yarn", factor, original, attention=1.7, truncate=truncate)
    assert frequencies(given)[1] == 1.7


def test_the_factor_of_yarn_lengthens_what_is_turned():
    x, at = normal(0, 1, 5, 1, 16), jnp.arange(5)[None, :, None]
    turned = attention.rope(x, at, 10_000.0, config.RopeScaling("yarn", 8.0, 1000, attention=1.5))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), 1.5 * np.linalg.norm(x, axis=-1), rtol=1e-5)


# ---- where nothing is seen


def test_a_row_that_sees_nothing_is_zero():
    """In value and in gradient, with no NaN anywhere: padding in front, behind, and a whole row of it."""
    document = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    step = jnp.cumsum(jnp.ones_like(document), axis=1)
    sight = attention.Sight(document, step, document, step)
    q, k, v, probe = (normal(i, 2, 4, 2, 4) for i in range(4))
    blind = np.asarray(document == 0)

    out = np.asarray(attention.attend(q, k, v, sight))
    assert np.isfinite(out).all() and (out[blind] == 0).all() and (out[~blind] != 0).all()
    for grad in jax.grad(lambda *qkv: (attention.attend(*qkv, sight) * probe).sum(), argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(grad).all() and (np.asarray(grad)[blind] == 0).all()
        assert np.abs(np.asarray(grad)[0, 1:3]).max() > 0


# ---- the cache


def test_slots_are_entered_where_each_row_is():
    """[B,S] and [B,K,S,H] alike, by one cursor and by one a row."""
    for shape in ((2, 6), (2, 3, 6, 4)):
        x, new = normal(0, *shape), normal(1, *(2 if n == 6 else n for n in shape))
        for cursor, rows in ((jnp.int32(3), (3, 3)), (jnp.array([0, 4]), (0, 4))):
            expected, written = (np.moveaxis(np.array(y), attention.slots(x), 1) for y in (x, new))
            for b, at in enumerate(rows):
                expected[b, at : at + 2] = written[b]
            found = np.moveaxis(attention.entered(x, new, cursor), attention.slots(x), 1)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "kv_heads", "heads", "width"), [
    (3, 2, 4, 8), (3, 4, 4, 4), (1, 2, 2, 8), (2, 1, 4, 32), (8, 1, 4, 32), (3, 12, 12, 64)
])  # fmt: skip
@pytest.mark.parametrize("biased", [True, False])
def test_alone_no_bit_depends_on_how_many_keys_there_are(rows, kv_heads, heads, width, biased):
    """Of 60 keys in caches of other lengths, beside a row that reaches further and one that sees nothing; and it is
    attention."""
    q = normal(0, rows, 1, heads, width)
    k, v = (normal(i, rows, kv_heads, 60, width) for i in (1, 2))
    found, one, table = [], jnp.ones((rows, 1), jnp.int32), normal(3, 7, heads)

    def bias(behind_BTS):
        return table[behind_BTS % 7].transpose(0, 3, 1, 2)

    @functools.partial(jax.jit, static_argnames="alone")
    def attend(q, k, v, document, alone):
        at = jnp.broadcast_to(jnp.arange(document.shape[1]), document.shape)
        sight = attention.Sight(one, 9999 * one, document, at, 60 * one, at, cursor=60, alone=alone)
        added = bias if biased else None
        return attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sight, cap=5.0, bias=added)

    for slots, far in ((64, False), (100, True), (128, False), (192, True), (1024, True)):
        there = [jnp.pad(x, ((0, 0), (0, 0), (0, slots - 60), (0, 0))) for x in (k, v)]  # as a cache has them
        document = jnp.zeros((rows, slots), jnp.int32).at[:, :60].set(1).at[0, :5].set(0)
        document = document.at[1:2].set(0) if rows > 2 else document
        if far and rows > 1:
            document = document.at[-1, slots - 1].set(1)
        found.append(np.asarray(attend(q, *there, document, True)))
        plain = attend(q, *there, document, False)
        np.testing.assert_allclose(found[-1], plain, atol=2e-6)
    for other in found[1:]:
        np.testing.assert_array_equal(other[: max(rows - 1, 1)], found[0][: max(rows - 1, 1)])


@pytest.mark.parametrize(("kv_heads", "heads", "width"), [(2, 4, 8), (1, 4, 32), (12, 12, 64)])
def test_pages_no_bit_depends_on_where_they_lie(kv_heads, heads, width):
    """Three rows, the last without pages: it is attention, over a window, with biases; and a row's bits are the same
    wherever its pages lie, however many there are and whatever is in those of others."""
    B, S, size, lengths = 3, 24, 8, (19, 5, 0)
    q = normal(0, B, 1, heads, width)
    k, v = (normal(i, B, kv_heads, S, width) for i in (1, 2))
    at = jnp.broadcast_to(jnp.arange(S), (B, S))
    document = (at < jnp.array(lengths)[:, None]).astype(jnp.int32)
    one, end, table = jnp.ones((B, 1), jnp.int32), jnp.array(lengths)[:, None] - 1, normal(3, 7, heads)

    def bias(behind):
        return table[behind % 7].transpose(0, 3, 1, 2)

    def attend(k, v, sight):
        return attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sight, cap=5.0, window=9, bias=bias)

    plain = attend(k, v, attention.Sight(one, end, document, at, end, at, cursor=0))
    found = []
    for P, seed in ((4, 0), (4, 1), (8, 2), (32, 3)):
        drawn = np.random.default_rng(seed)
        own = drawn.permutation(P)[:4]
        pages_of = np.full((B, 3), attention.NOBODY, np.int32)
        pages_of[0], pages_of[1, 0] = own[:3], own[3]
        owner = np.zeros(P, np.int32)
        owner[own] = 0, 0, 0, 1

        def paged(x, fill, pages_of=pages_of, P=P):
            cut = np.split(np.asarray(x), S // size, axis=attention.slots(x))
            new = np.array(fill, np.asarray(x).dtype)
            for row, n in np.argwhere(pages_of < P):
                new[pages_of[row, n]] = cut[n][row]
            return jnp.asarray(new)

        others = drawn.standard_normal((2, P, kv_heads, size, width))
        others[:, -1] = np.nan  # also where it is nobody's
        numbers = (paged(x, np.ones((P, size))) for x in (document, at, at))
        k_document, k_step, k_index = numbers
        sight = attention.Sight(one, end, k_document, k_step, end, k_index, alone=True,
                                pages=attention.Pages(jnp.asarray(pages_of), jnp.asarray(owner)))  # fmt: skip
        found.append(np.asarray(jax.jit(attend)(paged(k, others[0]), paged(v, others[1]), sight)))
    np.testing.assert_allclose(found[0][:2], plain[:2], atol=2e-6)
    assert not found[0][2].any()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_slot_is_entered_in_its_row_s_page():
    """And nowhere, where the row has none."""
    none = attention.NOBODY
    pages = attention.Pages(jnp.array([[2, 0], [1, none], [none, none]]), jnp.zeros(3, jnp.int32))
    cache = attention.empty_cache(tiny.make_config().decoder, 3, 4).replace(cursor=jnp.array([6, 1, 5]), pages=pages)
    for shape in ((3, 4), (3, 2, 4, 5)):
        x, new = normal(0, *shape), normal(1, *(1 if n == 4 else n for n in shape))
        expected, written = np.array(x), np.array(new)
        for row, page, slot in ((0, 0, 2), (1, 1, 1)):
            if x.ndim == 2:
                expected[page, slot] = written[row, 0]
            else:
                expected[page, :, slot] = written[row, :, 0]
        np.testing.assert_array_equal(attention.entered(x, new, cache.place), expected)
