"""Continuous batching beside batches, in one run: python -m benchmarks.serving [--quick] [--out docs/results]

GPT-2's shape (124 M), random weights, float32; answers as long as an exponential law says, and prompts of 32 tokens or,
in a queue twice as long, as such a law says, too. Who is compared:

    whole batches   batches whose answers all have the mean length: what a row can give at best
    padded          the ragged requests in batches as they come; each goes on until its longest answer is done
    continuous      the same requests through serve.engine: a row that is free is given to the next one

Each round runs all three, with matrices as the server holds them; ratios are of the same round, and the median of
rounds counts.
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
WORKLOADS = {"prompts of one length": (48, False), "ragged prompts, too": (96, True)}  # requests, are prompts ragged?


def lengths(count: int, mean: int = MEAN, most: int = MOST, seed: int = 0) -> list[int]:
    """-> so many lengths in tokens: exponential, from 4 to `most`, the same in every run."""
    drawn = np.random.default_rng(seed).exponential(mean, count)
    return np.clip(drawn.round().astype(int), 4, most).tolist()


def prompt_lengths(count: int, ragged: bool) -> list[int]:
    return lengths(count, PROMPT, 4 * PROMPT, 1) if ragged else [PROMPT] * count


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


def measure(trained, engine, rounds: int, requests: int, ragged: bool, say=print) -> dict[str, list[tuple]]:
    """-> of each way and each round (tokens that somebody wanted, seconds)."""
    from gpt4v_jax.generate import decode, prompts
    from gpt4v_jax.serve.requests import Request

    wanted = lengths(requests)
    mean = round(statistics.mean(wanted))
    rng = np.random.default_rng(1)
    asked = [prompts.plain(rng.integers(0, 50257, n).tolist()) for n in prompt_lengths(requests, ragged)]

    def batches(n_of):
        for i in range(0, requests, SLOTS):
            decode.generate(trained, asked[i : i + SLOTS], max_new_tokens=n_of(wanted[i : i + SLOTS]))

    def whole():
        batches(lambda _: mean)
        return mean * requests

    def padded():
        batches(max)
        return sum(wanted)

    def continuous():
        told: queue.Queue = queue.Queue()
        for prompt, n in zip(asked, wanted, strict=True):
            engine.submit(Request(prompt, max_new_tokens=n), lambda delta: told.put((len(delta.tokens), delta.finish)))
        tokens, left = 0, requests
        while left:
            n, finish = told.get()
            tokens, left = tokens + n, left - bool(finish)
        return tokens

    ways = {"whole batches": whole, "padded": padded, "continuous": continuous}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
    for i in range(rounds + 1):  # the first one compiles
        for name, way in ways.items():
            before = time.perf_counter()
            tokens = way()
            if i:
                found[name].append((tokens, time.perf_counter() - before))
        say(f"round {i} of {rounds}")
    return found


def report(name: str, found: dict[str, list[tuple]], requests: int, ragged: bool) -> str:
    speeds = {way: [tokens / seconds for tokens, seconds in rounds] for way, rounds in found.items()}
    ours, wanted, asked = speeds["continuous"], lengths(requests), prompt_lengths(requests, ragged)
    lines = [
        f"## {name.capitalize()}",
        "",
        f"{requests} requests in {SLOTS} rows, prompts of {min(asked)} to {max(asked)} tokens "
        f"({statistics.mean(asked):.0f} on average), answers of {min(wanted)} to {max(wanted)} "
        f"({statistics.mean(wanted):.0f}); {len(ours)} rounds.",
        "",
        "| | tokens/s, median (min - max) | continuous batching has |",
        "|---|---|---|",
    ]
    for way, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        beside = "" if way == "continuous" else f"{ratio:.2f} of it"
        lines.append(f"| {way} | {statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f}) | {beside} |")
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

    here, parts = machine(), []
    trained = weights.turned(model())  # as the server has it
    engine = Engine(trained, SLOTS, queued=max(n for n, _ in WORKLOADS.values()), prefix_bytes=0)
    for what in engine.warm():
        say(what)
    for name, (requests, ragged) in WORKLOADS.items():
        requests, rounds = (SLOTS, 1) if args.quick else (requests, 5)
        parts.append(report(name, measure(trained, engine, rounds, requests, ragged, say), requests, ragged))
        print(parts[-1] + "\n", flush=True)
    engine.close()
    here["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    print(json.dumps(here))
    if args.out:
        facts = " · ".join(f"{name} {value}" for name, value in here.items())
        page = f"# Continuous batching\n\n`python -m benchmarks.serving --out docs/results`\n\n{facts}\n\n"
        (args.out / "serving.md").write_text(page + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
