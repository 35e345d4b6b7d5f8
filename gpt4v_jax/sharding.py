"""Devices: the mesh, the table of parameter shardings, and `shard` for activations. No other file knows of devices.

A parameter's path matches one row of PARAMS, which names its dimensions in the alphabet of layers.py; AXES says which
axis of the mesh a name lies on. pjit is `jax.jit` today: arrays carry their sharding and XLA adds the collectives.
"""

import re

import jax
import numpy as np
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
    (r"image/embed/kernel$", ("patch", "width")),
    (r"image/position/table$", (None, "width")),
    (r"relative/table$", (None, "heads")),
    (r"image/connector/kernel$", (None, "width")),
    (r"(attention|cross)/query/kernel$", ("width", "heads", None)),
    (r"(attention|cross)/(key|value)/kernel$", ("width", "kv_heads", None)),
    (r"(attention|cross)/out/kernel$", ("heads", None, "width")),
    (r"(attention|cross)/query/bias$", ("heads", None)),
    (r"(attention|cross)/(key|value)/bias$", ("kv_heads", None)),
    (r"(attention|cross)/(query|key)_norm/scale$", (None,)),
    (r"mlp/(up|gate)/kernel$", ("width", "hidden")),
    (r"mlp/down/kernel$", ("hidden", "width")),
    (r"mlp/(up|gate)/bias$", ("hidden",)),
    (r"(out|down|embed|connector)/bias$", ("width",)),
    (r"patch_norm/(scale|bias)$", ("patch",)),
    (r"norm/(scale|bias)$", ("width",)),
    (r"(_scale|class_token|mask_token|probe)/value$", ("width",)),
    (r"head_hidden/kernel$", (None, "width")),
    (r"head_hidden/bias$", ("width",)),
    (r"head/kernel$", ("width", "vocab_out")),
    (r"head/bias$", ("vocab_out",)),
    (r"head_bias/value$", ("vocab_out",)),
    (r"opt_state/.*/ns_coeffs$", (None,)),  # constants that optax keeps in Muon's state
)


def make_mesh(shape: config.Mesh, devices=None) -> jax.sharding.Mesh:
    """-> a mesh with the axes data, fsdp, tensor. Raises InputError when they do not make up all devices."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(shape, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise config.InputError(f"mesh={sizes}: sizes are 1 or more, and one of them may be -1")
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise config.InputError(f"mesh={sizes} does not make up the {len(devices)} devices: change config.mesh")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(rows: int, mesh: jax.sharding.Mesh, name: str = "batch") -> None:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
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
    """-> the names of a parameter's dimensions. Raises for a path without a row and for another number of them."""
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
        ways = mesh.shape[AXES[dim]] if dim in AXES else 1
        if size % ways:
            raise config.InputError(
                f"{path} {shape}: its dimension {dim} = {size} is not divisible by the mesh's "
                f"{AXES[dim]} = {ways}: change config.mesh or the model's size"
            )
    return NamedSharding(mesh, P(*(AXES.get(dim) for dim in dims)))


def params_sharding(tree, mesh: jax.sharding.Mesh):
    """A tree of parameters, optimizer state or shapes -> the same tree of NamedShardings.

    A leaf of the optimizer's state is found by the end of its path, which is the parameter's.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: param_sharding(path_name(path), x.shape, mesh), tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(AXES["batch"]))


def put_batch(batch, mesh: jax.sharding.Mesh):
    """A host's rows (numpy) -> global arrays, sharded over the batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
