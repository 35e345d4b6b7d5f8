"""LoRA: what its leaves are, what the model reads, what moves, and that a run with it goes on to the bit."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.training import checkpoint, lora, optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

MODEL = tiny.make_config(depth=1, encoder=True, tied=False, activation="swiglu", kv_heads=1)
MODULE, BASE = tiny.make_model(MODEL)
TEXTS = [("I U2 A3", "U1 I A2"), ("U3 A13",), ("I I U1 A5",), ("U1 A9",)]
BATCH = tiny.rows(MODULE.layout, *TEXTS)
LORA = config.LoRA(rank=2, alpha=4.0, pattern=r"(attention|mlp)/.*kernel$|^image/image/embed/kernel|^text/embed/table")
FLAT = flax.traverse_util.flatten_dict(BASE, sep="/")
FORWARD = jax.jit(functools.partial(step_lib.forward, MODULE))


def flat(params):
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


def test_which_matrices_and_of_which_shapes():
    made = lora.shapes(BASE, LORA)
    block, D, N, H = "lora/backbone/block_0/attention", 16, 2, 8
    assert made[f"{block}/query/kernel/a"] == (D, 2) and made[f"{block}/query/kernel/b"] == (2, N, H)
    assert made[f"{block}/value/kernel/b"] == (2, 1, H)
    assert made[f"{block}/out/kernel/a"] == (N, H, 2) and made[f"{block}/out/kernel/b"] == (2, D)
    assert made["lora/text/embed/table/a"] == (tiny.VOCAB, 2) and made["lora/text/embed/table/b"] == (2, D)
    attention, mlp, stacks = 4, 3, 1 + 1  # matrices of a block, blocks with the encoder's
    assert len(made) == 2 * ((attention + mlp) * stacks + 2)
    assert not any("norm" in path or "head" in path or "connector" in path for path in made)


def test_it_starts_as_the_identity():
    """Bit for bit; a is drawn from (seed, path), and no other parameter's first value changes."""
    params = jax.jit(lambda: step_lib.init_params(MODULE, 0, LORA))()
    for path, x in flat(params).items():
        if path in FLAT:
            np.testing.assert_array_equal(x, FLAT[path], err_msg=path)
        else:
            assert x.any() != path.endswith("/b"), path
    np.testing.assert_array_equal(FORWARD(lora.merged(params, LORA), BATCH), FORWARD(BASE, BATCH))
    fewer = dataclasses.replace(LORA, pattern="block_0/mlp/up")
    few = flat(lora.added(BASE, fewer, 0))
    np.testing.assert_array_equal(few["lora/backbone/block_0/mlp/up/kernel/a"],
                                  flat(params)["lora/backbone/block_0/mlp/up/kernel/a"])  # fmt: skip
    values = np.concatenate([x.ravel() for path, x in flat(params).items() if path.endswith("query/kernel/a")])
    assert values.std() == pytest.approx(0.25, rel=0.2)  # 1 / sqrt(16)
    assert lora.added(BASE, config.LoRA(), 0) is BASE and lora.merged(BASE, config.LoRA()) is BASE


def test_what_is_added_to_a_matrix():
    params = noisy()
    after, leaves = flat(lora.merged(params, LORA)), flat(params)
    assert after.keys() == FLAT.keys()
    for path, x in after.items():
        update = 0.0
        if f"lora/{path}/a" in leaves:
            a, b = (leaves[f"lora/{path}/{name}"].astype(np.float64) for name in "ab")
            update = 4.0 / 2 * (a.reshape(-1, 2) @ b.reshape(2, -1)).reshape(x.shape)
            assert np.abs(update).max() > 0.1
        np.testing.assert_allclose(x, FLAT[path] + update, atol=1e-5, err_msg=path)


def noisy(seed=1):
    """BASE with LoRA's leaves, whose b are not 0."""
    params = lora.added(BASE, LORA, 0)
    rng = np.random.default_rng(seed)
    return params | {"lora": jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), params["lora"])}


def moves(path):
    return path.startswith(("lora/", "image/connector/")) and "block_0/mlp" not in path


def make():
    """-> (the run, its first state, its compiled step). Weight decay would draw all that is not frozen."""
    optimizer = config.Optim(name="muon", lr=3e-3, warmup=3, decay=".", ema=0.9, frozen="block_0/mlp")
    c = dataclasses.replace(LORA, also="^image/connector/")
    run = config.Config(batch=4, steps=20, model=MODEL, lora=c, optim=optimizer)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(MODULE, lora=c), c)
    state = step_lib.init_state(MODULE, tx, 0, mesh, True, c)
    return run, state, step_lib.compile_train_step(MODULE, tx, run, state, mesh)


