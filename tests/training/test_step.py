"""The step: however it is computed it is the same step, and a bad batch leaves no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

MODEL = tiny.make_config(depth=5, pattern=("global", "local"), window=6, dropout=0.2, encoder=True)
LAYOUT = tiny.make_module(MODEL).layout
# Rows of unequal weight: 1 to 13 trained tokens.
TEXTS = [("I U2 A3", "U1 I A2"), ("U3 A13",), ("I I U1 A5",), ("U1 A1",), ("U2 A9", "U1 A2"), ("I U4 A2",), ("U1 A12",),
         ("U9 A1",)]  # fmt: skip
BATCH = tiny.rows(LAYOUT, *TEXTS)
KEYS = step_lib.row_keys(0, 3, len(TEXTS))


def distance(a, b):
    """Norm of the difference of two trees, relative to the norm of the second."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


@functools.cache
def gradients(compute: config.Compute, model: config.Model = MODEL):
    params = tiny.make_model(model)[1]
    module = GPT4V(model, LAYOUT, compute)
    return jax.jit(lambda params: step_lib.gradients(module, params, BATCH, KEYS))(params)


def soak(*values):
    return [pytest.param(value, marks=pytest.mark.soak) for value in values]


@pytest.mark.parametrize("changes", [
    {"accumulate": 2, "remat": "minimal", "vocab_chunks": 5}, {"accumulate": 4, "remat": "full", "scan": 1},
    *soak({"scan": 1}, {"scan": 2}, {"remat": "minimal"}, {"remat": "full", "scan": 1}, {"remat": "offload"},
          {"accumulate": 2}, {"remat": "offload", "scan": 2}, {"vocab_chunks": 5}, {"accumulate": 8},
          {"remat": "minimal", "vocab_chunks": 5}, {"accumulate": 2, "remat": "offload", "vocab_chunks": 3}),
], ids=str)  # fmt: skip
def test_every_way_to_compute_a_step_is_the_same_step(changes, shown):
    """With dropout, an encoder, pictures, two kinds of blocks, and a last block beside whole periods."""
    values, weight, grads = gradients(config.Compute(**changes))
    plain_values, plain_weight, plain = gradients(config.Compute())
    assert float(weight) == float(plain_weight) == BATCH.weight.sum()
    assert abs(values["loss"] - plain_values["loss"]) <= 1e-6 * plain_values["loss"]
    assert float(values["accuracy"]) == pytest.approx(float(plain_values["accuracy"]), abs=1e-6)
    assert distance(grads, plain) <= 1e-6
    said = ", ".join(f"{key} {value}" for key, value in changes.items())
    shown(f"gradients with {said}: difference, relative to their norm", f"{distance(grads, plain):.1e}", "1e-06")


@pytest.mark.parametrize("remat, scan", [("full", 1), pytest.param("minimal", 0, marks=pytest.mark.soak)])
@pytest.mark.parametrize("changes", [{"buckets": 8, "norm_place": "post"}, *soak({"layer_scale": 0.5})], ids=str)
def test_other_blocks_are_the_same_step(remat, scan, changes):
    compute, model = config.Compute(remat=remat, scan=scan), tiny.make_config(depth=3, dropout=0.1, **changes)
    assert distance(gradients(compute, model)[2], gradients(config.Compute(), model)[2]) <= 1e-6


def test_a_loop_over_blocks_that_read_a_source():
    block = config.Backbone(depth=2, width=16, heads=2, hidden=32)
    cross = dataclasses.replace(block, pattern=("cross",))
    model = config.Model(vocab=tiny.VOCAB, context=8, init_std=0.3, backbone=cross, source=block)
    module = tiny.make_module(model)
    params = step_lib.init_params(module, 0)
    batch = step_lib.batch_lib.empty(module.layout, 2)
    one = np.ones((2, 8), np.int32)
    source = batch.source.replace(tokens=3 * one, document=one)
    batch = batch.replace(document=one, tokens=np.arange(16, dtype=np.int32).reshape(2, 8), source=source)
    forward = jax.jit(step_lib.forward, static_argnums=0)
    plain = forward(module, params, batch)
    looped = forward(GPT4V(model, module.layout, config.Compute(scan=1, remat="full")), params, batch)
    np.testing.assert_allclose(looped, plain, atol=1e-5)
    moved = batch.replace(source=source.replace(tokens=5 * one))
    assert np.abs(plain - forward(module, params, moved)).max() > 1e-2, "the source matters"


