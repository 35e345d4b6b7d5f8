"""The mask law by brute force; attention in chunks, with shared kv-heads, with rope, and where nothing is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax.model import attention


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
    at = jnp.arange(6)[None]

    def scores(shift):
        return jnp.einsum("BTNH,BSNH->BNTS", *(attention.rope(x, at + shift, 100.0) for x in (q, k)))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)
    assert not np.allclose(scores(0), jnp.einsum("BTNH,BSNH->BNTS", q, k), atol=0.1)


def test_rope_by_hand():
    """Dimension i turns with dimension i + H/2, by position x theta^(-2i/H): (x + iy) e^(i angle)."""
    x, at, theta = np.asarray(normal(0, 1, 3, 1, 4)), np.array([[0, 1, 7]]), 100.0
    turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * at[..., None, None] * theta ** -np.array([0, 0.5]))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(attention.rope(jnp.array(x), jnp.array(at), theta), expected, atol=1e-5)


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
