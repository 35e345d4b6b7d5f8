"""Orbax checkpoints of a run: parameters, optimizer state and the data position, which is the step.

`<workdir>/checkpoints/<step>/{params,optimizer,position}`. Parameters are an item of their own, so that evaluation and
generation read them without knowing the optimizer.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt4v_jax import config, sharding
from gpt4v_jax.training.step import State


def exists(workdir: Path) -> bool:
    """Does the folder hold a finished checkpoint?"""
    return any(path.name.isdigit() for path in (Path(workdir) / "checkpoints").glob("*"))


class Checkpoints:
    """The checkpoints of one workdir: the newest, and the best by `metric` ("evaluator/metric") where one is named."""

    def __init__(self, workdir: Path, metric: str = "", mode: str = "max", read_only: bool = False):
        self.folder = Path(workdir).absolute() / "checkpoints"
        keep = [checkpoint_managers.LatestN(1)]
        if metric:
            keep.append(checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[metric], reverse=mode == "min", n=1,
                keep_checkpoints_without_metrics=False,
            ))  # fmt: skip
        self._best = (metric, mode) if metric else None
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={  # named here, so that a new process can read an item's shapes before the item
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                best_fn=(lambda metrics: metrics[metric]) if metric else None,
                best_mode=mode,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The best step by the metric; the newest where none is named or none has been measured."""
        best = self._manager.best_step() if self._best else None
        return self.latest() if best is None else best

    def save(self, state: State, metrics: dict[str, float] | None = None) -> None:
        """Starts writing; `metrics` are those of the evaluation at this step, if there was one.

        A state whose opt_state is empty, such as an imported model's, has no item `optimizer`.
        """
        metrics = {k: float(v) for k, v in (metrics or {}).items()}
        if self._best and self._best[0] not in metrics:
            metrics = None
        items = {
            "params": ocp.args.StandardSave(state.params),
            "position": ocp.args.JsonSave({"step": int(state.step)}),
        }
        if jax.tree.leaves(state.opt_state):
            items["optimizer"] = ocp.args.StandardSave(state.opt_state)
        self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, state: State, step: int) -> State:
        """-> the state at `step`, in the shapes and shardings of `state`, which is given up."""
        self.check(state.params, step)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(state.params)),
                optimizer=ocp.args.StandardRestore(_abstract(state.opt_state)),
                position=ocp.args.JsonRestore(),
            ),
        )
        position = jnp.int32(items.position["step"])
        return State(jax.device_put(position, state.step.sharding), items.params, items.optimizer)

    def restore_params(self, abstract_params, mesh: jax.sharding.Mesh, step: int):
        """-> the parameters at `step`, on `mesh`, in the dtype in which they were saved."""
        self.check(abstract_params, step)
        target = jax.tree.map(
            lambda x, s, saved: jax.ShapeDtypeStruct(x.shape, saved.dtype, sharding=s),
            abstract_params,
            sharding.params_sharding(abstract_params, mesh),
            self._manager.item_metadata(step)["params"].tree,
        )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        return self._manager.restore(step, args=args).params

    def check(self, params, step: int) -> None:
        """Raises InputError for a step that is not there, or naming the first parameter that differs and its shapes."""
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise config.InputError(f"{self.folder} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        saved = _shapes(self._manager.item_metadata(step)["params"].tree)
        here = _shapes(params)
        for path in sorted(here.keys() | saved.keys()):
            if here.get(path) != saved.get(path):
                raise config.InputError(
                    f"{self.folder}/{step} holds another model: parameter {path} is {saved.get(path, 'absent')} there "
                    f"and {here.get(path, 'absent')} in this config; use its config, or another --workdir"
                )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {sharding.path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