def test_compute_in_bfloat16_keeps_parameters_and_gradients_in_float32():
    values, _, grads = gradients(config.Compute(dtype="bfloat16"))
    plain_values, _, plain = gradients(config.Compute())
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}
    assert 1e-6 < abs(values["loss"] - plain_values["loss"]) < 2e-2
    assert 1e-4 < distance(grads, plain) < 5e-2
    module = GPT4V(MODEL, LAYOUT, config.Compute(dtype="bfloat16"))
    params = tiny.make_model(MODEL)[1]
    text = str(jax.make_jaxpr(lambda p: step_lib.gradients(module, p, BATCH, KEYS))(params))
    products = [line for line in text.splitlines() if " dot_general" in line]
    assert products and all("bf16" in line for line in products if "f32[" not in line.split("=")[0]), products


# ---- whole steps


def take_steps(batches, compute=None, watch=None, objective=None, **changes):
    """-> (the state, [metrics]) after a step for each batch."""
    model = tiny.make_config(depth=1)
    run = config.Config(
        batch=8, steps=len(batches), model=model, compute=config.Compute(**compute or {}),
        guard=config.Guard(**watch or {}), objective=config.Objective(**objective or {}),
        optim=config.Optim(**{"lr": 3e-3, "warmup": 3, "final": 0.0} | changes),
    )  # fmt: skip
    module = GPT4V(model, tiny.make_module(model).layout, run.compute)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(module))
    state = step_lib.init_state(module, tx, 0, mesh, keep_ema=run.optim.ema > 0)
    step = step_lib.compile_train_step(module, tx, run, state, mesh)
    history = []
    for batch in batches:
        before = jax.device_get(state)
        state, values = step(state, batch)
        history.append(jax.device_get(values) | {"before": before, "after": jax.device_get(state)})
    return state, history


def losses(history):
    return np.array([values["loss"] for values in history])


def test_z_loss_draws_the_softmax_s_sum_to_one():
    """The loss is both terms, also over micro-batches and pieces of the vocabulary; without it the sum stays large."""
    many = {"accumulate": 2, "vocab_chunks": 3}
    (_, with_it), (_, parts), (_, without) = (
        take_steps([BATCH] * 20, compute, objective={"z_loss": z}) for z, compute in ((0.1, {}), (0.1, many), (0, {}))
    )
    for values in (*with_it, *parts):
        assert values["loss"] == pytest.approx(values["token_loss"] + 0.1 * values["z_loss"], rel=1e-5)
    np.testing.assert_allclose(losses(parts), losses(with_it), rtol=1e-5)
    assert with_it[-1]["z_loss"] < 0.8 * with_it[0]["z_loss"] and "z_loss" not in without[0]


@pytest.mark.parametrize("micro", [2, *soak(8)])
def test_accumulated_steps_equal_whole_ones(micro, shown):
    """With unequal weights: parameters after one step of SGD, and 20 losses of AdamW."""
    (whole, _), (parts, _) = (take_steps([BATCH], {"accumulate": n}, name="sgd", lr=0.1, warmup=0) for n in (1, micro))
    sgd = distance(parts.params, whole.params)
    assert sgd <= 1e-6
    start = tiny.make_model(tiny.make_config(depth=1))[1]
    assert distance(whole.params, start) > 1e-3, "the step does move them"
    (_, whole), (_, parts) = (take_steps([BATCH] * 20, {"accumulate": n}) for n in (1, micro))
    loss = np.abs(losses(parts) - losses(whole)).max()
    assert loss <= 1e-5 and losses(whole)[0] - losses(whole)[-1] > 0.5
    shown(f"8 rows of unequal weight as {micro} x {8 // micro}: parameters after a step of SGD; 20 losses of AdamW",
          f"{sgd:.1e}; {loss:.1e}", "1e-06; 1e-05")  # fmt: skip


