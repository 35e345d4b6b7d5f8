"""Devices and processes: the mesh, the table of parameter shardings, `shard` for activations, each process's rows, what
processes do together. No other file knows of devices.

A parameter's path matches one row of PARAMS, which names its dimensions in the alphabet of layers.py; AXES says which
axis of the mesh a name lies on. pjit is `jax.jit` today: arrays carry their sharding and XLA adds the collectives.
"""

import contextlib
import functools
import math
import os
import re
import sys
import threading
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt4v_jax import config

MESH_AXES = ("data", "fsdp", "tensor")

AXES = {  # dimension -> mesh axis; what is not here is replicated
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
    "patch": "tensor",
    "vocab_out": "tensor",
}

# path of the parameter (its end) -> its dimensions. The embedding table lies on its width: sharded on the vocabulary,
# its gather makes XLA replicate it at every step.
PARAMS = (
    (r"text/embed/table$", (None, "width")),
    (r"text/(source_position|position|token_type)/table$", (None, "width")),
    (r"(image|video|audio)/embed/kernel$", ("patch", "width")),
    (r"(image|video)/(position|time)/table$", (None, "width")),
    (r"front/(first|second)/kernel$", (None, "width")),
    (r"relative/table$", (None, "heads")),
    (r"(image|video|audio)/(deep_\d+_)?connector(_up)?/kernel$", (None, "width")),
    (r"_queries/table$", (None, "width")),
    (r"(attention|cross)/(\w+_)?query/kernel$", ("width", "heads", None)),
    (r"(attention|cross)/(\w+_)?(key|value)/kernel$", ("width", "kv_heads", None)),
    (r"(attention|cross)/(\w+_)?out/kernel$", ("heads", None, "width")),
    (r"(attention|cross)/(\w+_)?query/bias$", ("heads", None)),
    (r"(attention|cross)/(\w+_)?(key|value)/bias$", ("kv_heads", None)),
    (r"(attention|cross)/(\w+_)?(query|key)_norm/scale$", (None,)),
    (r"mlp/(up|gate)/kernel$", ("width", "hidden")),
    (r"mlp/down/kernel$", ("hidden", "width")),
    (r"mlp/(up|gate)/bias$", ("hidden",)),
    (r"(out|down|embed|connector|connector_up|first|second)/bias$", ("width",)),
    (r"patch_norm/(scale|bias)$", ("patch",)),
    (r"norm/(scale|bias)$", ("width",)),
    (r"(_scale|class_token|mask_token|probe)/value$", ("width",)),
    (r"projection/kernel$", ("width", None)),
    (r"head_hidden/kernel$", (None, "width")),
    (r"head_hidden/bias$", ("width",)),
    (r"head/kernel$", ("width", "vocab_out")),
    (r"head/bias$", ("vocab_out",)),
    (r"head_bias/value$", ("vocab_out",)),
    (r"opt_state/.*/ns_coeffs$", (None,)),  # constants that optax keeps in Muon's state
)


