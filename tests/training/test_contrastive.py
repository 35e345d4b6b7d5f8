"""Pairs of media and texts: the loss by its formula, over micro-batches and devices, and what is no negative."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

KINDS = ("sigmoid", "softmax")
ZERO = (0.0, 0.0)
TEXTS = [("I", "A2"), ("I", "A5"), ("S", "A2"), ("I I", "A4")]  # a medium and its text; two texts are equal


def loss(media, texts, id, kind, learned=ZERO):
    from gpt4v_jax.training import contrastive

    return contrastive.loss((media, texts), np.array(id), learned, kind)


def vectors(n, width=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, n, width))
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def naive(media, texts, id, kind, learned=ZERO) -> float:
    """One pair at a time, in double precision."""
    scale, b = learned
    t = math.exp(math.log(10) + scale) if kind == "sigmoid" else min(math.exp(scale) / 0.07, 100)
    total, pairs = 0.0, [i for i in range(len(id)) if id[i] >= 0]
    for i in pairs:
        others = [j for j in pairs if id[j] != id[i]]
        if kind == "sigmoid":
            total += math.log1p(math.exp(-(t * media[i] @ texts[i] - 10 + b)))
            total += sum(math.log1p(math.exp(t * media[i] @ texts[j] - 10 + b)) for j in others)
        else:
            for one, all in ((media[i], texts), (texts[i], media)):
                powers = [math.exp(t * one @ all[j]) for j in (i, *others)]
                total -= math.log(powers[0] / sum(powers)) / 2
    return total / len(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_its_paper(kind):
    media, texts = vectors(7)
    for id in (range(7), [0, 1, 0, 2, 3, 1, 0], [4, -1, 2, -1, 2, 1, 0]):
        for learned in (ZERO, (0.3, 0.5), (4.0, 0.0)):
            expected = naive(media, texts, list(id), kind, learned)
            np.testing.assert_allclose(loss(media, texts, id, kind, learned), expected, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_sigmoid_s_first_value(n):
    """With t = 10, b = -10: where all are orthogonal log(1 + e^10) for the own text, log(1 + e^-10) for each other; of
    an own text that is the medium's very vector, log 2."""
    zeros, eye = np.zeros((n, 2 * n)), np.eye(2 * n)
    others = (n - 1) * math.log1p(math.exp(-10))
    apart = loss(eye[:n], eye[n:], range(n), "sigmoid")
    np.testing.assert_allclose(apart, math.log1p(math.exp(10)) + others, rtol=1e-6)
    np.testing.assert_allclose(loss(zeros, zeros, range(n), "sigmoid"), apart, rtol=1e-6)
    np.testing.assert_allclose(loss(eye[:n], eye[:n], range(n), "sigmoid"), math.log(2) + others, rtol=1e-6)


def test_softmax_s_first_value():
    """All alike: the log of the number of texts; a temperature beyond 100 is 100, and can come back."""
    import jax

    np.testing.assert_allclose(loss(np.ones((6, 4)) / 2, np.ones((6, 4)) / 2, range(6), "softmax"), math.log(6), 1e-6)
    media, texts = vectors(4)
    at, by = jax.value_and_grad(lambda s: loss(media, texts, range(4), "softmax", (s, 0.0)))(9.0)
    hot = loss(media, texts, range(4), "softmax", (math.log(100 * 0.07), 0.0))
    np.testing.assert_allclose(at, hot, rtol=1e-5)
    assert abs(by) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_equal_texts_are_no_negatives_and_padding_does_not_count(kind):
    import jax

    media, texts = vectors(5)
    texts[3] = texts[1]
    id = np.array([0, 1, 2, 1, -1])

    def of(media, texts):
        return loss(media, texts, id, kind)

    value, grads = jax.value_and_grad(of, (0, 1))(media, texts)
    assert all(not np.asarray(g)[4].any() and np.asarray(g)[:4].any(1).all() for g in grads)
    np.testing.assert_allclose(value, loss(media[:4], texts[:4], id[:4], kind), rtol=1e-6)
    assert value < loss(media[:4], texts[:4], range(4), kind) - 0.01, "as negatives they would count"
    nothing, grads = jax.value_and_grad(lambda m: loss(m, texts, [-1] * 5, kind))(media)
    assert nothing == 0 and not np.asarray(grads).any()