def test_the_state_is_given_to_the_next_step():
    state, _ = take_steps([BATCH])
    run = config.Config(batch=8, model=tiny.make_config(depth=1))
    module = tiny.make_module(run.model)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    tx = optim.make(run.optim, 1, step_lib.abstract_params(module))
    state = step_lib.init_state(module, tx, 0, mesh, keep_ema=True)
    leaves = jax.tree.leaves(state)
    step_lib.compile_train_step(module, tx, run, state, mesh)(state, BATCH)
    assert all(x.is_deleted() for x in leaves if x.size > 1)


def test_the_moving_average():
    _, history = take_steps([BATCH] * 3, ema=0.9)
    expected = history[0]["before"].params
    for values in history:
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, values["after"].params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), values["after"].ema, expected)
    assert distance(history[-1]["after"].ema, history[-1]["after"].params) > 1e-4


def test_gradients_of_frozen_parameters_do_not_count():
    """Neither in the norm nor for the guard."""
    (_, [whole]), (_, [part]) = take_steps([BATCH]), take_steps([BATCH], frozen="^(image|text)/")
    assert 0 < part["grad_norm"] < 0.99 * whole["grad_norm"]
    assert part["loss"] == whole["loss"]


# ---- the guard


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_with_nan_changes_nothing_and_is_counted(shown):
    bad = BATCH.replace(weight=np.where(BATCH.weight > 0, np.nan, 0).astype(np.float32))
    clean = [BATCH] * 40
    _, expected = take_steps(clean, ema=0.5)  # one program, so that bits can be compared
    dirty = clean[:12] + [bad, bad] + clean[14:]
    state, history = take_steps(dirty, ema=0.5)
    for values in history[12:14]:
        for part in ("params", "opt_state", "ema"):
            equal(getattr(values["after"], part), getattr(values["before"], part))
        assert not np.isfinite(values["loss"])
    assert [int(values["skipped"]) for values in history[11:15]] == [0, 1, 2, 2]
    assert [int(values["skipped_in_row"]) for values in history[11:15]] == [0, 1, 2, 0]
    assert int(state.watch.seen) == 38 and int(state.step) == 40
    # The losses later are those of a clean run of as many good steps, to the bit.
    np.testing.assert_array_equal(losses(history)[14:], losses(expected)[12:-2])
    later = abs(losses(history)[-1] / losses(expected)[-1] - 1)
    assert later <= 0.01
    shown("2 batches of 40 with NaN: bytes they change; steps counted; last loss against the clean run's",
          f"0; 2; {later:.2%}", "0; 2; 1 %")  # fmt: skip


def test_an_infinite_learning_rate_changes_nothing_and_is_counted(monkeypatch):
    """One that comes from a schedule; in a config it is refused."""
    real = optim.schedule
    monkeypatch.setattr(optim, "schedule", lambda c, steps: lambda i: jnp.where(i == 5, jnp.inf, real(c, steps)(i)))
    _, history = take_steps([BATCH] * 8)
    equal(history[5]["after"].params, history[5]["before"].params)
    assert int(history[-1]["skipped"]) == 3, "the optimizer's count stands, so every later step is skipped, too"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(history[-1]["after"].params))
    with pytest.raises(config.InputError, match="lr=inf must be 0 or more, and finite"):
        config.Optim(lr=float("inf"))


