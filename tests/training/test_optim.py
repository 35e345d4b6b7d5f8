"""Schedules, and which parameters an optimizer moves how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4v_jax import config
from gpt4v_jax.sharding import path_name
from gpt4v_jax.training import optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

NAMES = ["adamw", "adafactor", "lion", "sgd", "muon"]
SOME = [x if x in ("adafactor", "muon") else pytest.param(x, marks=pytest.mark.soak) for x in NAMES]  # the odd ones
SHAPES = {  # one parameter of every sort; Adafactor factors the wide one
    "text/embed/table": (6, 4), "image/connector/kernel": (128, 130),
    "head/kernel": (4, 6), "backbone/block_0/attention/query/kernel": (4, 2, 3),
    "backbone/block_0/attention/out/kernel": (2, 3, 4), "backbone/block_0/cross/out/kernel": (2, 3, 4),
    "backbone/block_0/mlp/up/kernel": (4, 7), "backbone/block_0/mlp_norm/scale": (4,),
}  # fmt: skip
MATRICES = {"query": 4, "out": 6, "up": 4}  # Muon's, by their name: inputs


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return nest({path: jnp.array(scale * rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()})


def nest(flat):
    tree = {}
    for path, x in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = x
    return tree


def flatten(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


PARAMS, GRADS = draw(0), [draw(seed) for seed in (1, 2, 3)]
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def optimizer(steps=10, params=PARAMS, **changes):
    return optim.make(config.Optim(**{"warmup": 0, "schedule": "constant"} | changes), steps, params)


@functools.cache
def compiled(**changes):
    tx = optimizer(**changes)

    def step(carry, g):
        params, _, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), updates, state), None

    # In a loop: unrolled, twenty steps compile for minutes.
    return jax.jit(lambda grads: jax.lax.scan(step, (PARAMS, ZERO, tx.init(PARAMS)), grads)[0])


def run(grads, **changes):
    """-> ({path: parameter after the steps}, {path: last update}, state)"""
    params, updates, state = compiled(**changes)(jax.tree.map(lambda *x: jnp.stack(x), *grads))
    return flatten(params), flatten(updates), state


def moments(state):
    """-> {path: moment}: what an optimizer remembers of gradients."""
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {path: x for path, x in flat.items() if x.ndim and not path.endswith("ns_coeffs")}


# Schedules.


@pytest.mark.parametrize("kind, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule(kind, middle, warmup):
    lr = optim.schedule(config.Optim(lr=2.0, final=0.1, warmup=warmup, schedule=kind), steps=110)
    if warmup:
        np.testing.assert_allclose([lr(i) for i in range(10)], np.linspace(0.2, 2.0, 11)[:10], rtol=1e-5)
    assert float(lr(warmup)) == pytest.approx(2.0)
    assert float(lr((warmup + 110) // 2)) == pytest.approx(2.0 * middle, rel=1e-5)
    assert float(lr(110)) == pytest.approx(2.0 if kind == "constant" else 0.2, rel=1e-5)


@pytest.mark.parametrize("warmup, steps, cooldown, expected", [
    (4, 20, 0.25, {0: 0.5, 3: 1.625, 4: 2, 14: 2, 15: 2, 16: 1.64, 18: 0.92, 20: 0.2}),
    (0, 20, 0.25, {0: 2, 15: 2, 20: 0.2}),
    (0, 20, 0.0, {0: 2, 19: 2}),
    (10, 20, 0.9, {0: 0.2, 9: 1.82, 10: 2, 15: 1.1, 20: 0.2}),  # no room for both: warm-up, then down at once
    (10, 5, 0.2, {0: 0.2, 4: 0.92}),  # the run ends in its warm-up
    (0, 1, 0.2, {0: 2}),
])  # fmt: skip
def test_schedule_wsd(warmup, steps, cooldown, expected):
    c = config.Optim(lr=2.0, final=0.1, warmup=warmup, schedule="wsd", cooldown=cooldown)
    lr = optim.schedule(c, steps)
    assert {i: float(lr(i)) for i in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 1000])
def test_schedule_rsqrt_does_not_know_the_end(steps):
    lr = optim.schedule(config.Optim(lr=2.0, warmup=4, schedule="rsqrt"), steps)
    expected = {0: 0.5, 3: 1.625, 4: 2, 16: 1, 64: 0.5, 400: 0.2}
    assert {i: float(lr(i)) for i in expected} == pytest.approx(expected, rel=1e-5)
    for warmup, expected in ((0, {0: 2, 3: 1, 99: 0.2}), (1, {0: 2, 1: 2, 4: 1})):
        lr = optim.schedule(config.Optim(lr=2.0, warmup=warmup, schedule="rsqrt"), steps)
        assert {i: float(lr(i)) for i in expected} == pytest.approx(expected, rel=1e-5)


# What a step is, in numpy from the papers: (path, [g of step 1, ...]) -> [direction of step 1, ...].


def adamw(path, grads, b1=0.8, b2=0.9, nesterov=False):
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        yield (ahead if nesterov else m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def adafactor(path, grads):
    rows = columns = v = 0.0
    for t, g in enumerate(grads, start=1):
        b2 = 1 - t**-0.8
        v = b2 * v + (1 - b2) * g**2
        if g.shape == (128, 130):
            rows = b2 * rows + (1 - b2) * (g**2).mean(1, keepdims=True)
            columns = b2 * columns + (1 - b2) * (g**2).mean(0, keepdims=True)
            v = rows * columns / rows.mean()
        u = g / np.sqrt(v)
        yield u / max(1.0, np.sqrt((u**2).mean()))


def lion(path, grads, b1=0.8, b2=0.9):
    m = 0.0
    for g in grads:
        yield np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g


def sgd(path, grads, momentum=0.7):
    m = 0.0
    for g in grads:
        m = momentum * m + g
        yield m


def muon(path, grads, momentum=0.7):
    if (inputs := muon_inputs(path)) is None:
        yield from adamw(path, grads, nesterov=True)
        return
    m = 0.0
    for t, g in enumerate(grads, start=1):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        x = ahead.reshape(inputs, -1)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        yield 0.2 * np.sqrt(max(x.shape)) * x.reshape(g.shape)


def muon_inputs(path):
    return MATRICES[path.split("/")[-2]] if "block_" in path and path.endswith("kernel") else None


def decays(name, path):
    return path.endswith(("kernel", "table")) if name != "muon" else muon_inputs(path) is not None


@pytest.mark.parametrize("direction", [adamw, adafactor, lion, sgd, muon], ids=NAMES)
def test_steps_are_the_papers(direction):
    """Three steps with a learning rate that changes, decay in it."""
    name = direction.__name__
    changes = {"lr": 0.1, "warmup": 2, "weight_decay": 0.5, "clip": 0.0, "b1": 0.8, "b2": 0.9, "momentum": 0.7}
    got, _, _ = run(GRADS, name=name, **changes)
    grads = [flatten(g) for g in GRADS]
    for path, p in flatten(PARAMS).items():
        p = p.astype(np.float64)
        for lr, u in zip((0.05, 0.075, 0.1), direction(path, [g[path].astype(np.float64) for g in grads]), strict=True):
            p = p - lr * (u + 0.5 * decays(name, path) * p)
        np.testing.assert_allclose(got[path], p, rtol=1e-3, atol=2e-5, err_msg=path)


def test_sgd_without_momentum_remembers_nothing():
    _, updates, state = run(GRADS, name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip=0.0)
    for path, g in flatten(GRADS[-1]).items():
        np.testing.assert_allclose(updates[path], -0.1 * g, rtol=1e-6)
    assert not moments(state)


def test_muon_takes_the_matrices_of_blocks():
    """Of a model as it is: a Muon update is nearly orthogonal, its singular values lie close together, and as large as
    AdamW's, so that one learning rate serves both."""
    params = tiny.make_model(tiny.make_config(encoder=True, tied=False, norm="layer", bias=config.BIASES))[1]
    grads = jax.tree.map(lambda x: jnp.array(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params)
    tx = optimizer(params=params, name="muon", lr=0.1, weight_decay=0.0, clip=0.0)
    taken = 0
    for path, change in flatten(jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])(grads)).items():
        if path.endswith("kernel") and ("block_" in path or path == "image/image/embed/kernel"):
            inputs = 2 if path.endswith("attention/out/kernel") else 1
            matrix = change.reshape(int(np.prod(change.shape[:inputs])), -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.4 * values.max(), path
            assert 0.01 < np.sqrt((change**2).mean()) < 0.04, path
            taken += 1
        else:  # Adam's first step: every value by the learning rate; 1.47: optax's Muon looks ahead in it, too
            np.testing.assert_allclose(np.abs(change), 0.14737, rtol=1e-3, err_msg=path)
    assert taken == 3 * 6 + 1


# Masks.


@pytest.mark.parametrize("name", SOME)
def test_decay_is_decoupled(name):
    """Without gradients a parameter that decays loses lr x weight_decay of itself, and no other moves."""
    after, _, _ = run([ZERO], name=name, lr=0.1, weight_decay=0.5, decay="(up/kernel|table)$")
    for path, p in flatten(PARAMS).items():
        share = 0.05 if decays(name, path) and ("up" in path or "table" in path) else 0.0
        np.testing.assert_allclose(after[path], p * (1 - share), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", SOME)
def test_frozen_parameters_have_no_part_in_anything(name):
    """They stay bit-equal in spite of gradients, momentum and decay, have no state, and the clip counts them not."""
    changes = {"name": name, "frozen": r"^image/|cross/|norm", "weight_decay": 0.5, "lr": 0.1, "clip": 0.5}
    after, _, state = run(GRADS, **changes)
    wild = jax.tree_util.tree_map_with_path(lambda path, g: g * (jnp.inf if is_frozen(path) else 1), GRADS[0])
    same, _, _ = run([wild, *GRADS[1:]], **changes)
    whole = jax.eval_shape(optimizer(**changes | {"frozen": ""}).init, PARAMS)
    for path, p in flatten(PARAMS).items():
        frozen, mine = is_frozen(path), [at for at in moments(state) if at.endswith("/" + path)]
        assert (after[path] == p).all() if frozen else (after[path] != p).all(), path
        np.testing.assert_array_equal(after[path], same[path], err_msg=path)
        assert len(mine) == (0 if frozen else sum(at.endswith("/" + path) for at in moments(whole))), path
    assert 0 < len(moments(state)) < len(moments(whole))


def is_frozen(path):
    path = path if isinstance(path, str) else path_name(path)
    return any(part in path for part in ("image/", "cross/", "norm"))


def test_muon_with_all_matrices_frozen():
    after, _, state = run(GRADS, name="muon", frozen="block_")
    assert all((after[path] == p).all() == ("block_" in path) for path, p in flatten(PARAMS).items())
    assert not any("block_" in path for path in moments(state))


@pytest.mark.parametrize("name", SOME)
def test_lr_factors_scale_the_whole_update(name):
    """Exactly, decay included, and the first that matches counts; the pattern is all before the last "="."""
    changes = {"name": name, "lr": 0.1, "weight_decay": 0.5, "decay": "(up/kernel|table)$"}
    _, plain, _ = run(GRADS[:1], **changes)
    _, scaled, _ = run(GRADS[:1], **changes, lr_factors=(r"cross/(?=out)=4", "out/kernel$=0.25", "^backbone/=0"))
    for path, update in plain.items():
        factor = 4 if "cross" in path else 0.25 if "out" in path else 0 if "backbone" in path else 1
        np.testing.assert_array_equal(scaled[path], factor * update, err_msg=path)
        assert (update != 0).all()


def test_clip_is_by_the_global_norm():
    norm = float(np.sqrt(sum((g**2).sum() for g in flatten(GRADS[0]).values())))
    for clip, factor in ((0.0, 1.0), (0.5, 0.5 / norm), (2 * norm, 1.0)):
        _, updates, _ = run(GRADS[:1], name="sgd", momentum=0.0, weight_decay=0.0, lr=0.1, clip=clip)
        for path, g in flatten(GRADS[0]).items():
            np.testing.assert_allclose(updates[path], -0.1 * factor * g, rtol=1e-4)


# The state.


@pytest.mark.parametrize("name", SOME)
def test_state_in_bfloat16(name):
    """Half the bytes, the same shapes, nearly the same way."""
    changes = {"name": name, "lr": 0.01, "weight_decay": 0.0}
    grads = [draw(seed) for seed in range(20)]
    full, _, state = run(grads, **changes)
    after, _, half = run(grads, **changes, state_dtype="bfloat16")
    assert jax.tree.structure(state) == jax.tree.structure(half)
    for path, x in moments(state).items():
        assert x.dtype == jnp.float32 and moments(half)[path].dtype == jnp.bfloat16, path
        assert x.shape == moments(half)[path].shape, path
    for path, x in flatten(half).items():
        if path not in moments(half):  # counts and constants
            np.testing.assert_array_equal(x, flatten(state)[path], strict=True, err_msg=path)
    assert sum(x.nbytes for x in moments(half).values()) * 2 == sum(x.nbytes for x in moments(state).values()) > 0
    off, way = (sum(((x[path] - full[path]) ** 2).sum() for path in full) for x in (after, flatten(PARAMS)))
    assert 0 < np.sqrt(off / way) < (0.05 if name == "lion" else 0.01)  # a sign of Lion's flips now and then


def test_moments_in_bfloat16_shrink_as_they_should():
    """With b2 = 0.999 every step takes less off than half of a bfloat16's last place. And chance can be repeated."""
    tx = optimizer(name="adamw", b2=0.999, state_dtype="bfloat16")

    @jax.jit
    def go(grads):
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        return state, jax.lax.scan(lambda s, _: (tx.update(ZERO, s, PARAMS)[1], None), state, length=300)[0]

    first, last = go(GRADS[0])
    before, after = (np.asarray(moments(s)["1/0/nu/image/connector/kernel"], np.float64) for s in (first, last))
    assert after.sum() / before.sum() == pytest.approx(0.999**300, rel=0.01)
    for x, y in zip(jax.tree.leaves(last), jax.tree.leaves(go(GRADS[0])[1]), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("changes", [
    {}, {"frozen": "^image/", "state_dtype": "bfloat16", "lr_factors": ("block_0=0.5",)},
], ids=["plain", "frozen-bfloat16"])  # fmt: skip
def test_paths_of_moments_end_with_their_parameters(name, changes):
    """By that their sharding is found. All else is scalar, or constants that have a row of their own."""
    params = step_lib.abstract_params(tiny.make_module(tiny.make_config(encoder=True, tied=False)))
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    state = jax.eval_shape(optimizer(name=name, params=params, **changes).init, params)
    found = moments(state)
    for path, x in found.items():
        ends = [parameter for parameter in shapes if path.endswith("/" + parameter)]
        assert ends, path
        assert name == "adafactor" or x.shape == shapes[max(ends, key=len)], path
    assert len(found) >= sum(not (changes and path.startswith("image/")) for path in shapes)


@pytest.mark.parametrize("changes, message", [
    ({"decay": "encodr/"}, "'encodr/' matches no parameter"),
    ({"frozen": "encodr/"}, "'encodr/' matches no parameter"),
    ({"frozen": "(head"}, r"'\(head' is not a regular expression"),
    ({"frozen": "."}, "frozen='.' matches every parameter"),
    ({"lr_factors": ("encodr/=0.1",)}, "'encodr/' matches no parameter"),
    ({"lr_factors": ("head/=0.1", "^head/kernel=2")}, r"'\^head/kernel=2' is never used"),
    *[({"lr_factors": ("head=0.5", bad)}, f"lr_factors={bad!r} is not pattern=factor")
      for bad in ("image/", "image/=", "image/=x", "=0.1", "image/=-1", "image/=nan", "image/=inf", "")],
])  # fmt: skip
def test_what_is_refused(changes, message):
    with pytest.raises(config.InputError, match=message):
        optimizer(**changes)
