"""Our decoding beside Hugging Face's, in one run: python -m benchmarks.decode [--quick] [--out docs/results]

GPT-2's shape (124 M) with random weights, the same on both sides: theirs are saved, ours are imported from there. Each
contestant lives in its own process and takes turns with the others, as in train_step.py.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.contestants import THREADS
from benchmarks.train_step import ALLOCATOR, machine

BATCHES = (1, 8)
PROMPT, NEW = 32, 128  # tokens
HF, OURS, INT8, W8A8, MEMORY = "HF generate", "gpt4v_jax", "gpt4v_jax, int8", "gpt4v_jax, w8a8", "sum"
BARS = {1: 1.6, 8: 1.8}  # how many times as fast as theirs ours in float32 is to be
READ = 1 << 30  # bytes that `sum` reads


def asked(rows: int) -> np.ndarray:
    """-> prompts [rows, PROMPT] int32: the same for every contestant."""
    return np.random.default_rng(0).integers(0, 50257, (rows, PROMPT), dtype=np.int32)


# ---- contestants: (folder with the weights, new tokens) -> (facts, run(rows) -> tokens [rows, new])


def theirs(folder: Path, new: int):
    """Comes first, and writes the weights that the others read."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    model.save_pretrained(folder)

    def run(rows):
        prompts = torch.from_numpy(asked(rows)).long()
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return out[:, PROMPT:].numpy()

    return {"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}, run


@dataclasses.dataclass(frozen=True)
class NoText:
    """A tokenizer without an end token: every answer has all its tokens, and their text is not looked at."""

    ends: tuple[int, ...] = ()
    special: tuple[str, ...] = ()

    def decode(self, ids):
        return ""


def ours(folder: Path, new: int, kind: str = "float32"):
    import jax

    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax import config
    from gpt4v_jax.generate import decode, prompts, weights
    from gpt4v_jax.interop import hf
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training.workdir import Trained

    imported = hf.load(folder)
    run = config.Config(model=imported.config)
    layout = batch_lib.layout(run.model, run.data)
    model = GPT4V(run.model, layout)
    trained = Trained(run, layout, NoText(), None, model, jax.tree.map(jax.numpy.asarray, imported.params), 0, ())
    trained = weights.turned(trained, kind)

    def run_one(rows):
        answers = decode.generate(trained, [prompts.plain(row) for row in asked(rows).tolist()], max_new_tokens=new)
        return np.array([answer.tokens for answer in answers])

    return {"bytes": sum(x.nbytes for x in jax.tree.leaves(trained.params))}, run_one


def memory(folder: Path, new: int):
    """What the memory gives: a sum of 1 GiB by torch."""
    import torch

    torch.set_num_threads(THREADS)
    numbers = torch.ones(READ // 4)
    return {}, lambda rows: numbers.sum().numpy()


CONTESTANTS = {
    HF: theirs, OURS: ours, INT8: lambda *given: ours(*given, "int8"), W8A8: lambda *given: ours(*given, "w8a8"),
    MEMORY: memory,
}  # fmt: skip


def work(pipe, name: str, *given) -> None:
    """A contestant's process: rows -> (wall seconds, CPU seconds, tokens), until it is sent 0."""
    try:
        facts, run = CONTESTANTS[name](*given)
        for rows in BATCHES:
            run(rows)  # compiles, and warms up
        pipe.send(facts)
    except Exception as error:
        pipe.send({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return
    while rows := pipe.recv():
        cpu, before = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        tokens = run(rows)
        wall, now = time.perf_counter() - before, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((wall, now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime, tokens.tolist()))


# ---- the run


def measure(rounds: int, new: int, say=print) -> dict:
    """-> {"facts": {contestant: facts}, "rounds": {rows: {contestant: [(wall, CPU) seconds of a round]}},
    "tokens": {rows: {contestant: what it said}}, "new": tokens of an answer}."""
    context = multiprocessing.get_context("spawn")
    workers, facts = {}, {}
    seconds = {rows: {name: [] for name in CONTESTANTS} for rows in BATCHES}
    tokens = {rows: {} for rows in BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in CONTESTANTS:  # one after the other: each compiles and warms up undisturbed
                pipe, far = context.Pipe()
                process = context.Process(target=work, args=(far, name, Path(folder), new), daemon=True)
                process.start()
                far.close()
                workers[name] = process, pipe
                facts[name] = pipe.recv()
                if "error" in facts[name]:
                    sys.exit(f"error: {name} does not work here: {facts[name]['error']}")
                say(f"{name} is ready")
            for rows in BATCHES:
                for _ in range(rounds):
                    for name, (_, pipe) in workers.items():
                        time.sleep(0.05)  # the last one's threads fall asleep
                        pipe.send(rows)
                        *spent, tokens[rows][name] = pipe.recv()
                        seconds[rows][name].append(spent)
            for _, pipe in workers.values():
                pipe.send(0)
            for process, _ in workers.values():
                process.join(20)
        finally:
            for process, _ in workers.values():
                process.kill()
    return {"facts": facts, "rounds": seconds, "tokens": tokens, "new": new}


def bytes_read(weights: int, rows: int, new: int) -> float:
    """-> bytes that a step reads: every weight but the positions' table, and the cache (k and v of 12 layers, 768
    wide, float32), which is half full on average."""
    return weights * (1 - 1024 * 768 / 124_439_808) + rows * 12 * 2 * 768 * 4 * (PROMPT + new / 2)


def table(result: dict, rows: int) -> list[dict]:
    """-> a line for each contestant: tokens/s, how many times as fast as theirs, share of the memory's bandwidth."""
    wall = {name: [w for w, _ in spent] for name, spent in result["rounds"][rows].items()}
    speed, new = READ / statistics.median(wall[MEMORY]), result["new"]

    def line(name):
        typical = statistics.median(wall[name])
        return {
            "contestant": name, "tokens_per_second": rows * new / typical, "ms_a_step": 1e3 * typical / new,
            "ms_min": 1e3 * min(wall[name]) / new, "ms_max": 1e3 * max(wall[name]) / new,
            "times_theirs": _ratio(wall[HF], wall[name]), "times_float32": _ratio(wall[OURS], wall[name]),
            "share_of_memory": bytes_read(result["facts"][name]["bytes"], rows, new) * new / typical / speed,
            "same_tokens": _same(result["tokens"][rows][HF], result["tokens"][rows][name]),
        }  # fmt: skip

    return [line(name) for name in (HF, OURS, INT8, W8A8)]


def _ratio(others: list[float], mine: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, mine, strict=True))


def _same(theirs: list[list[int]], mine: list[list[int]]) -> float:
    """-> of each row the share of tokens before the first that differs, on average: behind it the texts are two."""
    shares = []
    for a, b in zip(theirs, mine, strict=True):
        at = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
        shares.append(at / len(a))
    return statistics.mean(shares)


def busy(result: dict) -> str:
    """-> a warning when the contestants did not get their cores, else "".

    The sum keeps both cores busy; a share of them for it means that something else ran. So does a sum that mostly takes
    more than twice its best time, be it on another machine that shares the memory.
    """
    spent = [pair for of_rows in result["rounds"].values() for pair in of_rows[MEMORY]]
    cores = sum(cpu for _, cpu in spent) / sum(wall for wall, _ in spent)
    if cores <= 0.85 * THREADS:
        return f"NOT VALID: other load on this machine (`sum` got {cores:.2f} of {THREADS} cores). Run it alone."
    for rows, of_rows in result["rounds"].items():
        wall = [seconds for seconds, _ in of_rows[MEMORY]]
        if statistics.median(wall) > 2 * min(wall):
            return (f"NOT VALID: at batch {rows} the memory was somebody else's (`sum` took {min(wall):.2f} to "
                    f"{max(wall):.2f} s). Run it alone.")  # fmt: skip
    return ""


# ---- the report

HEADER = "| batch {rows} | tokens/s | ms a step | min - max | x HF | x our float32 | share of bandwidth | same tokens |"


def lines(result: dict) -> list[str]:
    out = []
    for rows in BATCHES:
        out += ["", HEADER.format(rows=rows), "|---" + "|---:" * 7 + "|"]
        for row in table(result, rows):
            out.append(
                f"| {row['contestant']} | {row['tokens_per_second']:.1f} | {row['ms_a_step']:.2f} | "
                f"{row['ms_min']:.2f} - {row['ms_max']:.2f} | {row['times_theirs']:.2f} | {row['times_float32']:.2f} | "
                f"{row['share_of_memory']:.0%} | {row['same_tokens']:.0%} |"
            )
    gigabytes = [READ / wall / 1e9 for of_rows in result["rounds"].values() for wall, _ in of_rows[MEMORY]]
    megabytes = ", ".join(f"{name} {result['facts'][name]['bytes'] / 1e6:.0f} MB" for name in (HF, OURS, INT8, W8A8))
    count = len(next(iter(result["rounds"].values()))[HF])
    out += ["", f"Weights: {megabytes}. The memory gives {statistics.median(gigabytes):.1f} GB/s (a sum of 1 GiB by "
            f"torch). Median of {count} rounds; ratios are medians of the rounds' ratios.", ""]  # fmt: skip
    for rows, bar in BARS.items():
        _, float32, *small = table(result, rows)
        eight = "; ".join(
            f"{row['contestant'].split(', ')[1]} {row['times_float32']:.2f} x our float32 (bar 1), "
            f"{row['times_theirs']:.2f} x HF (aim 3)" for row in small
        )  # fmt: skip
        out.append(f"- batch {rows}: float32 {float32['times_theirs']:.2f} x HF (bar {bar}); {eight}")
    return out + (["", f"**{busy(result)}**"] if busy(result) else [])


PAGE = """# Decoding beside Hugging Face's `generate`

Made by `{command}`; how it is timed stands in benchmarks/README.md.

{about}

GPT-2's shape (12 layers, width 768, 12 heads, vocabulary 50,257, context 1,024, tied), random weights, the same for
all; a prompt of {prompt} tokens, {new} new ones, greedy. Ours is `decode.generate`, theirs `GPT2LMHeadModel.generate`
in float32; both times are of the whole call. "Share of bandwidth" is the bytes that a step must read (weights and the
filled part of the cache) over what the memory gives in the same run. "Same tokens" is the share of an answer before
the first token that differs from theirs.
{table}

## What XLA makes of 8 bits

On a CPU `x @ values.astype(float32)` is not one loop: XLA writes the whole matrix as float32 (`wrapped_convert`)
and then calls the float32 product, so four times the bytes are written and read again. `layers.Turned` therefore
multiplies integers (int8 x int8 -> int32) where the rows are few. int8: each row of x is two digits of 8 bits times its
largest value, which are two rows of one product, and the sums are exact. w8a8: it is one digit, so that half as much is
multiplied. One row alone would fall to a scalar loop; two digits do not. With many rows (prompts), and on other
backends, the matrix is made float32, once for all rows.

## What is done for float32

Matrices lie outputs first (`weights.turned`, once after loading), and stand first in the product (`layers._product`);
the transpose behind it is a loop of its own. The cache holds heads before slots, as a step's products read it. It is no
longer than the longest answer needs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for decode.md and decode.json")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contestant at a batch size (default 7)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 16 tokens: does it work?")
    args = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: `make bench-decode` installs both", file=sys.stderr)
        sys.exit(2)
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more")
    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)  # read when a contestant's process starts
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if hasattr(os, "sched_setaffinity"):  # XLA takes every core it may run on
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:THREADS]))
    about = machine()
    result = measure(2 if args.quick else args.rounds, 16 if args.quick else NEW)
    about["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    print("\n".join(lines(result)))
    if args.out:
        shown = "\n".join(f"- {name}: {value}" for name, value in about.items())
        command = "python -m benchmarks.decode " + " ".join(sys.argv[1:])
        page = PAGE.format(command=command, about=shown, prompt=PROMPT, new=result["new"],
                            table="\n".join(lines(result)))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.md").write_text(page)
        tables = {rows: table(result, rows) for rows in BATCHES}
        (args.out / "decode.json").write_text(json.dumps({"machine": about, **result, "tables": tables}) + "\n")
        print(f"\nwritten: {args.out}/decode.md and decode.json")


if __name__ == "__main__":
    main()