def test_a_loss_spike_of_a_million_is_skipped(monkeypatch, shown):
    """The loss of one step in 40 is a million times as large, and so is its gradient."""
    real = step_lib.token_scores

    def marked(batch, value):
        return batch.replace(token_type=np.full_like(batch.tokens, value))

    def spiked(model, params, batch, keys=None):
        factor = jnp.where(batch.token_type[0, 0] > 0, 1e6, 1.0)
        scores = real(model, params, batch, keys)
        return scores._replace(nats=factor * scores.nats)

    monkeypatch.setattr(step_lib, "token_scores", spiked)
    others = [tiny.rows(tiny.make_module(tiny.make_config()).layout, *TEXTS[i:], *TEXTS[:i]) for i in range(4)]
    clean = [marked(others[i % 4], 0) for i in range(40)]
    dirty = clean[:30] + [marked(BATCH, 1)] + clean[31:]
    (_, expected), (_, history) = (take_steps(batches, watch={"spike": 3.0}) for batches in (clean, dirty))
    assert int(expected[-1]["skipped"]) == 0
    equal(history[30]["after"].params, history[30]["before"].params)
    assert history[30]["loss"] > 1e5 and int(history[-1]["skipped"]) == 1
    later = abs(losses(history)[-1] / losses(expected)[-1] - 1)
    assert later <= 0.01
    shown("1 loss of 40 a million times as large: bytes it changes; steps counted; last loss against the clean run's",
          f"0; 1; {later:.2%}", "0; 1; 1 %")  # fmt: skip
    _, unguarded = take_steps(dirty, clip=0.0, name="sgd")
    assert not np.allclose(losses(unguarded)[-1], losses(expected)[-1], rtol=0.01), "the guard is what helped"


def test_the_guard_waits_until_it_knows_the_loss():
    watch = step_lib.Watch(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))
    for i in range(step_lib.WATCH_START):
        assert not step_lib.spikes(1e6, watch, 2.0), i
        watch = step_lib.watched(watch, 4.0, jnp.bool_(True))
    assert step_lib.spikes(8.01, watch, 2.0) and not step_lib.spikes(7.99, watch, 2.0)
    assert not step_lib.spikes(1e6, watch, 0.0)


# ---- random numbers


def test_a_rows_dropout_depends_on_its_number_alone():
    """Neither on the other rows of the batch nor on how many there are; and it differs between rows and steps."""
    module, params = tiny.make_model(tiny.make_config(dropout=0.5))
    same = tiny.rows(module.layout, *[("U3 A13",)] * 8)
    forward = functools.partial(step_lib.forward, module, params)
    whole = np.asarray(forward(same, KEYS))
    half = np.asarray(forward(jax.tree.map(lambda x: x[2:4], same), KEYS[2:4]))
    four, eight = (jax.random.key_data(step_lib.row_keys(0, 3, rows)) for rows in (4, 8))
    np.testing.assert_array_equal(four, eight[:4])
    np.testing.assert_allclose(half, whole[2:4], atol=1e-5)
    assert not np.allclose(whole[0], whole[1], atol=0.1)
    assert not np.allclose(whole, forward(same, step_lib.row_keys(0, 4, 8)), atol=0.1)
    assert not np.allclose(whole, forward(same, step_lib.row_keys(1, 3, 8)), atol=0.1)


@pytest.mark.parametrize("changes", [{"encoder": True, "embed_norm": True}, {"tied": False, "bias": config.BIASES},
                                     {"depth": 3, "qk_norm": True}, {"size": 0}, {"media": True}],
                         ids=str)  # fmt: skip
def test_another_module_changes_no_others_initial_values(changes):
    few, many = (tiny.make_model(tiny.make_config(**more))[1] for more in ({}, changes))
    few, many = (
        {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (few, many)
    )
    both = [path for path in few if path in many and few[path].shape == many[path].shape]
    assert len(both) >= 8 and few.keys() != many.keys()
    for path in both:
        if "depth" not in changes or not path.endswith(("out/kernel", "down/kernel")):  # scaled by the depth
            np.testing.assert_array_equal(few[path], many[path], err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_every_leaf_of_a_state_has_its_place(name):
    """Moments lie with their parameters; an eighth of nearly all bytes is on each of eight devices."""
    model = tiny.make_config(width=128, hidden=256, depth=1)
    module = tiny.make_module(model)
    tx = optim.make(config.Optim(name=name), 10, step_lib.abstract_params(module))
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((1, 8, 1), sharding.MESH_AXES, axis_types=axes)
    params = step_lib.abstract_params(module)
    state = step_lib.State(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
    places = jax.tree.leaves(step_lib.state_sharding(state, mesh))
    share = [np.prod(place.shard_shape(x.shape)) for x, place in zip(jax.tree.leaves(state), places, strict=True)]
    assert sum(share) <= 1.25 / 8 * sum(x.size for x in jax.tree.leaves(state))