# ---- of a model


@functools.cache
def case():
    """-> (config.Model, Layout, a Batch of 8 rows: pairs of pictures and sounds with texts, captions beside them, one
    sound that cannot be read)."""
    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax.data import chat, packing
    from gpt4v_jax.data.transforms import BadMedium
    from tests import tiny

    model = tiny.make_config(depth=1, dropout=0.2, media=True)
    model = dataclasses.replace(model, video=tiny.config.Video(), embed=8)
    layout = batch_lib.layout(model, dataclasses.replace(tiny.DATA, image=tiny.config.Budget(3)))
    read = tiny.reader(layout)

    def reads(medium):
        if medium.key == bad:
            raise BadMedium("torn")
        return read(medium)

    rows = []
    for k in range(8):
        media, text = TEXTS[k % 4]
        pair = chat.pair(tiny.pieces(media, seed=k), tiny.pieces(text, seed=k % 4 % 2), tiny.SPECIAL, layout)
        rows.append([pair, *([tiny.document("I U1 A2", layout, seed=k)] if k % 2 and k % 4 != 3 else [])])
    bad = rows[6][0].media[0][1].key
    return model, layout, packing.stack([packing.fill(row, reads, layout) for row in rows])


def test_pairs_in_a_row():
    from gpt4v_jax.data import chat, packing
    from gpt4v_jax.data.transforms import BadMedium
    from tests import tiny

    model, layout, batch = case()
    assert layout.pairs == 5 and batch.pair.id.shape == (8, 5)
    for b in range(8):
        media, text = TEXTS[b % 4]
        n = 2 + sum({"I": 4, "S": 3}[medium] for medium in media.split())
        assert (batch.pair.id[b, 0] >= 0) == (b != 6) and (batch.pair.id[b, 1:] == -1).all()
        if b == 6:
            assert not batch.document[b, :n].any()
            continue
        assert batch.pair.text[b, 0] == n + 1 + int(text[1:])
        assert batch.pair.medium[b, 0] == n - 1 and len(set(batch.document[b, :n])) == 1
        assert batch.tokens[b, batch.pair.text[b, 0]] == 1 and batch.document[b, n] not in batch.document[b, :n]
        assert (batch.position[b, n : n + 2, 0] == (0, 1)).all() and not batch.weight[b, : batch.pair.text[b, 0]].any()
    torn, whole = (chat.pair(tiny.pieces("I", seed=k), tiny.pieces("A2"), tiny.SPECIAL, layout) for k in (0, 1))

    def read(medium):
        if medium == torn.media[0][1]:
            raise BadMedium("torn")
        return tiny.reader(layout)(medium)

    id = packing.fill([torn, whole], read, layout).pair.id
    assert id[0] == -1 < id[1] and id[2] == -1, "the second stays the second"
    id = batch.pair.id[:, 0]
    assert id[0] == id[2] == id[4] and id[1] == id[5] and len(set(id.tolist())) == 4


