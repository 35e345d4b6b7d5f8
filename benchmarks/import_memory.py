"""Host memory of an import: a random Llama of 1.1 billion parameters, read a tensor at a time onto a mesh.

    python -m benchmarks.import_memory --folder FOLDER          # writes 2.3 GB there once

Prints, for each dtype, the peak of the process beyond what it had before and beyond the parameters themselves, and its
ratio to the largest shard. Each import is a process of its own.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from gpt4v_jax import command, config

_FOLDER = flags.DEFINE_string("folder", None, "where the random model is, or is written")
_DEVICES = flags.DEFINE_integer("devices", 4, "forced CPU devices; the mesh is fsdp 2 x tensor 2 with 4")
_ONE = flags.DEFINE_string("one", None, "a dtype: import once and print the measures (what this command starts)")

THEIRS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5504, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHARD = 512 << 20


def write(folder: Path) -> None:
    from gpt4v_jax.interop import families, hf
    from gpt4v_jax.interop import folder as folder_lib

    ours = families.read_config(THEIRS)
    shards, index, size = [{}], {}, 0
    for tensor in hf.tensors_of(families.family_of(THEIRS), ours, hf.abstract_params(ours)):
        n = 2 * int(np.prod(tensor.shape))
        if size + n > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][tensor.name], size = tensor.shape, size + n
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, shapes in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = {
            key: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for key, shape in shapes.items()
        }
        save_file(values, folder / name)
        index |= dict.fromkeys(values, name)
    (folder / folder_lib.INDEX).write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(THEIRS))


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from gpt4v_jax import sharding
    from gpt4v_jax.interop import families, hf
    from gpt4v_jax.interop import folder as folder_lib

    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=-1, tensor=2 if jax.device_count() % 2 == 0 else 1))
    ours = families.read_config(folder_lib.read_json(folder / "config.json"))
    hf.abstract_params(ours)
    jnp.zeros(1).block_until_ready()
    before, started = status("VmRSS"), time.time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    imported = hf.load(folder, dtype, mesh)
    jax.block_until_ready(imported.params)
    seconds, peak = time.time() - started, status("VmHWM")
    leaves = jax.tree.leaves(imported.params)
    params = sum(part.data.nbytes for x in leaves for part in x.addressable_shards)  # a table lies on two
    shard = max(f.stat().st_size for f in folder.glob("*.safetensors"))
    beyond = peak - before - params
    return {
        "dtype": dtype, "devices": jax.device_count(), "parameters": sum(x.size for x in leaves),
        "parameters_gb": params / 1e9, "shard_gb": shard / 1e9, "peak_gb": peak / 1e9, "before_gb": before / 1e9,
        "beyond_gb": beyond / 1e9, "beyond_per_shard": beyond / shard, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    folder = Path(_FOLDER.value)
    if _ONE.value:
        print(json.dumps(measure(folder, _ONE.value)))
        return
    if not folder.exists():
        write(folder)
    print("| dtype | devices | parameters | GB of them | largest shard, GB | peak beyond them, GB | / shard |")
    print("|---|---|---|---|---|---|---|")
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-m", "benchmarks.import_memory", f"--folder={folder}", f"--one={dtype}"]
        flag = f"--xla_force_host_platform_device_count={_DEVICES.value}"
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flag})
        if result.returncode:
            raise config.InputError(result.stderr[-2000:])
        r = json.loads(result.stdout.splitlines()[-1])
        print(
            f"| {r['dtype']} | {r['devices']} | {r['parameters']:,} | {r['parameters_gb']:.2f} | {r['shard_gb']:.3f} "
            f"| {r['beyond_gb']:.3f} | {r['beyond_per_shard']:.2f} |"
        )


if __name__ == "__main__":
    command.run(main, required=("folder",))
