"""Several processes are one run: real ones, which talk over gloo, each with forced CPU devices.

`python -m tests.test_processes NAME` is one process of the run NAME; it prints what it found as the last line, in JSON.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing, pipeline
from gpt4v_jax.eval import common
from gpt4v_jax.training import checkpoint, optim
from gpt4v_jax.training import step as step_lib
from tests import tiny

ROWS, STEPS = 8, 4
RUNS = {  # processes, devices of each, meshes
    "two": (2, 2, {"fsdp": config.Mesh(data=2, fsdp=2, across="fsdp"),
                   "tensor": config.Mesh(tensor=2, across="tensor")}),
    "four": (4, 2, {"data": config.Mesh(data=-1, tensor=2)}),
}  # fmt: skip
MODEL = tiny.make_config(depth=1, tied=False)
RUN = config.Config(batch=ROWS, model=MODEL, optim=config.Optim(lr=5e-3, warmup=1), eval=config.Eval(batch=6))
MODULE = tiny.make_module(MODEL)
TEXTS = ("U1 A2", "I U2 A3", "U4 A6", "U1 I A1", "U2 A1 U1 A1", "I I U1 A1", "U3 A8 U1 A2", "U9", "I U3 A2")


class Source:
    """Documents of several lengths, some with pictures; one trains nothing. `decoded`: the pictures, in order."""

    def __init__(self):
        self.decoded = []

    def document(self, epoch, i):
        return tiny.document(TEXTS[i], MODULE.layout, seed=epoch * 100 + i)

    def needs(self, epoch):
        return np.array([chat.needs(tiny.pieces(text, epoch * 100 + i), MODULE.layout) for i, text in enumerate(TEXTS)])

    def read(self, medium):
        self.decoded.append(medium.key)
        return tiny.reader(MODULE.layout)(medium)


def train(mesh, learns: bool = True) -> dict:
    """Four steps' rows on the mesh and, if it learns, their losses and an evaluation."""
    jax.set_mesh(mesh)
    source, other = Source(), Source()
    share = sharding.local_rows(mesh, ROWS)
    streams = [
        pipeline.batches(s, packing.RowPlan(s.needs, MODULE.layout, 5), MODULE.layout, ROWS, 0, STEPS, share=rows)
        for s, rows in ((source, share), (other, None))
    ]
    batches, held = [], 0
    for batch, whole in zip(*streams, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[share]), batch, whole)
        held += int((batch.image.at >= 0).sum())
        batches.append(sharding.put_batch(batch, mesh, ROWS))
        for x, y in zip(*map(jax.tree.leaves, (batches[-1], whole)), strict=True):
            assert x.shape == y.shape
            assert all((np.array(part.data) == y[part.index]).all() for part in x.addressable_shards)
    assert len(source.decoded) == held, "a process decodes the pictures of its own rows"
    found = {"rows": share.tolist(), "decoded": held}
    if not learns:
        return found

    tx = optim.make(RUN.optim, STEPS, step_lib.abstract_params(MODULE))
    state = step_lib.init_state(MODULE, tx, RUN.seed, mesh)
    step = step_lib.compile_train_step(MODULE, tx, RUN, state, mesh)
    losses = []
    for batch in batches:
        state, values = step(state, batch)
        losses.append(float(values["loss"]))
    source, eval_step = Source(), jax.jit(step_lib.make_eval_step(MODULE))
    scores = common.score(common.Subject(RUN, MODULE.layout, None, mesh, eval_step, state.params, None, "test"), source)
    scores = [x.tolist() for x in scores]
    return found | {"losses": losses, "scores": scores, "decoded in evaluation": len(source.decoded)}