def test_an_embedding_is_that_of_its_document_alone():
    """Nor is a text's another where other documents stand in its row, nor does it know its medium."""
    import jax

    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import step as step_lib

    model, layout, batch = case()
    module = GPT4V(model, layout)
    params = step_lib.init_params(module, 0)
    embed = jax.jit(step_lib.make_embed_step(module))
    media, texts = embed(params, batch)
    np.testing.assert_allclose(np.linalg.norm(media, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(texts[0, 0], texts[2, 0], atol=1e-5)
    assert np.abs(texts[0, 0] - texts[1, 0]).max() > 0.01 < np.abs(media[0, 0] - media[1, 0]).max()
    dark = batch.replace(image=batch.image.replace(patch=batch.image.patch // 2))
    np.testing.assert_array_equal(embed(params, dark)[1], texts)
    assert np.abs(embed(params, dark)[0] - media)[:6, 0].max() > 1e-3


def gradients(kind, compute, batch=None):
    import jax

    from gpt4v_jax import config
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import step as step_lib

    model, layout, given = case()
    module = GPT4V(model, layout, config.Compute(**compute))
    params = jax.jit(lambda: step_lib.init_params(module, 0))()
    objective = config.Objective(contrastive=0.7, contrastive_loss=kind, z_loss=0.01)
    keys = step_lib.row_keys(0, 3, 8)
    return jax.jit(lambda p, b: step_lib.gradients(module, p, b, keys, objective))(params, batch or given)


@pytest.mark.parametrize("kind", ["sigmoid", pytest.param("softmax", marks=pytest.mark.soak)])
def test_accumulated_equals_whole(kind, shown):
    """With dropout, texts that are equal in two micro-batches, and captions beside the pairs."""
    import jax
    import jax.numpy as jnp
    import optax

    whole, _, plain = gradients(kind, {})
    assert whole["loss"] == pytest.approx(whole["token_loss"] + 0.01 * whole["z_loss"] + 0.7 * whole["contrastive"])
    assert {"loss", "accuracy", "token_loss", "z_loss", "contrastive"} == set(whole)
    parts, _, summed = gradients(kind, {"accumulate": 4})
    for name in whole:
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-6), name
    distance = float(optax.tree.norm(jax.tree.map(jnp.subtract, summed, plain)) / optax.tree.norm(plain))
    assert distance <= 1e-6
    assert abs(plain["pair_scale"]["value"]) > 1e-4 and (abs(plain["pair_bias"]["value"]) > 1e-4) == (kind == "sigmoid")
    shown(f"pairs of 8 rows as 4 x 2, {kind}: gradients, relative to their norm", f"{distance:.1e}", "1e-06")


def test_pairs_alone_are_an_objective():
    """Without a trained token the rest of the loss is 0, not 0 / 0."""
    batch = case()[2]
    values, weight, grads = gradients("sigmoid", {}, batch.replace(weight=0 * batch.weight))
    assert weight == 0 and values["token_loss"] == 0 and np.isfinite(values["loss"]) and values["contrastive"] > 1
    assert np.isfinite(grads["projection"]["kernel"]).all() and np.abs(grads["projection"]["kernel"]).max() > 0


@pytest.mark.parametrize("kind", ["sigmoid", pytest.param("softmax", marks=pytest.mark.soak)])
def test_eight_devices_equal_one(kind, shown):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_contrastive", kind], cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, many = json.loads(done.stdout)
    worst = max(abs(a / b - 1) for a, b in zip(many, one, strict=True))
    assert worst <= 1e-5, (one, many)
    shown(f"pairs over 8 devices against one, {kind}: loss on pairs and gradient norm, relative", f"{worst:.1e}",
          "1e-05")  # fmt: skip


def main(kind: str) -> None:
    """-> stdout, as JSON: the loss's value and the gradient's norm on one device and on eight."""
    import jax
    import optax

    from gpt4v_jax import config, sharding

    out, many = [], {"sigmoid": ((8, 1, 1), 1), "softmax": ((2, 2, 2), 2)}
    for shape, micro in (((1, 1, 1), 1), many[kind]):
        mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: math.prod(shape)])
        jax.set_mesh(mesh)
        placed = sharding.put_batch(case()[2], mesh)
        values, _, grads = gradients(kind, {"accumulate": micro}, placed)
        out.append((float(values["contrastive"]), float(optax.tree.norm(grads))))
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
