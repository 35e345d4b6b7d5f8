"""Checkpoints: bit-equal, checked against the model, the best kept beside the newest."""

import functools

import jax
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.training import checkpoint, optim
from gpt4v_jax.training import step as step_lib
from tests import tiny


@functools.cache
def initial(name="adamw", seed=0, **changes):
    model = tiny.make_module(tiny.make_config(**{"depth": 1} | changes))
    tx = optim.make(config.Optim(name=name), 10, step_lib.abstract_params(model))
    return step_lib.init_state(model, tx, seed, sharding.make_mesh(config.Mesh()))


def state_of(step=0, **changes):
    state = initial(**changes)
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def noise(tree):
    """Another tree with random values, so that nothing equals its initial value."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), tree)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restore_is_bit_equal(tmp_path, name):
    state = state_of(step=7, name=name)
    state = state.replace(params=noise(state.params), opt_state=noise(state.opt_state))
    writer = checkpoint.Checkpoints(tmp_path)
    writer.save(state)
    writer.close()
    reader = checkpoint.Checkpoints(tmp_path)
    assert reader.latest() == reader.best() == 7
    fresh = state_of(name=name, seed=1)
    restored = reader.restore(fresh, 7)
    equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, fresh)
    abstract = jax.eval_shape(lambda: fresh.params)
    equal(reader.restore_params(abstract, sharding.make_mesh(config.Mesh()), 7), state.params)
    reader.close()


@pytest.mark.parametrize("changes, first, there, here", [
    ({"hidden": 48}, "backbone/block_0/mlp/down/kernel", r"\(32, 16\)", r"\(48, 16\)"),
    ({"depth": 2}, "backbone/block_1/attention/key/kernel", "absent", r"\(16, 2, 8\)"),
    ({"tied": False}, "head/kernel", "absent", r"\(16, 32\)"),
])  # fmt: skip
def test_another_model_is_refused(tmp_path, changes, first, there, here):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state_of(step=3))
    checkpoints.wait()
    message = f"{tmp_path}.*another model: parameter {first} is {there} there and {here} in this config"
    other = state_of(**changes)
    with pytest.raises(config.InputError, match=message):
        checkpoints.restore(other, 3)
    with pytest.raises(config.InputError, match=message):
        checkpoints.restore_params(jax.eval_shape(lambda: other.params), sharding.make_mesh(config.Mesh()), 3)
    checkpoints.close()


@pytest.mark.parametrize("mode, best", [("max", 2), ("min", 3)])
def test_the_best_is_kept_beside_the_newest(tmp_path, mode, best):
    checkpoints = checkpoint.Checkpoints(tmp_path, "questions/accuracy", mode)
    for step, value in [(1, 0.5), (2, 0.9), (3, 0.1), (4, 0.6), (5, None)]:
        checkpoints.save(state_of(step), {} if value is None else {"questions/accuracy": value, "other": 0.0})
        checkpoints.wait()
    checkpoints.close()
    reader = checkpoint.Checkpoints(tmp_path, "questions/accuracy", mode, read_only=True)
    assert (reader.best(), reader.latest()) == (best, 5)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [best, 5]
    reader.close()


def test_only_the_newest_is_kept_without_a_metric(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_of(step))
    checkpoints.wait()
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_reading_writes_nothing(tmp_path):
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert reader.latest() is None and reader.best() is None
    reader.close()
    assert not list(tmp_path.iterdir())
