"""The articles' own formulas, against numpy worked by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.text import TextEmbed
from gpt4v_jax.training import objectives
from gpt4v_jax.training import step as step_lib

Q, K = [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]  # three tokens of one dimension each


def weights(scale):
    everything = jnp.ones((1, 3, 3), bool)
    q, k = jnp.array(Q).reshape(1, 3, 1, 1, 1), jnp.array(K).reshape(1, 3, 1, 1)
    return np.asarray(attention.weights(q, k, everything, scale)[0, 0, 0])


def by_hand(scale):
    e = np.exp(scale)  # the scores are Q K^T = [[0, 1, 1], [0, 0, 0], [0, 1, 1]]
    row = [1 / (1 + 2 * e), e / (1 + 2 * e), e / (1 + 2 * e)]
    return np.array([row, [1 / 3, 1 / 3, 1 / 3], row])


@pytest.mark.parametrize("scale", [1.0, 3**-0.5])
def test_attention_weights(scale):
    np.testing.assert_allclose(weights(scale), by_hand(scale), rtol=1e-6)
    np.testing.assert_allclose(weights(scale).sum(-1), 1, rtol=1e-6)


def test_weights_that_the_article_prints_are_no_weights():
    printed = np.array([[1 / 3, 0, 2 / 3], [0, 1 / 3, 0], [1 / 3, 0, 1 / 3]])
    assert not np.allclose(printed.sum(-1), 1)
    assert not any(np.allclose(printed, weights(scale), atol=0.05) for scale in (1.0, 3**-0.5))


@pytest.mark.parametrize("scale", [1.0, 3**-0.5])
@pytest.mark.parametrize("value", [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
def test_attention_output(scale, value):
    e = np.exp(scale)
    expected = {1.0: [1, 1, 1], 3.0: [(1 + 5 * e) / (1 + 2 * e), 2, (1 + 5 * e) / (1 + 2 * e)]}[value[2]]
    np.testing.assert_allclose(weights(scale) @ value, expected, rtol=1e-6)
    if scale == 1:  # which is 1 / sqrt(H) of one-dimensional heads: the model's own function
        one = jnp.ones((1, 3), jnp.int32)
        q, k, v = (jnp.array(x).reshape(1, 3, 1, 1) for x in (Q, K, value))
        output = attention.attend(q, k, v, attention.Sight(one, one, one, one, reach=2))
        np.testing.assert_allclose(output.ravel(), expected, rtol=1e-6)


def test_cross_modal_attention():
    """Two text queries over three picture keys, which lie before them."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(n, 4)).astype(np.float32) for n in (2, 3, 3))
    scores = np.exp(q @ k.T / np.sqrt(4))
    expected = scores / scores.sum(-1, keepdims=True) @ v
    document = jnp.ones((1, 3), jnp.int32)
    sight = attention.Sight(document[:, :2], document[:, :2] * 2, document, document, reach=3)
    output = attention.attend(*(jnp.array(x)[None, :, None] for x in (q, k, v)), sight)
    np.testing.assert_allclose(output[0, :, 0], expected, rtol=1e-5)


def test_autoregressive_factorisation():
    """log p(x_1 x_2 x_3 | x_0) is the sum of the tokens' log-probabilities, each given the tokens before it alone; and
    p so made is a distribution: it sums to 1 over all sequences."""
    V, T = 4, 3
    model = config.Model(vocab=V, context=T, init_std=0.5, backbone=config.Backbone(depth=1, width=16, heads=2))
    model = GPT4V(model, batch_lib.layout(model, config.Data()))
    params = step_lib.init_params(model, 0)
    sequences = np.array([[0, *rest] for rest in itertools.product(range(V), repeat=T)], np.int32)
    batch = batch_lib.empty(model.layout, len(sequences)).replace(
        tokens=sequences[:, :-1], target=sequences[:, 1:], document=np.ones((V**T, T), np.int32),
        weight=np.ones((V**T, T), np.float32), position=np.broadcast_to(np.arange(T)[:, None], (V**T, T, 1)),
    )  # fmt: skip
    forward = jax.jit(lambda b: step_lib.forward(model, params, b))
    log_p = -objectives.of_logits(forward(batch), batch.target)[0].sum(1)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-5)

    chain = np.ones(len(sequences))
    for t in range(T):  # what comes after token t is hidden, as if it were not there yet
        given = batch.replace(document=np.where(np.arange(T) <= t, batch.document, 0))
        p = jax.nn.softmax(forward(given)[:, t])
        chain *= p[np.arange(len(p)), sequences[:, t + 1]]
    np.testing.assert_allclose(log_p, np.log(chain), rtol=1e-5)

    total, tokens = objectives.tokens(objectives.of_logits(forward(batch), batch.target), batch)["loss"]
    assert float(total) == pytest.approx(-np.log(chain).sum(), rel=1e-5)
    assert tokens == len(sequences) * T


def test_cross_entropy():
    logits = np.array([[[2.0, 1.0, 0.0], [0.5, 0.5, 0.5]]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = objectives.of_logits(jnp.array(logits), jnp.array([[0, 2]]))[0]
    np.testing.assert_allclose(nats, [[-np.log(p[0, 0, 0]), np.log(3)]], rtol=1e-6)


def test_h0_is_embedding_plus_position():
    model = config.Model(vocab=7, context=5, position="learned", backbone=config.Backbone(width=8, heads=2))
    batch = batch_lib.empty(batch_lib.layout(model, config.Data()), 1)
    position = np.array([0, 1, 2, 0, 1])  # two documents
    batch = batch.replace(tokens=np.array([[3, 1, 3, 6, 0]], np.int32), position=position[None, :, None])
    embed = TextEmbed(model)
    variables = embed.init(jax.random.key(0), batch, None)
    tables = variables["params"]
    expected = tables["embed"]["table"][batch.tokens[0]] + tables["position"]["table"][position]
    np.testing.assert_array_equal(embed.apply(variables, batch, None).x[0], expected)
    assert not np.allclose(expected[0], expected[2])  # the same token elsewhere is another vector
