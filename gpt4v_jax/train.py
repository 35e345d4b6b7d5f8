"""THE loop: python -m gpt4v_jax.train --config configs/digits_world.py --workdir runs/digits_world

The same command again goes on where the run was, also after a kill -9. Chapters: data, state, evaluation, loop.
Exit status: 0 done, 2 bad input, 3 the guard stopped the run, 75 it was asked to stop (SIGTERM, SIGINT) and saved.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config, sharding
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.data import mixture, objectives, packing, pipeline
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.windows import Windows
from gpt4v_jax.eval import common
from gpt4v_jax.interop import parts
from gpt4v_jax.model import flops
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import checkpoint, goodput, lock, lora, metrics, optim, partial, stop, workdir
from gpt4v_jax.training import step as step_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file, such as configs/digits_world.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; a run there is continued", allow_override=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "this is one of several processes: docs/cluster.md", allow_override=True
)


def train(run: config.Config, folder: Path) -> dict[str, float]:
    """Runs `run` to its end in `folder` -> the metrics of the last evaluation.

    Raises InputError for bad input and command.Leave where the run ends early. A run that has nothing left to do
    gives {}.
    """
    started = time.time()
    mesh = sharding.make_mesh(run.mesh)
    jax.set_mesh(mesh)
    micro = run.compute.accumulate
    sharding.check_batch(run.batch // micro, mesh, "batch / compute.accumulate" if micro > 1 else "batch")
    with stop.Stop(mesh) as asked:
        try:
            return _train(run, folder, mesh, asked, started)
        except stop.Interrupted:
            raise command.Leave("asked to stop before the first step: nothing is lost", stop.PREEMPTED) from None


def _train(run: config.Config, folder: Path, mesh, asked: stop.Stop, started: float) -> dict[str, float]:
    resumes = checkpoint.exists(folder)
    sharding.barrier("what is in --workdir", str(resumes))
    stream = open_stream(run, folder, mesh, resumes)
    asked.check()
    model = GPT4V(stream.run.model, stream.layout, run.compute)
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(model, run.seed, run.lora), run.lora)
    workdir.create(folder)
    with lock.hold(folder):
        sharding.barrier("what is in --workdir", str(checkpoint.exists(folder)))
        if checkpoint.exists(folder) != resumes:
            raise config.InputError(f"--workdir={folder}: another trainer was at work in it just now; start again")
        checkpoints = checkpoint.Checkpoints(folder, run.eval.best, run.eval.best_mode, run.keep_last, run.keep_every)
        with checkpoints:
            start = checkpoints.latest() if resumes else 0
            clock = goodput.Clock(folder, start, started)
            with clock.spent("compile"):
                state = step_lib.init_state(model, tx, run.seed, mesh, run.optim.ema > 0, run.lora)
            if resumes:
                state = checkpoints.restore(state, start)
                workdir.check_same(folder, stream.run, r"model\.")
                lines = other_schedule(run, workdir.load_config(folder), state)
            else:
                params, lines = load_parts(stream.run, state.params, mesh)
                ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
                state = state.replace(params=params, ema=ema)
            checkpoints.check_room(state)
            asked.check()
            if start < run.steps and sharding.is_first():
                workdir.describe(folder, stream.run, stream.tokenizer, stream.known)
            return loop(stream, folder, mesh, model, tx, state, checkpoints, clock, asked, lines)


# ---- data


@dataclasses.dataclass(frozen=True)
class Stream:
    """A run with its vocabulary filled in, and what its rows are made from."""

    run: config.Config
    layout: batch_lib.Layout
    tokenizer: tokenizer_lib.Tokenizer
    source: Any
    plan: packing.RowPlan
    held_out: dict[str, Any]  # of each data set that is evaluated its validation split's source
    known: dict[str, Any]  # of the data, for the workdir


def open_stream(run: config.Config, folder: Path, mesh: jax.sharding.Mesh, resumes: bool) -> Stream:
    """What is wrong with config and data is said here, before a folder is made."""
    if resumes:
        workdir.check_same(folder, run, r"(?!model\.)")  # a model's parameters say more: they are compared later
    with sharding.first_alone("data"):
        records = mixture.open_train(run.data)
    if resumes:
        tokenizer = tokenizer_lib.load(folder / "tokenizer.json", run.data.end)
    else:
        tokenizer = tokenizer_lib.train(
            run.data.tokenizer, mixture.corpus(run.data), run.data.vocab, run.data.end,
            extra=objectives.special_tokens(run.data, run.objective, run.model.context),
        )  # fmt: skip
    there = workdir.load_config(folder).model.vocab if resumes else parts.vocab(run)
    vocab = run.model.vocab or max(tokenizer.vocab, there)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=vocab))
    layout = batch_lib.layout(run.model, run.data)
    source = mixture.train_source(records, run.data, tokenizer, layout, run.seed, run.objective)
    plan = packing.RowPlan(source.needs, layout, run.seed)
    held_out, best = {}, []
    for evaluator in run.eval.evaluators:
        name = eval_lib.named(evaluator)[1]
        if name not in held_out:
            held_out[name] = common.open_source(
                mixture.one(run, name), run.eval.split, tokenizer, layout, run.eval.limit)
        eval_lib.check(evaluator, held_out[name], name or run.data.name, run.data.kinds)
        best += [f"{evaluator}/{metric}" for metric in eval_lib.metrics(evaluator, held_out[name])]
    if run.eval.best:
        config.one_of("config.eval.best", run.eval.best, tuple(best))
    # A host, or a resumed run, that finds other documents would fill other rows.
    needs, sets = source.needs(0), getattr(source, "parts", [source])
    known = {"documents": len(needs), "plan": f"{zlib.crc32(np.ascontiguousarray(needs)):08x}",
             "texts": [part.name for part in sets if isinstance(part, Windows)]}  # fmt: skip
    sharding.barrier("config, tokenizer or data", config.to_json(run) + tokenizer.to_json() + known["plan"])
    if resumes:
        workdir.check_data(folder, known)
    if run.init_from.run and not resumes:
        partial.check(run, tokenizer)
    next(pipeline.batches(source, plan, layout, run.batch, 0, 1, share=sharding.local_rows(mesh, run.batch)))
    return Stream(run, layout, tokenizer, source, plan, held_out, known)


# ---- state


def other_schedule(run: config.Config, there: config.Config, state) -> list[str]:
    """-> a line that says so where another number of steps gives another learning rate from here on."""
    taken = int(state.watch.seen)
    was, now = (float(optim.schedule(run.optim, steps)(taken)) for steps in (there.steps, run.steps))
    if was == now:
        return []
    changed = f"steps was {there.steps:,} and is {run.steps:,}"
    return [f"note        {changed}: the learning rate goes on from {now:.3g}, not {was:.3g}"]


def load_parts(run: config.Config, params, mesh: jax.sharding.Mesh):
    """-> (the parameters with what init_from names, lines that say what came from where)."""
    if not run.init_from.run:
        return parts.initialise(params, run, mesh)
    if run.init_from.backbone or run.init_from.image:
        raise config.InputError("init_from.run stands alone: train from the folders first, or import them")
    return partial.load(params, run)


# ---- evaluation


def make_evaluate(stream: Stream, mesh, model, check: Callable[[], None]) -> Callable[[step_lib.State], dict]:
    """-> evaluate(state) -> {"evaluator/metric": value}; `check` may raise to leave it undone."""
    run = stream.run
    eval_step, embed_step = jax.jit(step_lib.make_eval_step(model)), jax.jit(step_lib.make_embed_step(model))

    def evaluate(state) -> dict[str, float]:
        params, results = lora.merged(state.params if state.ema is None else state.ema, run.lora), {}
        for evaluator in run.eval.evaluators:
            data_set = eval_lib.named(evaluator)[1]
            subject = common.Subject(
                mixture.one(run, data_set), stream.layout, stream.tokenizer, mesh, eval_step, params,
                stream.held_out[data_set], run.eval.split, check, embed_step,
            )  # fmt: skip
            result = eval_lib.run(evaluator, subject)
            results |= {f"{evaluator}/{key}": float(value) for key, value in result.metrics.items()}
        return results

    return evaluate


# ---- loop


def loop(stream: Stream, folder: Path, mesh, model, tx, state, checkpoints, clock, asked, lines) -> dict[str, float]:
    """Trains from the state's step to the end, or until it is asked to stop -> the last evaluation."""
    run, start = stream.run, int(state.step)
    report = metrics.Report(folder, start, run.steps, run.log_every, run.batch * run.model.context, clock)
    report.line("\n".join([summary(stream, state.params, mesh, start), *lines]))
    evaluate, tally = make_evaluate(stream, mesh, model, asked.check), mixture.Tally(stream.source, stream.plan)
    batches = pipeline.batches(
        stream.source, stream.plan, stream.layout, run.batch, start, run.steps, run.data.threads,
        sharding.local_rows(mesh, run.batch),
    )  # fmt: skip

    def next_batch():
        with clock.spent("input"):
            return sharding.put_batch(next(batches), mesh, run.batch)

    def epoch_after(step: int) -> int:
        return stream.plan.locate(step * run.batch)[0]

    def is_due(step: int) -> bool:
        if run.eval.every and step % run.eval.every == 0 or step == run.steps:
            return True
        return not run.eval.every and epoch_after(step) != epoch_after(step - 1)

    def save_at(step: int) -> None:
        report.flush()  # a run that is killed after this resumes behind this step
        with clock.spent("checkpoint"):
            checkpoints.save(state)
        clock.write(step)

    def evaluate_at(step: int) -> None:
        with clock.spent("evaluation"):
            results = evaluate(state)
            checkpoints.record(step, results)
            report.evaluation(step, results)  # last: what the log has is done

    step, leaving, before = start, False, None
    with report, clock.spent("step"):
        try:
            done = checkpoint.first_decides(lambda: int(not start or metrics.evaluated(folder, start)))
            if not done and run.eval.evaluators and is_due(start):  # it was stopped in it
                evaluate_at(start)
            if start < run.steps:
                batch = next_batch()
                with clock.spent("compile"):
                    train_step = step_lib.compile_train_step(model, tx, run, state, mesh).lower(state, batch).compile()
            while step < run.steps and not leaving:
                step += 1
                state, values = train_step(state, batch)
                report.step(step, values, epoch_after(step - 1), functools.partial(tally.to, step * run.batch))
                if step < run.steps:
                    batch = next_batch()
                if before is not None:
                    guard(run, step - 1, before)  # one step late: nothing waits for it
                before, leaving, due = values, asked.asked(), is_due(step)
                saves = due or step % run.save_every == 0 or bool(run.keep_every) and step % run.keep_every == 0
                # Not while steps are skipped: good checkpoints would make room for those of ruined parameters.
                skipped = int(values["skipped_in_row"]) if saves else 0
                stuck = skipped > due and step < run.steps
                if leaving or saves and not stuck:
                    save_at(step)
                if due and not leaving and not stuck:
                    evaluate_at(step)
                if due or epoch_after(step) != epoch_after(step - 1):
                    report.epoch(step, epoch_after(step - 1))
            if before is not None:
                guard(run, step, before)
            with clock.spent("checkpoint"):
                checkpoints.wait()
        except stop.Interrupted:
            leaving = True
            checkpoints.wait()
        finally:
            clock.write(step)
            report.line(clock.summary(step))
    if leaving:
        raise command.Leave(f"asked to stop: saved step {step} of {run.steps} in {folder}; the same command goes on "
                            "from there", stop.PREEMPTED)  # fmt: skip
    report.line(f"done: {run.steps} steps, {clock.total() / 60:.1f} minutes in this process; {folder}")
    return report.results


