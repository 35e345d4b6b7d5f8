"""Eight devices equal one, and a checkpoint of eight is one of any other number.

Devices are forced before JAX starts, so the work is done in a process of its own: `python -m tests.test_devices KIND`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "tensor 4": (1, 1, 4), "data 4 x tensor 2": (4, 1, 2)}
# What is trained: everything in `float32`; make soak has the other kinds, and more meshes.
KINDS = ("float32", "bfloat16", "encoder", "accumulate", "loop", "vocab_chunks", "adafactor", "lion", "sgd", "lora",
         "prefix_lm", "cross_attention", "resampler", "q_former", "pooled", "encoder_decoder", "experts",
         "pixel_shuffle")  # fmt: skip
RESTORED = {"4 x 2": (4, 1, 2), "2 x 4": (2, 1, 4), "fsdp 2 x tensor 2": (1, 2, 2), "one": (1, 1, 1)}
SOAK = ("tensor 4", "2 x 4", "fsdp 2 x tensor 2")
STEPS = 20


def soak(names, which):
    return [pytest.param(name, marks=pytest.mark.soak) if name in which else name for name in names]


@pytest.fixture(scope="module", params=soak(KINDS, KINDS[1:]))
def result(request, pytestconfig):
    """-> (kind, {mesh: what came out})."""
    flags = {"JAX_NUM_CPU_DEVICES": "8"}
    left_out = () if pytestconfig.getoption("--soak") else SOAK
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_devices", request.param, *left_out], cwd=Path(__file__).parent.parent,
        env=os.environ | flags, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


@pytest.mark.parametrize("name", soak(MESHES, SOAK))
def test_losses_and_gradient_norms_equal_those_of_one_device(result, name, shown):
    kind, runs = result
    bar = 2e-3 if kind == "bfloat16" else 1e-5
    one, many = runs["one"], runs[name]
    assert len(one["losses"]) == len(many["losses"]) == STEPS
    assert one["losses"][0] - one["losses"][-1] > 0.3, "it learns"
    loss = max(abs(a - b) for a, b in zip(one["losses"], many["losses"], strict=True))
    norm = max(abs(a - b) / a for a, b in zip(one["norms"], many["norms"], strict=True))
    assert loss <= bar, (one["losses"], many["losses"])
    assert kind == "bfloat16" or norm <= bar, (one["norms"], many["norms"])
    shown(f"{name} against one device, {kind}: |loss difference|; gradient norm, relative", f"{loss:.1e}; {norm:.1e}",
          f"{bar:.0e}; {'-' if kind == 'bfloat16' else f'{bar:.0e}'}")  # fmt: skip


def test_fsdp_shares_the_bytes(result, shown):
    """No device holds much more than an eighth of parameters and optimizer state."""
    kind, runs = result
    shares, total = runs["fsdp 8"]["bytes"], runs["one"]["bytes"][0]
    bar = 2.5 if kind == "lora" else 1.25  # the side of a and b without the width lies whole on each
    assert len(shares) == 8 and max(shares) <= bar / 8 * total, (shares, total)
    assert runs["data 8"]["bytes"] == [total] * 8
    shown(f"fsdp 8, {kind}: bytes of a device, in eighths of the state", f"{8 * max(shares) / total:.3f}", f"{bar}")


@pytest.mark.parametrize("name", soak(RESTORED, SOAK))
def test_a_checkpoint_of_eight_devices_goes_on_anywhere(result, name, shown):
    """Saved on data 8 after 10 steps: every value is there to the bit, and the next losses are those of data 8."""
    kind, runs = result
    assert runs[f"restored on {name}"]["different"] == 0
    pairs = zip(runs["data 8"]["losses"][STEPS // 2 :], runs[f"restored on {name}"]["losses"], strict=True)
    loss = max(abs(a - b) for a, b in pairs)
    assert loss <= (2e-3 if kind == "bfloat16" else 1e-5)
    shown(f"saved on 8 x 1, {kind}, restored on {name}: differing bytes; |loss difference|", f"0; {loss:.1e}",
          f"0; {2e-3 if kind == 'bfloat16' else 1e-5:.0e}")  # fmt: skip


def main(kind: str, *left_out: str):
    """-> stdout, as JSON: losses and gradient norms of 20 steps on each mesh, and the bytes that each device holds."""
    import tempfile

    import jax
    import numpy as np

    from gpt4v_jax import config, sharding
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import checkpoint, optim
    from gpt4v_jax.training import step as step_lib
    from tests import tiny

    # Muon, and Adam for what is no matrix of a block
    name = kind if kind in ("adafactor", "lion", "sgd") else "muon"
    optimizer = config.Optim(name=name, lr={"lion": 1e-3, "sgd": 2e-2}.get(name, 5e-3), warmup=5)
    compute = config.Compute(
        dtype="bfloat16" if kind == "bfloat16" else "float32", accumulate=2 if kind == "accumulate" else 1,
        scan=int(kind == "loop"), remat="full" if kind == "loop" else "none",
        vocab_chunks=3 if kind == "vocab_chunks" else 1,
    )  # fmt: skip
    rows = 16 if kind == "accumulate" else 8
    # In one block keys are embeddings, and of what a mask lets see beside that nothing reaches a trained position.
    depth = 2 if kind == "loop" or kind in config.FUSIONS else 1
    block = config.Backbone(depth=depth, width=32, heads=8, kv_heads=4, activation="swiglu", dropout=0.1)
    encoder = config.Backbone(depth=1, width=32, heads=8) if kind in ("encoder", "pixel_shuffle") else None
    image = config.Image(size=4, patch=2, patch_norm=True, encoder=encoder)
    fusion = config.Fusion(
        kind if kind in config.FUSIONS else "concat", every=1, tokens=3,
        connector="pixel_shuffle" if kind == "pixel_shuffle" else "linear",
    )  # fmt: skip
    clips, sounds = config.Video(), config.Audio()
    texts = [("I U2 A3", "U1 I A2"), ("U3 A8 U1 A2",), ("I I U1 A5",), ("U1 A9",)]
    if kind in config.FUSIONS:  # every kind with all media
        clips = config.Video(size=4, patch=2, frames=4, tubelet=2)
        sounds = config.Audio(bins=4, patch=2, seconds=0.1)  # a patch has 8 values: devices share them
        texts = [("I U2 A3", "U1 I A2"), ("V U1 A5",), ("I I U1 A5",), ("S U1 A9",)]
    model = config.Model(vocab=tiny.VOCAB, context=24, tied=False, embed_norm=True, backbone=block, image=image,
                         video=clips, audio=sounds, fusion=fusion)  # fmt: skip
    lora = config.LoRA(rank=4 if kind == "lora" else 0, also="^head/" if kind == "lora" else "")
    run = config.Config(batch=rows, model=model, optim=optimizer, compute=compute, lora=lora)
    module = GPT4V(model, tiny.make_module(model).layout, compute)
    texts *= rows // 4
    batches = [tiny.rows(module.layout, *texts[i % 4 :], *texts[: i % 4]) for i in range(4)]
    rng = np.random.default_rng(0)
    for batch in batches:
        batch.image.patch[:] = rng.integers(0, 256, batch.image.patch.shape, np.uint8)
    folder = tempfile.TemporaryDirectory()

    def train(shape, start=0, save_at=0):
        mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: int(np.prod(shape))])
        jax.set_mesh(mesh)
        tx = optim.make(run.optim, STEPS, step_lib.abstract_params(module, lora=lora), lora)
        state = step_lib.init_state(module, tx, run.seed, mesh, lora=lora)
        checkpoints = checkpoint.Checkpoints(Path(folder.name))
        out = {"losses": [], "norms": []}
        if start:
            state = checkpoints.restore(state, start)
            pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(jax.device_get(state)), strict=True)
            out["different"] = int(sum((np.asarray(a) != np.asarray(b)).sum() for a, b in pairs))
        step = step_lib.compile_train_step(module, tx, run, state, mesh)
        for i in range(start, STEPS):
            state, values = step(state, sharding.put_batch(batches[i % 4], mesh))
            out["losses"].append(float(values["loss"]))
            out["norms"].append(float(values["grad_norm"]))
            if i + 1 == save_at:
                checkpoints.save(state)
                saved.append(jax.device_get(state))
        checkpoints.close()
        held = dict.fromkeys(mesh.devices.flat, 0)
        for x in jax.tree.leaves((state.params, state.opt_state)):
            for part in x.addressable_shards:
                held[part.device] += part.data.nbytes
        return out | {"bytes": list(held.values())}

    saved = []
    results = {"one": train((1, 1, 1))}
    for mesh, shape in MESHES.items():
        if mesh not in left_out:
            results[mesh] = train(shape, save_at=STEPS // 2 if mesh == "data 8" else 0)
    for mesh, shape in RESTORED.items():
        if mesh not in left_out:
            results[f"restored on {mesh}"] = train(shape, start=STEPS // 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