def test_nothing_else_moves_and_a_run_goes_on_to_the_bit(tmp_path):
    """20 steps, and 10 with 10 more from a checkpoint."""
    run, state, step = make()
    before = jax.device_get(state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for i in range(20):
            if i == 10:
                checkpoints.save(state)
                checkpoints.wait()
            state, values = step(state, BATCH)
        resumed = checkpoints.restore(make()[1], 10)
    for _ in range(10):
        resumed, _ = step(resumed, BATCH)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)

    paths = set(flat(state.params))
    moving = {path for path in paths if moves(path)}
    for after, first in ((state.params, before.params), (state.ema, before.ema)):
        first = flat(first)
        assert {path for path, x in flat(after).items() if (x != first[path]).any()} == moving
    assert optim.moving(run.optim, run.lora, state.params) == sum(flat(state.params)[path].size for path in moving)
    moments = [sharding.path_name(at) for at, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim]
    assert {path for path in paths if any(at.endswith("/" + path) for at in moments)} == moving


def test_the_step_reads_the_sum():
    """Its gradients are those of the sum: by the chain rule, of a the sum's times b, of b a times the sum's."""
    params = noisy()
    grads = functools.partial(jax.jit(step_lib.gradients, static_argnums=(0, 4, 5)), MODULE)
    plain = config.Objective()
    values, _, got = grads(params, BATCH, None, plain, LORA)
    merged_values, _, wanted = grads(lora.merged(params, LORA), BATCH, None, plain, config.LoRA())
    assert float(values["loss"]) == pytest.approx(float(merged_values["loss"]), abs=1e-6)
    got, wanted, leaves = flat(got), flat(wanted), flat(params)
    path = "backbone/block_0/attention/out/kernel"
    a, b = (leaves[f"lora/{path}/{name}"] for name in "ab")
    np.testing.assert_allclose(got[f"lora/{path}/a"], 2 * np.einsum("nhd,rd->nhr", wanted[path], b), atol=1e-5)
    np.testing.assert_allclose(got[f"lora/{path}/b"], 2 * np.einsum("nhd,nhr->rd", wanted[path], a), atol=1e-5)
    assert np.abs(got[f"lora/{path}/b"]).max() > 1e-3


@pytest.mark.parametrize("axes, path, shape, spec", [
    ((1, 2, 1), "lora/backbone/block_0/attention/query/kernel/a", (16, 2), ("fsdp", None)),
    ((1, 2, 1), "params/lora/backbone/block_0/attention/out/kernel/b", (2, 16), (None, "fsdp")),
    ((1, 1, 2), "lora/backbone/block_0/attention/out/kernel/a", (2, 8, 2), ("tensor", None, None)),
    ((1, 1, 2), "opt_state/0/mu/lora/backbone/block_0/attention/query/kernel/b", (2, 2, 8), (None, "tensor", None)),
    ((1, 1, 2), "lora/text/embed/table/a", (32, 2), (None, None)),
])  # fmt: skip
def test_leaves_lie_with_their_matrix(axes, path, shape, spec):
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh(axes, sharding.MESH_AXES, axis_types=kinds)
    assert tuple(sharding.param_sharding(path, shape, mesh).spec) == spec


@pytest.mark.parametrize("path", ["lora/text/new/kernel/a", "lora/backbone/block_0/mlp/up/kernel/c"])
def test_leaves_of_no_known_matrix_are_refused(path):
    with pytest.raises(ValueError, match=f"{path} .* matches no row"):
        sharding.param_dims(path, (16, 2))


@pytest.mark.parametrize("changes, message", [
    ({"pattern": "atention/"}, "lora.pattern='atention/' matches no matrix; there are, for example, text/embed"),
    ({"pattern": "norm"}, "matches no matrix"),
    ({"pattern": "(mlp"}, r"lora.pattern='\(mlp' is not a regular expression"),
    ({"rank": 17}, r"lora.rank=17 is larger than the smaller side of text/embed/table \(32, 16\), 16: lower it"),
    ({"rank": 9}, r"smaller side of image/encoder/block_0/attention/key/kernel \(16, 1, 8\), 8"),
    ({"also": "conector"}, "'conector' matches no parameter"),
])  # fmt: skip
def test_what_is_refused(changes, message):
    c = dataclasses.replace(LORA, **changes)
    with pytest.raises(config.InputError, match=message):
        optim.make(config.Optim(), 1, step_lib.abstract_params(MODULE, lora=c), c)


def test_a_config_that_would_train_nothing():
    for values, message in (
        ({"rank": -1}, "rank=-1 must be 0 or more"), ({"rank": 1, "alpha": 0.0}, "alpha=0.0 with rank=1"),
        ({"also": "head"}, "also='head' needs rank"),
    ):  # fmt: skip
        with pytest.raises(config.InputError, match=message):
            config.LoRA(**values)
    with pytest.raises(config.InputError, match="frozen='lora' matches every parameter that moves"):
        optim.make(config.Optim(frozen="lora"), 1, step_lib.abstract_params(MODULE, lora=LORA), LORA)
