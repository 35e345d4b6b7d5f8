"""The table of parameters and the mesh. test_devices.py has what eight devices do, test_processes.py has processes."""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "gpu"
    coords: tuple[int, int, int] = (0, 0, 0)  # of a TPU
    core_on_chip: int = 0
    device_kind: str = "none"


EIGHT = [Device(i) for i in range(8)]


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
    (config.Mesh(data=0), "sizes are 1 or more"),
])  # fmt: skip
def test_a_mesh_that_is_none(mesh, message):
    with pytest.raises(config.InputError, match=message):
        sharding.make_mesh(mesh, EIGHT)


def test_an_unknown_axis():
    with pytest.raises(config.InputError, match=r"unknown config key mesh.tensors .did you mean 'tensor'"):
        config.parse({"data": -1, "tensors": 2}, config.Mesh, "mesh")
    with pytest.raises(config.InputError, match="across='dta' is none of data, fsdp, tensor .did you mean 'data'"):
        config.Mesh(across="dta")


HOSTS = {  # of two devices each: how processes and slices number them
    "GPUs, a process a host": [Device(i, i // 2, i // 2) for i in range(8)],
    "GPUs, a process a device": [Device(i, i, i // 2) for i in range(8)],
    "GPUs, in another order": [Device(i, 3 - i % 4, 3 - i % 4) for i in range(8)],
    "TPU slices of two hosts": [Device(i, i, i // 2, "tpu", (i % 2, 0, 0)) for i in range(8)],
    "CPUs": [Device(i, i // 2, 0, "cpu") for i in range(8)],
}


@pytest.mark.parametrize("devices", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("shape, sizes", [
    (config.Mesh(data=-1, tensor=2), (4, 1, 2)), (config.Mesh(), (8, 1, 1)), (config.Mesh(data=4, fsdp=2), (4, 2, 1)),
    (config.Mesh(data=2, fsdp=4, across="fsdp"), (2, 4, 1)), (config.Mesh(data=1, fsdp=8, across="fsdp"), (1, 8, 1)),
    (config.Mesh(data=2, tensor=4, across="tensor"), (2, 1, 4)),
])  # fmt: skip
def test_one_axis_crosses_hosts(devices, shape, sizes):
    mesh = sharding.make_mesh(shape, devices)
    assert mesh.axis_names == sharding.MESH_AXES and mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.shape == sizes and {d.id for d in mesh.devices.flat} == set(range(8))
    hosts = np.vectorize(sharding.granule)(mesh.devices)
    crossing = sharding.MESH_AXES.index(shape.across)
    along = np.repeat(range(4), sizes[crossing] // 4)  # neighbours on a host are neighbours on the axis
    assert (np.moveaxis(hosts, crossing, -1) == along).all()


@pytest.mark.parametrize("devices", [
    EIGHT, [Device(i, i) for i in range(8)],
    [Device(i, i // 4, 0, "tpu", (i % 2, i // 2 % 2, i // 4)) for i in range(8)],
], ids=["one process", "a process a GPU of one host", "one TPU slice of two hosts"])  # fmt: skip
def test_within_one_fast_network_any_axis_goes_anywhere(devices):
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=4, tensor=2), devices)
    assert mesh.devices.shape == (1, 4, 2) and {d.id for d in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize("shape, message", [
    (config.Mesh(data=2, fsdp=4), r"axis data crosses the 4 hosts, each with 2 devices, and 2 is no multiple of 4: .*"
                                  r"config.mesh.across"),
    (config.Mesh(data=1, fsdp=-1), "axis data crosses the 4 hosts, .* 1 is no multiple"),
    (config.Mesh(across="tensor"), "axis tensor crosses the 4 hosts"),
])  # fmt: skip
def test_an_axis_that_cannot_cross(shape, message):
    with pytest.raises(config.InputError, match=message):
        sharding.make_mesh(shape, HOSTS["CPUs"])


def test_hosts_of_different_sizes():
    with pytest.raises(config.InputError, match="hosts have 3 to 5 devices"):
        sharding.make_mesh(config.Mesh(), [Device(i, i > 2, 0, "cpu") for i in range(8)])


def test_a_batch_that_is_whole():
    """With one process a batch needs no number of rows; None stays None."""
    mesh = sharding.make_mesh(config.Mesh())
    assert sharding.local_rows(mesh, 3).tolist() == [0, 1, 2]
    rows = tiny.rows(tiny.make_module(tiny.make_config()).layout, ("U1 A2",), ("I U2 A3",), ("U1 A1",))
    for total in (None, 3):
        placed = sharding.put_batch(rows, mesh, total)
        assert placed.token_type is None and placed.tokens.sharding == sharding.batch_sharding(mesh)
        jax.tree.map(np.testing.assert_array_equal, sharding.gather(placed), rows)
    with pytest.raises(ValueError, match="this process holds 4 of a batch's 4 rows, and was given 3"):
        sharding.put_batch(rows, mesh, 4)


@pytest.mark.parametrize("values", [
    ("127.0.0.1:1", "2", ""), ("", "2", "0"), ("127.0.0.1:1", "two", "0"), ("127.0.0.1", "2", "0"),
    ("127.0.0.1:1", "2", "2"), ("127.0.0.1:1", "2", "-1"), ("", "", ""),
])  # fmt: skip
def test_a_start_that_leads_nowhere(values, monkeypatch):
    """In this process JAX may have started already: the environment is looked at first."""
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    for name, value in zip(sharding.MANUAL, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(config.InputError) as error, sharding.distributed(True):
        pass
    assert all(f"{name}={value!r}" in str(error.value) for name, value in zip(sharding.MANUAL, values, strict=True))


def test_one_process_waits_for_nobody():
    with sharding.distributed(False), sharding.first_alone("data"):
        sharding.barrier("config", "{}")
        assert sharding.is_first()


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
