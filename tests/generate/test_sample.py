"""Drawing the next token: the laws of temperature, top-k and top-p on distributions that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.generate import sample

P = np.array([0.5, 0.05, 0.25, 0.15, 0.05])
LOGITS = jnp.log(jnp.array([P, P[::-1]])) + jnp.array([[3.0], [-2.0]])  # logits are free up to a constant


def distribution(**sampling):
    return np.asarray(jax.nn.softmax(sample.restrict(LOGITS, sample.Sampling(**sampling)), axis=-1))


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_a_power(temperature):
    expected = P ** (1 / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=temperature), [expected, expected[::-1]], rtol=1e-5)


@pytest.mark.parametrize("k, kept", [(1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (5, range(5)), (99, range(5))])
def test_top_k(k, kept):
    expected = np.where(np.isin(np.arange(5), kept), P, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=1.0, top_k=k), [expected, expected[::-1]], rtol=1e-5)


@pytest.mark.parametrize("p, kept", [
    (0.01, [0]), (0.49, [0]), (0.51, [0, 2]), (0.74, [0, 2]), (0.76, [0, 2, 3]), (0.99, range(5)), (1.0, range(5)),
])  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    expected = np.where(np.isin(np.arange(5), kept), P, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=1.0, top_p=p), [expected, expected[::-1]], rtol=1e-5)


def test_order_is_temperature_then_k_then_p():
    """At temperature 0.5 the two best hold 0.8 and 0.2 of their mass: 0.75 of it is the first alone. At temperature 1,
    or without the cut to two, it would not be."""
    np.testing.assert_allclose(distribution(temperature=0.5, top_k=2, top_p=0.75)[0], [1, 0, 0, 0, 0])
    assert (distribution(temperature=1.0, top_k=2, top_p=0.75)[0] > 0).sum() == 2
    assert (distribution(temperature=0.5, top_p=0.75)[0] > 0).sum() == 2


def test_draws_follow_the_distribution():
    """20,000 draws: the standard deviation of a share is at most 0.0036."""
    draws = sample.draw(jnp.tile(LOGITS[:1], (20_000, 1)), keys(*range(20_000)), sample.Sampling(1.0, top_k=3))
    shares = np.bincount(np.asarray(draws), minlength=5) / 20_000
    np.testing.assert_allclose(shares, np.array([0.5, 0, 0.25, 0.15, 0]) / 0.9, atol=0.015)
    assert shares[1] == shares[4] == 0


def test_greedy_is_the_argmax_whatever_the_key():
    for seed in range(3):
        drawn = sample.draw(LOGITS, keys(seed, seed), sample.Sampling(0.0))
        assert drawn.tolist() == [0, 4] and drawn.dtype == jnp.int32


def test_a_row_is_drawn_by_its_own_key_alone():
    flat, sampling = jnp.zeros((4, 1000)), sample.Sampling(1.0)
    first = sample.draw(flat, keys(7, 8, 7, 9), sampling).tolist()
    assert first[0] == first[2] and len(set(first)) == 3
    assert sample.draw(flat[:2], keys(9, 7), sampling).tolist() == [first[3], first[0]]


@pytest.mark.parametrize("values, named", [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_p": float("nan")}, "top_p=nan"),
])  # fmt: skip
def test_values_that_mean_nothing(values, named):
    with pytest.raises(config.InputError, match=named):
        sample.Sampling(**values)
