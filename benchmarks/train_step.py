"""Our training step beside PyTorch's, in one run: python -m benchmarks.train_step [--quick] [--out FILE.md]

What is compared with what, and how, is in benchmarks/README.md. Every contestant lives in its own process and takes
turns with the others, so that a machine that is busy for a while is busy for all of them.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import contestants
from benchmarks.contestants import CASES, CONTESTANTS, EAGER, OURS, PEAK, SGEMM, THREADS, Case

ALLOCATOR = "glibc.malloc.hugetlb=1"  # for all contestants, unless the environment says otherwise


# ---- the run


def measure(case: Case, rounds: int, say=print) -> dict:
    """-> {"facts": {contestant: facts}, "seconds": {contestant: [a round's wall seconds a step]}, "cpu": the same}."""
    context = multiprocessing.get_context("spawn")
    workers, facts = {}, {}
    try:
        for name in CONTESTANTS:  # one after the other: each compiles and warms up undisturbed
            pipe, far = context.Pipe()
            process = context.Process(target=contestants.work, args=(far, name, case), daemon=True)
            process.start()
            far.close()
            try:
                facts[name] = pipe.recv()
            except EOFError:
                facts[name] = {"error": "its process ended"}
            if "error" in facts[name]:
                say(f"  {name} does not work here: {facts[name]['error']}")
            else:
                workers[name] = process, pipe
        check(case, {name: facts[name] for name in workers if name != PEAK})
        seconds = {name: [] for name in workers}
        cpu = {name: [] for name in workers}
        for _ in range(rounds):
            for name, (_, pipe) in workers.items():
                time.sleep(0.05)  # the last one's threads fall asleep
                pipe.send(case.steps if name != PEAK else 4)
                wall, used = pipe.recv()
                seconds[name].append(wall)
                cpu[name].append(used)
        for _, pipe in workers.values():
            pipe.send(0)
        for process, _ in workers.values():
            process.join(20)
    finally:
        for process, _ in workers.values():
            process.kill()
    return {"case": dataclasses.asdict(case), "facts": facts, "seconds": seconds, "cpu": cpu}


def check(case: Case, facts: dict[str, dict]) -> None:
    """The contestants are the same model: as many parameters, and a first loss of ln(V) for random weights."""
    counts = {name: fact["parameters"] for name, fact in facts.items()}
    if len(set(counts.values())) != 1:
        sys.exit(f"error: the models differ in their number of parameters: {counts}")
    for name, fact in facts.items():
        if abs(fact["first_loss"] / math.log(case.vocab) - 1) > 0.05:
            sys.exit(f"error: {name}'s first loss is {fact['first_loss']:.4f}, ln(V) is {math.log(case.vocab):.4f}")


def rows(result: dict) -> list[dict]:
    """-> one row of the table a contestant: milliseconds, tokens/s, our speed relative to it, share of the peak."""
    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax.model import flops

    case = Case(**result["case"])
    run = contestants.our_config(case)
    step_flops = flops.train_step(run.model, batch_lib.layout(run.model, run.data), case.rows, causal=True)
    seconds = result["seconds"]
    peak = 2 * SGEMM**3 / statistics.median(seconds[PEAK])
    table = []
    for name in seconds:
        if name == PEAK:
            continue
        typical = statistics.median(seconds[name])
        ratios = [other / our for other, our in zip(seconds[name], seconds[OURS], strict=True)]
        table.append({
            "contestant": name,
            "ms": 1e3 * typical,
            "ms_min": 1e3 * min(seconds[name]),
            "ms_max": 1e3 * max(seconds[name]),
            "tokens_per_second": case.tokens / typical,
            "ours_is_faster": statistics.median(ratios),
            "share_of_peak": step_flops / typical / peak,
            "cores": sum(result["cpu"][name]) / sum(seconds[name]),
            "first_loss": result["facts"][name]["first_loss"],
        })  # fmt: skip
    return table


# ---- the report

HEADER = ["", "ms a step", "min - max", "tokens/s", "gpt4v_jax is faster by", "share of peak", "cores busy"]


def cells(row: dict) -> list[str]:
    return [
        row["contestant"], f"{row['ms']:.1f}", f"{row['ms_min']:.1f} - {row['ms_max']:.1f}",
        f"{row['tokens_per_second']:,.0f}", "" if row["contestant"] == OURS else f"{row['ours_is_faster']:.2f} x",
        f"{row['share_of_peak']:.2f}", f"{row['cores']:.2f}",
    ]  # fmt: skip


def busy(result: dict) -> str:
    """-> a warning when the contestants did not get their cores, else "".

    Our step keeps only most of both cores busy, so it is the sgemm that tells.
    """
    cores = sum(result["cpu"][PEAK]) / sum(result["seconds"][PEAK])
    if cores > 0.9 * THREADS:
        return ""
    return f"NOT VALID: other load on this machine (sgemm got {cores:.2f} of {THREADS} cores). Run it alone."


def facts_line(result: dict) -> str:
    case, facts = Case(**result["case"]), result["facts"]
    losses = ", ".join(f"{name} {fact['first_loss']:.4f}" for name, fact in facts.items() if name in (OURS, EAGER))
    peak = 2 * SGEMM**3 / statistics.median(result["seconds"][PEAK]) / 1e9
    return (
        f"{case.rows} rows, vocabulary {case.vocab}, {case.depth} layers, {case.heads} heads, "
        f"{facts[OURS]['parameters']:,} parameters on both sides; first losses {losses} "
        f"(ln V = {math.log(case.vocab):.4f}); sgemm peak {peak:.0f} GFLOP/s; "
        f"{len(result['seconds'][OURS])} rounds of {case.steps} steps."
    )


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    packages = ("jax", "flax", "optax", "torch", "transformers")  # the last two are not everywhere
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": f"{cpu}, {os.cpu_count()} cores, {THREADS} threads a contestant",
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "environment": ", ".join(f"{k}={os.environ[k]}" for k in ("GLIBC_TUNABLES", "XLA_FLAGS") if k in os.environ),
        "load": f"{os.getloadavg()[0]:.1f} before the start",
    }


def commit() -> str:
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "none") + (" with changes" if changed else "")


def show(console, result: dict) -> None:
    import rich.table

    table = rich.table.Table(title=Case(**result["case"]).name, title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row in rows(result):
        table.add_row(*cells(row))
    console.print(table)
    console.print("\n".join(line for line in (facts_line(result), busy(result)) if line) + "\n")


def write(path: Path, about: dict, results: list[dict]) -> None:
    """`path` as markdown, and beside it the same with every single round as JSON."""
    lines = ["# A training step beside PyTorch", "", "Made by `make bench`; benchmarks/README.md says how.", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    for result in results:
        lines += ["", f"## {Case(**result['case']).name}", "", facts_line(result), ""]
        lines += [f"**{busy(result)}**", ""] if busy(result) else []
        lines += ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(result)]
        for name, fact in result["facts"].items():
            if "error" in fact:
                lines += ["", f"{name} does not work here: {fact['error']}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    full = {"machine": about, "results": [result | {"table": rows(result)} for result in results]}
    path.with_suffix(".json").write_text(json.dumps(full, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table to this markdown file, and all rounds to .json")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contestant in a case (default 7)")
    parser.add_argument("--width", type=int, choices=sorted({case.width for case in CASES}), help="only these cases")
    parser.add_argument("--quick", action="store_true", help="2 rounds of a few steps: does it work?")
    args = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: `make bench` installs both (Python 3.11)", file=sys.stderr)
        sys.exit(2)
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more")

    import rich.console

    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)  # read when a contestant's process starts
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if hasattr(os, "sched_setaffinity"):  # XLA takes every core it may run on
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:THREADS]))
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    about, results = machine(), []
    for name, value in about.items():
        console.print(f"{name:12}{value}", soft_wrap=True)
    console.print()
    for case in CASES:
        if args.width in (None, case.width):
            if args.quick:
                case = dataclasses.replace(case, steps=min(case.steps, 3))
            results.append(measure(case, 2 if args.quick else args.rounds, console.print))
            show(console, results[-1])
    about["load"] += f", {os.getloadavg()[0]:.1f} at the end ({THREADS}.0 is the benchmark alone)"
    if args.out:
        write(args.out, about, results)
        console.print(f"written: {args.out} and {args.out.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
