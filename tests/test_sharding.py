"""The table of parameters and the mesh; what eight devices do is test_devices.py's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from gpt4v_jax import config, sharding
from gpt4v_jax.model import presets
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.training import optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

EIGHT = [object() for _ in range(8)]  # stand-ins: shapes are checked before devices are used


@pytest.mark.parametrize("changes", [
    {"tied": True}, {"tied": False, "norm": "layer", "bias": config.BIASES, "position": "learned"},
    {"encoder": True, "norm": "layer", "bias": config.BIASES}, {"qk_norm": True, "activation": "swiglu", "kv_heads": 1},
], ids=lambda changes: "-".join(changes))  # fmt: skip
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_a_row(changes, optimizer):
    model = tiny.make_module(tiny.make_config(**changes))
    tx = optim.make(config.Optim(name=optimizer, frozen="embed/table"), 10, step_lib.abstract_params(model))

    def init():
        params = step_lib.init_params(model, 0)
        return step_lib.State(jnp.int32(0), params, tx.init(params))

    state = jax.eval_shape(init)
    shardings = sharding.params_sharding(state, sharding.make_mesh(config.Mesh()))
    specs = {sharding.path_name(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    moments = 0
    for path, spec in specs.items():  # a moment lies where its parameter lies
        parameter = next((p for p in specs if p.startswith("params/") and path.endswith(p.removeprefix("params/"))), "")
        if "opt_state" in path and parameter:
            assert spec == specs[parameter], path
            moments += 1
    assert moments >= len(jax.tree.leaves(state.params))


def test_every_parameter_of_a_classifier_has_a_row():
    vit = ImageTower(config.parse(presets.IMAGES["vit-ti/16"] | {"size": 32}, config.Image))
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 4, 768), np.uint8), np.zeros((1, 4, 3), np.int32))
    sharding.params_sharding(shapes["params"], sharding.make_mesh(config.Mesh()))


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match=r"text/new/thing with shape \(3, 4\) matches no row"):
        sharding.params_sharding({"text": {"new": {"thing": jnp.zeros((3, 4))}}}, sharding.make_mesh(config.Mesh()))
    with pytest.raises(ValueError, match=r"text/embed/table has shape \(3,\), its row .* has 2 dimensions"):
        sharding.param_dims("text/embed/table", (3,))


@pytest.mark.parametrize("mesh, message", [
    (config.Mesh(data=3), "does not make up the 8 devices"),
    (config.Mesh(data=-1, fsdp=3), "does not make up the 8 devices"),
    (config.Mesh(data=-1, fsdp=16), "does not make up the 8 devices"),
    (config.Mesh(data=-1, fsdp=-1), "one of them may be -1"),
    (config.Mesh(data=8, tensor=0), "sizes are 1 or more"),
    (config.Mesh(data=-2), "sizes are 1 or more"),
])  # fmt: skip
def test_a_mesh_that_is_none(mesh, message):
    with pytest.raises(config.InputError, match=message):
        sharding.make_mesh(mesh, EIGHT)


def abstract_mesh(data, fsdp, tensor):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def test_a_batch_must_divide():
    sharding.check_batch(16, abstract_mesh(2, 4, 3))
    with pytest.raises(config.InputError, match="config.batch=12 is not divisible by .* 8: use a multiple of 8"):
        sharding.check_batch(12, abstract_mesh(2, 4, 1))


def test_a_parameter_must_divide():
    table = {"text": {"embed": {"table": jax.ShapeDtypeStruct((32, 20), jnp.float32)}}}
    with pytest.raises(config.InputError, match=r"text/embed/table \(32, 20\): its dimension width = 20 .* fsdp = 8"):
        sharding.params_sharding(table, abstract_mesh(1, 8, 1))


def test_shard_does_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.shard(x, "batch") is x