def guard(run: config.Config, step: int, values) -> None:
    """Raises Leave when so many steps in a row were skipped that going on is no use."""
    in_row = int(values["skipped_in_row"])
    if in_row >= run.guard.limit:
        raise command.Leave(
            f"stopped by the guard: {in_row} steps up to step {step} were skipped in a row, their loss, gradient or "
            f"learning rate not finite or the loss beyond guard.spike={run.guard.spike} times its average (the last "
            f"loss was {float(values['loss']):.6g}). Parameters are those of step {step - in_row}. Lower optim.lr, "
            "look at the data of these steps, or raise guard.limit", stop.STOPPED,
        )  # fmt: skip


def summary(stream: Stream, params, mesh, start: int) -> str:
    """What is about to run: parameters by module, FLOPs and tokens a step, devices, data."""
    run, layout, source, tokenizer = stream.run, stream.layout, stream.source, stream.tokenizer
    counts = flops.parameters(params)
    step_flops = flops.train_step(run.model, layout, run.batch)
    needs = source.needs(0)
    fit, share = packing.fits(needs, layout), packing.used(needs, layout, stream.plan.epoch(0))
    many = {m: int(needs[fit, 1 + 2 * k].sum()) for k, m in enumerate(batch_lib.MEDIA) if layout.items[k]}
    names = ", ".join(run.data.mixture) or run.data.name
    lost = {part.name: int((~packing.fits(part.needs(0), layout)).sum()) for part in getattr(source, "parts", [source])}
    dropped = "".join(f"; {n:,} of {name} dropped, which no row can hold" for name, n in lost.items() if n)
    modules = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    total, moving = sum(counts.values()), optim.moving(run.optim, run.lora, params)
    return "\n".join([
        f"parameters  {total:,} ({modules})" + (f"; {moving:,} of them are trained" if moving < total else ""),
        f"a step      {run.batch} rows x {run.model.context} = {run.batch * run.model.context:,} positions, "
        f"{step_flops / 1e9:,.1f} GFLOP (attention counted whole)",
        f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
        f"data        {names}: {len(needs):,} documents an epoch{dropped}, {needs[fit, 0].sum():,} positions"
        + "".join(f", {n:,} {m}" for m, n in many.items()),
        "rows        " + ", ".join(f"{part:.1%} of {name}" for name, part in share.items()) + " used; "
        f"vocabulary {tokenizer.vocab}, fusion {run.model.fusion.kind}",
        f"steps       {run.steps:,}" + (f", resumed after {start:,}" if start else ""),
    ])  # fmt: skip


def main() -> None:
    with sharding.distributed(_DISTRIBUTED.value):
        train(config.from_flag(_CONFIG.value), Path(_WORKDIR.value))


if __name__ == "__main__":
    command.run(main, required=("config", "workdir"))