def one(name: str) -> None:
    """What one process does."""
    with sharding.distributed(True):
        found = {"first": sharding.is_first(), "processes": jax.process_count(), "devices": jax.device_count()}
        with sharding.first_alone("folder"):
            folder = Path(os.environ["TEST_FOLDER"])
            found["there"] = folder.exists()
            folder.mkdir(exist_ok=True)
        if name == "alone":  # one of them is given something bad
            sharding.GRACE = 1.0
            table = sharding.put_batch(np.zeros((2, 4), np.float32), sharding.make_mesh(config.Mesh()))
            with checkpoint.Checkpoints(folder) as checkpoints:
                checkpoints.save(step_lib.State(np.int32(1), {"text": {"embed": {"table": table}}}, {}))
                if jax.process_index() == 1:  # and does not wait for the others to agree on that save
                    raise config.InputError("mine alone")
                sharding.barrier("never")
        sharding.barrier("config", "the same")
        with pytest.raises(config.InputError, match="config differs between process 0 and 1"):
            sharding.barrier("config", str(min(jax.process_index(), 1)))
        for mesh_name, shape in RUNS[name][2].items():
            mesh = sharding.make_mesh(shape)
            crossing = sharding.MESH_AXES.index(shape.across)
            for line in np.moveaxis(mesh.devices, crossing, 0).reshape(mesh.shape[shape.across], -1):
                assert len({d.process_index for d in line}) == 1, "the other axes stay inside of a process"
            found[mesh_name] = train(mesh, learns=shape.across != "tensor")
        with pytest.raises(config.InputError, match="axis data crosses the . hosts, each with 2 devices, and 1 is no"):
            sharding.make_mesh(config.Mesh(data=1, fsdp=-1))
        sharding.barrier("end")
    print(json.dumps(found))


@contextlib.contextmanager
def started(name: str, count: int, devices: int):
    """Starts `count` processes -> them; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(count):
                more = {
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "TEST_FOLDER": f"{folder}/made",
                    **dict(zip(sharding.MANUAL, (address, str(count), str(number)), strict=True)),
                }  # fmt: skip
                running.append(subprocess.Popen(
                    [sys.executable, "-m", "tests.test_processes", name], cwd=Path(__file__).parent.parent,
                    env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                ))  # fmt: skip
            yield running
        finally:
            for process in running:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def alone():
    """The same on one device of this process."""
    return train(sharding.make_mesh(config.Mesh(), jax.devices()[:1]))


@pytest.mark.parametrize("name", ["two", pytest.param("four", marks=pytest.mark.soak)])
def test_several_processes_are_one_run(name, alone):
    count, devices, meshes = RUNS[name]
    with started(name, count, devices) as running:
        ended = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * count, ended
    found = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert [f["first"] for f in found] == [True] + [False] * (count - 1)
    assert [f["there"] for f in found] == [False] + [True] * (count - 1)
    for mesh, shape in meshes.items():
        parts = [f[mesh] for f in found]
        assert all(f["processes"] == count and f["devices"] == count * devices for f in found)
        held = sorted(row for part in parts for row in part["rows"])
        copies = count if shape.across == "tensor" else 1  # so many processes hold a row
        assert held == sorted([*range(ROWS)] * copies)
        assert sum(part["decoded"] for part in parts) == copies * alone["decoded"]
        if shape.across == "tensor":
            continue
        assert all(part["losses"] == parts[0]["losses"] and part["scores"] == parts[0]["scores"] for part in parts)
        np.testing.assert_allclose(parts[0]["losses"], alone["losses"], rtol=0, atol=1e-5)
        nats, *counts = parts[0]["scores"]
        np.testing.assert_allclose(nats, alone["scores"][0], rtol=0, atol=1e-4)
        assert counts == alone["scores"][1:] and sum(counts[0]) > 20
        assert sum(part["decoded in evaluation"] for part in parts) == alone["decoded in evaluation"]
    assert alone["losses"][0] - alone["losses"][-1] > 0.1 and alone["decoded"] > 10, "the run does learn"


def test_one_that_fails_alone_keeps_its_exit_status():
    """And does not wait for the others, which end, too."""
    with started("alone", 2, 1) as running:
        errors = [process.communicate(timeout=120)[1] for process in (running[1], running[0])]
    assert running[1].returncode == 2 and "error: mine alone" in errors[0], errors
    assert running[0].returncode not in (0, 2)


if __name__ == "__main__":
    from gpt4v_jax import command

    command.run(one, arguments=("NAME",))
