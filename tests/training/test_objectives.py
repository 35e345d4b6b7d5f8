"""Losses are a sum and a weight, which neither padding nor the layout of rows moves."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax.training import objectives
from tests import tiny

MODEL = tiny.make_module(tiny.make_config())
BATCH = tiny.rows(MODEL.layout, ("I U2 A3", "U1 A2"), ("U3 A8",))
LOGITS = np.random.default_rng(0).normal(size=(2, 24, tiny.VOCAB)).astype(np.float32) * 3


def test_next_token_equals_numpy():
    weight = BATCH.weight * np.random.default_rng(1).uniform(0.5, 2, BATCH.weight.shape).astype(np.float32)
    result = objectives.next_token(jnp.array(LOGITS), BATCH.replace(weight=weight))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    nats = hits = total = 0.0
    for b, t in np.ndindex(2, 24):
        nats -= weight[b, t] * np.log(p[b, t, BATCH.target[b, t]])
        hits += weight[b, t] * (p[b, t].argmax() == BATCH.target[b, t])
        total += weight[b, t]
    np.testing.assert_allclose(result["loss"], (nats, total), rtol=1e-5)
    np.testing.assert_allclose(result["accuracy"], (hits, total), rtol=1e-5)


def test_what_is_not_trained_does_not_count():
    """Neither its logits (large ones, too) nor its targets nor more padding move the sums; and none has a gradient."""
    untrained = BATCH.weight == 0
    other = np.where(untrained[..., None], 1e4 * LOGITS, LOGITS)
    batch = BATCH.replace(target=np.where(untrained, 7, BATCH.target))
    expected, result = objectives.next_token(LOGITS, BATCH), objectives.next_token(other, batch)
    padding = objectives.next_token(
        np.concatenate([LOGITS, 5 * LOGITS]), jax.tree.map(lambda x: np.concatenate([x, 0 * x]), BATCH)
    )
    for name in expected:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-6)
        np.testing.assert_allclose(padding[name], expected[name], rtol=1e-6)
    grad = jax.grad(lambda logits: objectives.next_token(logits, BATCH)["loss"][0])(jnp.array(LOGITS))
    np.testing.assert_array_equal((np.asarray(grad) != 0).any(-1), ~untrained)


def test_sums_of_rows_add_up():
    whole = objectives.next_token(LOGITS, BATCH)
    parts = [
        objectives.next_token(LOGITS[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], BATCH)) for i in range(2)
    ]
    for name in whole:
        np.testing.assert_allclose(whole[name], np.add(parts[0][name], parts[1][name]), rtol=1e-5)


def test_large_logits_do_not_overflow():
    nats = objectives.token_nats(jnp.array([[[1e4, 0.0], [-1e4, 0.0]]]), jnp.array([[0, 0]]))
    np.testing.assert_allclose(nats, [[0, 1e4]])
