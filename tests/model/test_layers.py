"""Each layer against its formula in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax.model import layers


def made(layer, x, seed=0):
    """-> (output, parameters drawn anew, so that biases and scales are not their initial 0 and 1)."""
    params = layer.init(jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), jnp.float32), params)
    return layer.apply({"params": params}, x), jax.tree.map(np.asarray, params)


X = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize("inputs, outputs, einsum", [
    ((5,), (6,), "abcH,HF->abcF"),
    ((5,), (2, 3), "abcH,HXY->abcXY"),
    ((4, 5), (6,), "abNH,NHD->abD"),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_linear(inputs, outputs, einsum, bias):
    y, params = made(layers.Linear(inputs, outputs, bias), X)
    expected = np.einsum(einsum, X, params["kernel"]) + (params["bias"] if bias else 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_linear_refuses_another_width():
    with pytest.raises(ValueError, match=r"expected \[\.\.\., \(4,\)\], got \(2, 3, 4, 5\)"):
        made(layers.Linear((4,), (6,)), X)


def test_linear_starts_at_unit_scale():
    """Its kernel's standard deviation is gain / sqrt(fan-in), whatever the shape of the inputs."""
    params = layers.Linear((40, 50), (60,), gain=0.5).init(jax.random.key(0), jnp.zeros((1, 40, 50)))["params"]
    assert float(params["kernel"].std()) == pytest.approx(0.5 / np.sqrt(40 * 50), rel=0.01)


def test_norms():
    y, params = made(layers.Norm("rms", 1e-6), X)
    np.testing.assert_allclose(y, X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * params["scale"], atol=1e-5)
    y, params = made(layers.Norm("layer", 1e-6), X)
    mean, deviation = X.mean(-1, keepdims=True), np.sqrt(X.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, (X - mean) / deviation * params["scale"] + params["bias"], atol=1e-5)
    y, params = made(layers.Norm("rms_plus_one", 1e-2), X)
    np.testing.assert_allclose(y, X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2) * (1 + params["scale"]), atol=1e-5)
    zeros = jnp.zeros((1, 4))
    assert (layers.Norm("rms", 1e-6).apply({"params": {"scale": jnp.ones(4)}}, zeros) == 0).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [640, 768])
def test_a_step_s_norm_has_the_same_bits_among_few_rows(kind, width):
    """As among eight: what XLA sums of a few rows alone it sums otherwise."""
    x = jax.random.normal(jax.random.key(0), (8, 1, width))
    of = {name: jax.random.normal(jax.random.key(1), (width,)) for name in ("scale", "bias")[: 1 + (kind == "layer")]}
    norm = jax.jit(lambda x: layers.Norm(kind, 1e-6).apply({"params": of}, x))
    for rows in (1, 2, 4):
        np.testing.assert_array_equal(norm(x[:rows]), norm(x)[:rows])


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one", "layer"])
def test_a_new_norm_scales_by_one(kind):
    layer = layers.Norm(kind, 1e-6)
    y = layer.apply(layer.init(jax.random.key(0), X), X)
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1, atol=1e-4)


@pytest.mark.parametrize("width, shape", [(5, (5,)), (0, ())])
def test_vector(width, shape):
    layer = layers.Vector(width, 3.0)
    value = layer.init(jax.random.key(0))["params"]["value"]
    assert value.shape == shape and (value == 3).all() and (layer.apply({"params": {"value": value + 1}}) == 4).all()
    spread = layers.Vector(4000, 3.0, std=0.5).init(jax.random.key(0))["params"]["value"]
    assert abs(float(spread.mean()) - 3) < 0.04 and abs(float(spread.std()) - 0.5) < 0.03


@pytest.mark.parametrize("activation, act", [
    ("gelu", lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))),
    ("gelu_tanh", lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
    ("relu", lambda x: np.maximum(x, 0)),
    ("silu", lambda x: x / (1 + np.exp(-x))),
    ("swiglu", lambda x: x / (1 + np.exp(-x))),
    ("geglu", lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
])  # fmt: skip
def test_mlp(activation, act):
    x = X[0]
    y, params = made(layers.MLP(7, activation, bias=True), x)
    up = x @ params["up"]["kernel"] + params["up"]["bias"]
    if activation in ("swiglu", "geglu"):
        hidden = up * act(x @ params["gate"]["kernel"] + params["gate"]["bias"])
    else:
        hidden = act(up)
    np.testing.assert_allclose(y, hidden @ params["down"]["kernel"] + params["down"]["bias"], atol=1e-4)


def test_table():
    ids = np.array([[2, 0, 2]])
    layer = layers.Table(3, 4)
    x, params = made(layer, ids)
    np.testing.assert_array_equal(x, params["table"][ids])


def test_dropout():
    x, keys = jnp.ones((200, 200)), jax.random.split(jax.random.key(0), 200)
    y = layers.dropout(x, 0.25, keys, "name")
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert abs(float((y == 0).mean()) - 0.25) < 0.01  # 4.6 standard deviations
    np.testing.assert_array_equal(y, layers.dropout(x, 0.25, keys, "name"))
    others = jax.random.split(jax.random.key(1), 200)
    for other in (layers.dropout(x, 0.25, others, "name"), layers.dropout(x, 0.25, keys, "another")):
        assert 0.3 < float((y != other).mean()) < 0.45  # 2 x 0.25 x 0.75: they have nothing in common
    assert layers.dropout(x, 0.25, None, "name") is x and layers.dropout(x, 0.0, keys, "name") is x
