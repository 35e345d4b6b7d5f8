"""Schedules, and which parameters an optimizer moves how."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4v_jax import config
from gpt4v_jax.sharding import path_name
from gpt4v_jax.training import optim
from tests import tiny

PARAMS = tiny.make_model(tiny.make_config(encoder=True, tied=False, norm="layer", bias=config.BIASES))[1]
GRADS = jax.tree.map(lambda x: jnp.array(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), PARAMS)


def moved(steps=3, grads=GRADS, **changes):
    """-> {path: what some steps of this optimizer add to the parameter}, in numpy."""
    tx = optim.make(config.Optim(**{"warmup": 0, "schedule": "constant"} | changes), 10, PARAMS)

    @jax.jit
    def run():
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda after, before: after - before, params, PARAMS)

    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(run())}


@pytest.mark.parametrize("kind, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule(kind, middle, warmup):
    lr = optim.schedule(config.Optim(lr=2.0, final=0.1, warmup=warmup, schedule=kind), steps=110)
    if warmup:
        np.testing.assert_allclose([lr(i) for i in range(10)], np.linspace(0.2, 2.0, 11)[:10], rtol=1e-5)
    assert float(lr(warmup)) == pytest.approx(2.0)
    assert float(lr((warmup + 110) // 2)) == pytest.approx(2.0 * middle, rel=1e-5)
    assert float(lr(110)) == pytest.approx(2.0 if kind == "constant" else 0.2, rel=1e-5)


def test_decay_moves_kernels_and_tables_alone():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    changes = moved(steps=1, grads=zero, lr=0.1, weight_decay=0.5)
    flat = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(PARAMS)}
    for path, change in changes.items():
        decays = path.endswith(("kernel", "table"))
        np.testing.assert_allclose(change, -0.05 * flat[path] if decays else 0 * flat[path], rtol=1e-3, atol=1e-6)
    assert sum(path.endswith(("kernel", "table")) for path in changes) not in (0, len(changes))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_bit_equal(name):
    """In spite of gradients, momentum and weight decay."""
    changes = moved(name=name, frozen=r"^image/|embed/table", weight_decay=0.5, lr=0.1)
    for path, change in changes.items():
        frozen = path.startswith("image/") or path.endswith("embed/table")
        assert (change == 0).all() if frozen else (change != 0).any(), path


def test_clip_is_by_the_global_norm():
    """Adam's first step hides the size of a gradient: look at two steps, the second with a much smaller one."""
    tx = optim.make(config.Optim(clip=0.5, name="adamw"), 10, PARAMS)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.global_norm(first_moment)) == pytest.approx(0.5 * 0.1, rel=1e-4)  # (1 - b1) x clipped
    _, state = (tx := optim.make(config.Optim(clip=0.0), 10, PARAMS)).update(GRADS, tx.init(PARAMS), PARAMS)
    unclipped = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.global_norm(unclipped)) == pytest.approx(0.1 * float(optax.global_norm(GRADS)), rel=1e-4)


def test_muon_moves_the_matrices_of_blocks_alone():
    """A Muon update is nearly orthogonal: its singular values lie close together. The rest moves by Adam: in the first
    step every value by about the learning rate, against its gradient."""
    settings = {"steps": 1, "lr": 0.1, "weight_decay": 0.0, "clip": 0.0}
    muon, adam = moved(name="muon", **settings), moved(name="adamw", **settings)
    for path, change in muon.items():
        if path.endswith("kernel") and ("block_" in path or path == "image/image/embed/kernel"):
            inputs = 2 if path.endswith("attention/out/kernel") else 1
            matrix = change.reshape(int(np.prod(change.shape[:inputs])), -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.4 * values.max(), path
            # As large as AdamW's update, so that one learning rate serves both.
            rms = np.sqrt((change**2).mean() / (adam[path] ** 2).mean())
            assert 0.1 < rms < 0.4, path
        else:
            ratio = change / adam[path]  # 1.47: optax's Muon looks ahead (Nesterov) in its Adam, too
            np.testing.assert_allclose(ratio, 1.4737, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("field", ["decay", "frozen"])
def test_a_pattern_that_matches_nothing_is_refused(field):
    with pytest.raises(config.InputError, match="'encodr/' matches no parameter"):
        optim.make(config.Optim(**{field: "encodr/"}), 10, PARAMS)
