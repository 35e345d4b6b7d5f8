"""Eight devices equal one. Devices are forced before JAX starts, so the work is done in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "data 4 x tensor 2": (4, 1, 2)}
STEPS = 20


@pytest.fixture(scope="module")
def result():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_devices"], cwd=Path(__file__).parent.parent, env=os.environ | flags,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MESHES)
def test_losses_equal_those_of_one_device(result, name):
    one, many = result["one"]["losses"], result[name]["losses"]
    assert len(one) == len(many) == STEPS and one[0] - one[-1] > 0.5, "the run does learn"
    assert all(abs(a - b) <= 1e-5 for a, b in zip(one, many, strict=True)), (one, many)


def test_fsdp_shares_the_bytes(result):
    """No device holds much more than an eighth of parameters and optimizer state."""
    shares = result["fsdp 8"]["bytes"]
    total = result["one"]["bytes"][0]
    assert len(shares) == 8 and max(shares) <= 1.25 / 8 * total, (shares, total)
    assert result["data 8"]["bytes"] == [total] * 8


def main():
    """-> stdout, as JSON: the losses of 20 steps on each mesh, and the bytes of state that each device holds."""
    import jax
    import numpy as np

    from gpt4v_jax import config, sharding
    from gpt4v_jax.training import optim
    from gpt4v_jax.training import step as step_lib
    from tests import tiny

    optimizer = config.Optim(name="muon", lr=5e-3, warmup=5)  # and Adam, for what is no matrix of a block
    block = config.Backbone(depth=2, width=32, heads=4, kv_heads=2, activation="swiglu", dropout=0.1)
    image = config.Image(size=4, patch=2, patch_norm=True)
    model = config.Model(vocab=tiny.VOCAB, context=24, tied=False, embed_norm=True, backbone=block, image=image)
    run = config.Config(batch=8, model=model, optim=optimizer)
    module = tiny.make_module(model)
    texts = [("I U2 A3", "U1 I A2"), ("U3 A8 U1 A2",), ("I I U1 A5",), ("U1 A9",)] * 2
    batches = [
        tiny.rows(module.layout, *texts[i % 4 :], *texts[: i % 4]) for i in range(4)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for batch in batches:
        batch.image.patch[:] = rng.integers(0, 256, batch.image.patch.shape, np.uint8)

    def train(shape, devices):
        mesh = sharding.make_mesh(config.Mesh(*shape), devices)
        jax.set_mesh(mesh)
        tx = optim.make(run.optim, STEPS, step_lib.abstract_params(module))
        state = step_lib.init_state(module, tx, run.seed, mesh)
        step = step_lib.compile_train_step(module, tx, run, state, mesh)
        losses = []
        for i in range(STEPS):
            state, values = step(state, sharding.put_batch(batches[i % 4], mesh))
            losses.append(float(values["loss"]))
        held = dict.fromkeys(devices, 0)
        for x in jax.tree.leaves((state.params, state.opt_state)):
            for part in x.addressable_shards:
                held[part.device] += part.data.nbytes
        return {"losses": losses, "bytes": list(held.values())}

    results = {"one": train((1, 1, 1), jax.devices()[:1])}
    print(json.dumps(results | {name: train(shape, jax.devices()) for name, shape in MESHES.items()}))


if __name__ == "__main__":
    main()
