"""THE loop: python -m gpt4v_jax.train --config configs/digits_world.py --workdir runs/digits_world

The same command again goes on where the run was. Chapters: mesh, data, state, step, evaluation, loop.
"""

import dataclasses
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config, sharding
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.data import packing, pipeline, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.eval import common
from gpt4v_jax.interop import parts
from gpt4v_jax.model import flops
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import checkpoint, metrics, optim, workdir
from gpt4v_jax.training import step as step_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file, such as configs/digits_world.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; a run there is continued", allow_override=True)


def train(run: config.Config, folder: Path) -> dict[str, float]:
    """Runs `run` to its end in `folder` -> the metrics of the last evaluation."""
    started = time.time()
    # ---- mesh
    mesh = sharding.make_mesh(run.mesh)
    jax.set_mesh(mesh)
    sharding.check_batch(run.batch, mesh)

    # ---- data
    resumes = checkpoint.exists(folder)
    if resumes:
        workdir.check_same(folder, run, r"(?!model\.)")  # a model's parameters say more: they are compared below
    records = sources.open_split(run.data, "train")  # before the folder is made: what is missing is said at once
    if resumes:
        tokenizer = tokenizer_lib.load(folder / "tokenizer.json", run.data.end)
    else:
        tokenizer = tokenizer_lib.train(run.data.tokenizer, sources.corpus(run.data), run.data.vocab, run.data.end)
    there = workdir.load_config(folder).model.vocab if resumes else parts.vocab(run)
    vocab = run.model.vocab or max(tokenizer.vocab, there)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=vocab))
    layout = batch_lib.layout(run.model, run.data)
    source = sources.from_records(records, run.data, tokenizer, layout, run.seed)
    plan = packing.RowPlan(source.sizes, layout, run.seed)
    held_out = common.open_source(run, "validation", tokenizer, layout, run.eval.limit) if run.eval.evaluators else None
    eval_lib.check(run.eval.evaluators, held_out, run.data.name)
    next(pipeline.batches(source, plan, layout, run.batch, 0, 1))  # what is wrong with records is said before a file is

    # ---- state
    model = GPT4V(run.model, layout)
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(model, run.seed))
    state = step_lib.init_state(model, tx, run.seed, mesh)
    came_from = []
    if not resumes:
        params, came_from = parts.initialise(state.params, run, mesh)
        state = state.replace(params=params)
    workdir.create(folder)
    checkpoints = checkpoint.Checkpoints(folder, run.eval.best, run.eval.best_mode)
    if resumes:
        state = checkpoints.restore(state, checkpoints.latest())
        workdir.check_same(folder, run, r"model\.")
    start = int(state.step)
    if start < run.steps:
        workdir.describe(folder, run, tokenizer)

    # ---- step
    train_step = step_lib.compile_train_step(model, tx, run, state, mesh)
    eval_step = jax.jit(step_lib.make_eval_step(model))

    # ---- evaluation
    subject = common.Subject(run, layout, tokenizer, mesh, eval_step, None, held_out, "validation")

    def evaluate() -> dict[str, float]:
        results = {}
        for name in run.eval.evaluators:
            result = eval_lib.EVALUATORS[name](dataclasses.replace(subject, params=state.params))
            results |= {f"{name}/{key}": float(value) for key, value in result.metrics.items()}
        if run.eval.best:
            config.one_of("eval.best", run.eval.best, tuple(results))
        return results

    # ---- loop
    minutes = [line["minutes"] for line in metrics.read(folder) if "minutes" in line] if start else []
    spent = minutes[-1] if minutes else 0.0
    log = metrics.Log(folder, start)
    progress = metrics.Progress(run.steps, start)
    progress.line("\n".join([summary(run, layout, state.params, mesh, source, tokenizer, start), *came_from]))
    batches = pipeline.batches(source, plan, layout, run.batch, start, run.steps, run.data.threads)
    row_tokens = run.batch * run.model.context
    results, evaluated = {}, 0  # the newest evaluation, and its step
    epoch, since = plan.locate(start * run.batch)[0], []  # since: device scalars since the last line
    compiled = None  # when the first step was done

    def show(done: dict | None) -> None:
        if done and "tokens_per_second" in done:
            left = (run.steps - done["step"]) * row_tokens / done["tokens_per_second"]
            progress.show(done["step"], done["loss"], done["tokens_per_second"], left)

    def minutes_spent() -> float:
        return spent + (time.time() - started) / 60

    with progress:
        for step in range(start + 1, run.steps + 1):
            state, values = train_step(state, sharding.put_batch(next(batches), mesh))
            since.append((values["loss"], values["accuracy"]))
            if compiled is None:
                jax.block_until_ready(values)
                compiled, paused = time.time(), 0.0
                progress.line(f"first step done after {compiled - started:.1f} s, compilation included")
                log.write(step, values)
            elif step % run.log_every == 0 or step == run.steps:
                rate = row_tokens * (step - start - 1) / max(time.time() - compiled - paused, 1e-9)
                show(log.later(step, values | {"tokens_per_second": rate, "epoch": epoch, "minutes": minutes_spent()}))
            progress.advance(step)

            last = step == run.steps
            here, epoch = epoch, plan.locate(step * run.batch)[0]
            due = last or (step % run.eval.every == 0 if run.eval.every else epoch != here)
            saves = due or step % run.save_every == 0
            if saves:
                show(log.flush())  # a run that is killed after this resumes behind this step
            if due:
                before = time.time()
                results = evaluate()
                log.write(step, results | {"minutes": minutes_spent()})
                evaluated = step
                paused += time.time() - before
            if due or epoch != here:
                progress.line(_line(step, here, since, results, evaluated))
                since = []
            if saves:
                checkpoints.save(state, results if due else None)
    log.close()
    checkpoints.wait()
    checkpoints.close()
    progress.line(f"done: {run.steps} steps, {(time.time() - started) / 60:.1f} minutes in this process; {folder}")
    return results


def summary(run, layout, params, mesh, source, tokenizer, start) -> str:
    """What is about to run: parameters by module, FLOPs and tokens a step, devices, data."""
    counts = flops.parameters(params)
    step_flops = flops.train_step(run.model, layout, run.batch)
    lengths, media = source.sizes(0)
    modules = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    return "\n".join([
        f"parameters  {sum(counts.values()):,} ({modules})",
        f"a step      {run.batch} rows x {run.model.context} = {run.batch * run.model.context:,} positions, "
        f"{step_flops / 1e9:,.1f} GFLOP (attention counted whole)",
        f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
        f"data        {run.data.name}: {len(lengths):,} documents, {lengths.sum():,} positions, "
        f"{media.sum():,} pictures an epoch; vocabulary {tokenizer.vocab}, fusion {run.model.fusion.kind}",
        f"steps       {run.steps:,}" + (f", resumed after {start:,}" if start else ""),
    ])  # fmt: skip


def _line(step: int, epoch: int, since, results: dict[str, float], evaluated: int) -> str:
    loss, accuracy = (sum(float(x) for x in column) / len(since) for column in zip(*since, strict=True))
    held_out = "  ".join(f"{name} {value:.4f}" for name, value in results.items() if name.count("/") == 1)
    at = "" if evaluated == step else f" of step {evaluated}"
    held_out = f"  | validation{at} {held_out}" if held_out else ""
    return f"epoch {epoch} step {step}  loss {loss:.4f}  token accuracy {accuracy:.4f}{held_out}"


def main() -> None:
    train(config.from_flag(_CONFIG.value), Path(_WORKDIR.value))


if __name__ == "__main__":
    command.run(main, required=("config", "workdir"))
