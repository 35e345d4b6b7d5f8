"""Losses are a sum and a weight, which neither padding nor the layout of rows moves."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.model.gpt4v import Head
from gpt4v_jax.training import objectives
from tests import tiny

MODEL = tiny.make_module(tiny.make_config())
BATCH = tiny.rows(MODEL.layout, ("I U2 A3", "U1 A2"), ("U3 A8",))
LOGITS = np.random.default_rng(0).normal(size=(2, 24, tiny.VOCAB)).astype(np.float32) * 3


def next_token(logits, batch):
    return objectives.tokens(objectives.of_logits(logits, batch.target), batch)


def test_next_token_equals_numpy():
    weight = BATCH.weight * np.random.default_rng(1).uniform(0.5, 2, BATCH.weight.shape).astype(np.float32)
    result = next_token(jnp.array(LOGITS), BATCH.replace(weight=weight))
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
    expected, result = next_token(LOGITS, BATCH), next_token(other, batch)
    padding = next_token(
        np.concatenate([LOGITS, 5 * LOGITS]), jax.tree.map(lambda x: np.concatenate([x, 0 * x]), BATCH)
    )
    for name in expected:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-6)
        np.testing.assert_allclose(padding[name], expected[name], rtol=1e-6)
    grad = jax.grad(lambda logits: next_token(logits, BATCH)["loss"][0])(jnp.array(LOGITS))
    np.testing.assert_array_equal((np.asarray(grad) != 0).any(-1), ~untrained)


def test_sums_of_rows_add_up():
    whole = next_token(LOGITS, BATCH)
    parts = [
        next_token(LOGITS[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], BATCH)) for i in range(2)
    ]
    for name in whole:
        np.testing.assert_allclose(whole[name], np.add(parts[0][name], parts[1][name]), rtol=1e-5)


def test_large_logits_do_not_overflow():
    nats = objectives.of_logits(jnp.array([[[1e4, 0.0], [-1e4, 0.0]]]), jnp.array([[0, 0]]))[0]
    np.testing.assert_allclose(nats, [[0, 1e4]])


# ---- the vocabulary in pieces


def head_case(vocabulary, bias, cap, tied=False, B=2, T=3, D=8):
    rng = np.random.default_rng(vocabulary)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    kernel = 2 * (draw(vocabulary, D) if tied else draw(D, vocabulary))
    head = Head(kernel, draw(vocabulary) if bias else None, cap, tied)
    return draw(B, T, D), head, jnp.array(rng.integers(0, vocabulary, (B, T)))


@pytest.mark.parametrize("vocabulary, chunks", [(12, 3), (13, 4), (10, 6), (7, 7), (5, 9)])
@pytest.mark.parametrize("bias, cap, tied", [(False, 0.0, True), (True, 0.0, False), (True, 2.0, True)])
def test_pieces_of_the_vocabulary_equal_the_whole(vocabulary, chunks, bias, cap, tied, shown):
    """Values, and gradients of a random projection, also where the last pieces hold padding alone."""
    x, head, target = head_case(vocabulary, bias, cap, tied)
    direction = jnp.array(np.random.default_rng(0).normal(size=target.shape))

    def value(x, head, chunks):
        nats, hit, *_ = objectives.scores(x, head, target, chunks)
        return (nats * direction).sum(), (nats, hit)

    whole, pieces = (jax.value_and_grad(value, (0, 1), has_aux=True)(x, head, n) for n in (1, chunks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, pieces)
    np.testing.assert_array_equal(whole[0][1][1], pieces[0][1][1])
    if (vocabulary, chunks) == (13, 4):
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True)
        worst = max(float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()) for a, b in pairs)
        shown(f"vocabulary 13 in 4 pieces, bias {bias}, cap {cap}, tied {tied}: values and gradients", f"{worst:.1e}",
              "1e-05")  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 4])
def test_z_loss(chunks):
    """By hand, and its gradient, which the pieces have from their own formula: 2 log_sum x softmax x weight."""
    x, head, target = head_case(13, True, 0.0)
    batch = types.SimpleNamespace(weight=jnp.array(np.random.default_rng(3).uniform(0, 2, target.shape)))

    def value(x, head):
        return objectives.tokens(objectives.scores(x, head, target, chunks), batch, z_loss=True)["z_loss"][0]

    logits = np.asarray(head(x), np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    result, (of_x, of_head) = jax.value_and_grad(value, (0, 1))(x, head)
    np.testing.assert_allclose(result, (log_sum**2 * batch.weight).sum(), rtol=1e-5)
    of_logits = (2 * log_sum * np.asarray(batch.weight))[..., None] * np.exp(logits - log_sum[..., None])
    np.testing.assert_allclose(of_x, of_logits @ np.asarray(head.kernel).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_head.bias, of_logits.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_sum_of_terms_with_their_coefficients():
    objective = config.Objective(z_loss=0.5)
    plain = {"loss": 3.0, "accuracy": 0.1}
    assert objectives.total(plain, objective) == plain
    found = objectives.total(plain | {"z_loss": 4.0}, objective)
    assert found == {"loss": 5.0, "token_loss": 3.0, "z_loss": 4.0, "accuracy": 0.1}


def test_of_equal_logits_the_first_is_the_argmax():
    x, head, _ = head_case(12, False, 0.0)
    same = head.replace(kernel=jnp.tile(head.kernel[:, :1], (1, 12)))
    for target in (0, 5):
        targets = jnp.full(x.shape[:2], target)
        hits = [np.asarray(objectives.scores(x, same, targets, chunks)[1]) for chunks in (1, 3)]
        np.testing.assert_array_equal(*hits)
        assert hits[0].all() == (target == 0)


@pytest.mark.parametrize("tied", [True, False])
def test_pieces_of_a_large_vocabulary_take_a_tenth_of_the_memory(tied, shown):
    """Of what XLA reserves for the loss and its gradients beyond their arguments and results."""
    V, D, B, T = 128 * 1024, 64, 2, 256
    kernel = (V, D) if tied else (D, V)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, D), kernel)]
    target = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def memory(chunks):
        def loss(x, kernel, target):
            return objectives.scores(x, Head(kernel, None, 0.0, tied), target, chunks)[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, target).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, pieces = memory(1), memory(32)
    assert whole >= 4 * B * T * V and whole >= 10 * pieces, (whole, pieces)
    shown(f"vocabulary 131,072, {'tied' if tied else 'own'} matrix: memory of loss and gradients, whole / in 32 pieces",
          f"{whole / 2**20:.0f} MiB / {pieces / 2**20:.0f} MiB = {whole / pieces:.1f}", "10")  # fmt: skip