def make_mesh(shape: config.Mesh, devices=None) -> jax.sharding.Mesh:
    """-> a mesh of MESH_AXES; shape.across crosses hosts, the others stay inside one. Raises InputError where the sizes
    do not make up all devices, or the one across is no multiple of the hosts."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(shape, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise config.InputError(f"mesh={sizes}: sizes are 1 or more, and one of them may be -1")
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        raise config.InputError(f"mesh={sizes} does not make up the {len(devices)} devices: change config.mesh")
    groups: dict[int, list] = {}
    for device in devices:
        groups.setdefault(granule(device), []).append(device)
    held, across = sorted(len(group) for group in groups.values()), shape.across
    if held[0] != held[-1]:
        raise config.InputError(f"hosts have {held[0]} to {held[-1]} devices: a mesh needs as many on each of them")
    if sizes[across] % len(groups):
        raise config.InputError(
            f"mesh={sizes}: its axis {across} crosses the {len(groups)} hosts, each with {held[0]} devices, and "
            f"{sizes[across]} is no multiple of {len(groups)}: make it one, or set config.mesh.across to another axis"
        )
    inside, kinds = sizes | {across: sizes[across] // len(groups)}, (AxisType.Auto,) * len(MESH_AXES)
    # JAX lays neighbours in a host's part on neighbours in its network.
    part = functools.partial(jax.make_mesh, tuple(inside.values()), MESH_AXES, axis_types=kinds)
    parts = [part(devices=groups[key]).devices for key in sorted(groups)]
    return jax.sharding.Mesh(np.concatenate(parts, MESH_AXES.index(across)), MESH_AXES, axis_types=kinds)


def granule(device) -> int:
    """Devices of one number share a fast network: a TPU slice (which may span hosts), the GPUs of a host or an NVLink
    domain. CPUs have none: a process counts as a host, so that one machine shows what a cluster does."""
    return device.process_index if device.platform == "cpu" else getattr(device, "slice_index", 0)


def ways(mesh: jax.sharding.Mesh, dim: str | None) -> int:
    """-> in how many parts a dimension lies on the mesh."""
    axes = AXES.get(dim, ())
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def check_batch(rows: int, mesh: jax.sharding.Mesh, name: str = "batch") -> None:
    shards = ways(mesh, "batch")
    if rows % shards:
        raise config.InputError(
            f"config.{name}={rows} is not divisible by the mesh's data x fsdp = {shards}: use a multiple of {shards}"
        )


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's dimensions to their mesh axes; nothing happens outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return x
    spec = P(*(AXES.get(name) for name in (*names, *[None] * (x.ndim - len(names)))))
    return jax.lax.with_sharding_constraint(x, spec)


def path_name(path) -> str:
    """A pytree key path -> "text/embed/table"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def param_dims(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """-> the names of a parameter's dimensions. Raises for a path without a row and for another number of them.

    LoRA's a [inputs..., rank] and b [rank, outputs...] lie as the inputs and the outputs of their matrix do.
    """
    if lora := re.search(r"lora/(.*)/([ab])$", path):
        dims = next((dims for pattern, dims in PARAMS if re.search(pattern, lora[1])), ())
        count = len(shape) - 1
        if len(dims) > count:
            return (*dims[:count], None) if lora[2] == "a" else (None, *dims[-count:])
    for pattern, dims in PARAMS:
        if re.search(pattern, path):
            if len(dims) != len(shape):
                raise ValueError(f"{path} has shape {shape}, its row in sharding.PARAMS has {len(dims)} dimensions")
            return dims
    raise ValueError(f"{path} with shape {shape} matches no row of sharding.PARAMS: add one")


def param_sharding(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a parameter lies; scalars are replicated. Raises InputError where a dimension does not divide."""
    if not shape:
        return NamedSharding(mesh, P())
    dims = param_dims(path, shape)
    for dim, size in zip(dims, shape, strict=True):
        if size % ways(mesh, dim):
            raise config.InputError(
                f"{path} {shape}: its dimension {dim} = {size} is not divisible by the mesh's "
                f"{AXES[dim]} = {ways(mesh, dim)}: change config.mesh or the model's size"
            )
    return NamedSharding(mesh, P(*(AXES.get(dim) for dim in dims)))


def params_sharding(tree, mesh: jax.sharding.Mesh):
    """A tree of parameters, optimizer state or shapes -> the same tree of NamedShardings.

    A leaf of the optimizer's state is found by the end of its path, which is the parameter's.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: param_sharding(path_name(path), x.shape, mesh), tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(AXES["batch"]))


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
    """-> which of a batch's rows this process's devices hold, rising; `tensor` may give two processes the same."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held.values()]))


def put_batch(batch, mesh: jax.sharding.Mesh, rows: int | None = None):
    """Rows (numpy) -> global arrays, sharded over the batch. `batch` has this process's local_rows of `rows` rows, in
    their order; with None it is the whole, on every process."""

    def put(x):
        total = len(x) if rows is None else rows
        held = np.arange(total) if rows is None else local_rows(mesh, total)
        if len(x) != len(held):
            raise ValueError(f"this process holds {len(held)} of a batch's {total} rows, and was given {len(x)}")

        def part(index):  # of one device
            start, stop, _ = index[0].indices(total)
            first = np.searchsorted(held, start)
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((total, *x.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


def gather(tree):
    """Global arrays -> the same whole (numpy), on every process; all of them must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


# ---- processes

GRACE = 10.0  # seconds in which processes that fail alike meet, and end in order
MANUAL = ("GPT4V_COORDINATOR", "GPT4V_PROCESSES", "GPT4V_PROCESS")


@contextlib.contextmanager
def distributed(wanted: bool):
    """Joins this process to the others that run the same command; before any other use of JAX. JAX finds them on TPU
    pods, Slurm, Open MPI and Kubernetes; else MANUAL says host:port of process 0, how many, which one this is."""
    if wanted:
        _join(*(os.environ.get(name, "") for name in MANUAL))
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if wanted:  # one that fails alone would wait for minutes at JAX's exit, and lose its exit status there
            status = getattr(error, "status", 2 if isinstance(error, config.InputError) else 1)
            leave = threading.Timer(GRACE, os._exit, (status,))
            leave.daemon = True
            leave.start()
            sys.stdout.flush()
        raise


def _join(address: str, count: str, number: str) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which is training.stop's
    try:
        if not (address or count or number):
            return jax.distributed.initialize()
        int(address.rpartition(":")[2])
        jax.distributed.initialize(address, int(count), int(number), cluster_detection_method="deactivate")
    except ValueError as error:
        raise config.InputError(
            f"--distributed: {MANUAL[0]}={address!r} must be host:port of process 0, {MANUAL[1]}={count!r} how many, "
            f"{MANUAL[2]}={number!r} which one this is, from 0; none of them on a TPU pod, Slurm, mpirun, Kubernetes"
        ) from error


def is_first() -> bool:
    """Is this the process that prints, and writes what is written once?"""
    return jax.process_index() == 0


def barrier(name: str, text: str = "") -> None:
    """Waits until all processes are here. Raises InputError where they bring different texts, such as their configs."""
    sums = np.ravel(gather(np.uint32([zlib.crc32(f"{name} {text}".encode())])))
    if (sums != sums[0]).any():
        odd = int(np.argmax(sums != sums[0]))
        raise config.InputError(f"{name} differs between process 0 and {odd}: start all with one command and one code")


@contextlib.contextmanager
def first_alone(name: str):
    """The first process goes ahead: what it makes on a disk, the others find there. Where it fails, they fail alike."""
    if not is_first():
        barrier(name)
    try:
        yield
    finally:
        if is_first():
            barrier(name)
