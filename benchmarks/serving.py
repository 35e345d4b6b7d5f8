"""Continuous batching beside batches, in one run: python -m benchmarks.serving [--quick] [--out docs/results]

GPT-2's shape (124 M), random weights, float32; prompts of 32 tokens, answers as long as an exponential law says. Who is
compared:

    whole batches   batches whose answers all have the mean length: what a row can give at best
    padded          the ragged requests in batches as they come; each goes on until its longest answer is done
    continuous      the same requests through serve.engine: a row that is free is given to the next one

Each round runs all three, with matrices as the server holds them; ratios are of the same round, and the median of
rounds counts. A short and a long queue: QUEUES.
"""

import argparse
import json
import os
import queue
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.train_step import ALLOCATOR, machine

SLOTS, PROMPT, MEAN, MOST = 8, 32, 48, 192
QUEUES = 48, 144  # requests: of few the last answers, beside which rows are free, are a larger part


def lengths(count: int) -> list[int]:
    """-> tokens of each answer: exponential with mean MEAN, from 4 to MOST, the same in every run."""
    drawn = np.random.default_rng(0).exponential(MEAN, count)
    return np.clip(drawn.round().astype(int), 4, MOST).tolist()


def model():
    import jax

    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax import config, sharding
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import step as step_lib
    from gpt4v_jax.training.workdir import Trained

    backbone = config.Backbone(depth=12, width=768, heads=12, norm="layer", bias=config.BIASES, activation="gelu_tanh")
    run = config.Config(model=config.Model(vocab=50257, context=1024, position="learned", backbone=backbone))
    layout = batch_lib.layout(run.model, run.data)
    module, mesh = GPT4V(run.model, layout), sharding.make_mesh(config.Mesh())
    jax.set_mesh(mesh)
    params = jax.jit(lambda: step_lib.init_params(module, 0))()
    return Trained(run, layout, NoText(), mesh, module, params, 0, ())


class NoText:
    """A tokenizer without an end token: every answer is as long as it may be, and its text is not looked at."""

    ends, special = (), ()

    def decode(self, ids):
        return ""


def measure(trained, engine, rounds: int, requests: int, say=print) -> dict[str, list[tuple]]:
    """-> of each way and each round (tokens that somebody wanted, steps of the rows, seconds)."""
    from gpt4v_jax.generate import decode, prompts
    from gpt4v_jax.serve.requests import Request

    wanted = lengths(requests)
    mean = round(statistics.mean(wanted))
    rng = np.random.default_rng(1)
    asked = [prompts.plain(rng.integers(0, 50257, PROMPT).tolist()) for _ in wanted]

    def batches(n_of):
        steps = 0
        for i in range(0, requests, SLOTS):
            longest = n_of(wanted[i : i + SLOTS])
            decode.generate(trained, asked[i : i + SLOTS], max_new_tokens=longest)
            steps += longest
        return steps

    def whole():
        return mean * requests, batches(lambda _: mean)

    def padded():
        return sum(wanted), batches(max)

    def continuous():
        over: queue.Queue = queue.Queue()  # is told of ends alone, as the other ways are
        tokens, steps = (engine.counts[name] for name in ("tokens_total", "steps_total"))
        for prompt, n in zip(asked, wanted, strict=True):
            engine.submit(Request(prompt, max_new_tokens=n), lambda delta: delta.finish and over.put(delta.finish))
        ends = [over.get() for _ in asked]
        assert set(ends) == {"length"}, ends
        return engine.counts["tokens_total"] - tokens, engine.counts["steps_total"] - steps

    ways = {"whole batches": whole, "padded": padded, "continuous": continuous}
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in ways}
    for i in range(rounds + 1):  # the first one compiles
        for name, way in ways.items():
            before = time.perf_counter()
            tokens, steps = way()
            if i:
                found[name].append((tokens, steps, time.perf_counter() - before))
        say(f"round {i} of {rounds}")
    return found


def report(found: dict[str, list[tuple]], requests: int) -> str:
    speeds = {way: [tokens / seconds for tokens, _, seconds in rounds] for way, rounds in found.items()}
    ours, wanted = speeds["continuous"], lengths(requests)
    lines = [
        f"{requests} requests in {SLOTS} rows, prompts of {PROMPT} tokens, answers of {min(wanted)} to {max(wanted)} "
        f"tokens, {statistics.mean(wanted):.0f} on average; {len(ours)} rounds.",
        "",
        "| | steps | tokens/s, median (min - max) | continuous batching has |",
        "|---|---|---|---|",
    ]
    for way, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        beside = "" if way == "continuous" else f"{ratio:.2f} of it"
        speed = f"{statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f})"
        lines.append(f"| {way} | {found[way][-1][1]} | {speed} | {beside} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few requests: does it work?")
    parser.add_argument("--out", type=Path, help="a folder for serving.md")
    args = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]])
    from gpt4v_jax.generate import weights
    from gpt4v_jax.serve.engine import Engine

    def say(text):
        print(text, file=sys.stderr, flush=True)

    queues, rounds = ((SLOTS,), 1) if args.quick else (QUEUES, 5)
    here, trained = machine(), weights.turned(model())  # as the server has it
    engine = Engine(trained, SLOTS, queued=max(queues), prefix_bytes=0)
    for what in engine.warm():
        say(what)
    text = "\n\n".join(report(measure(trained, engine, rounds, n, say), n) for n in queues)
    engine.close()
    here["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    print(text)
    print(json.dumps(here))
    if args.out:
        facts = " · ".join(f"{name} {value}" for name, value in here.items())
        page = f"# Continuous batching\n\n`python -m benchmarks.serving --out docs/results`\n\n{facts}\n\n{text}\n"
        (args.out / "serving.md").write_text(page)


if __name__ == "__main__":
    main()
