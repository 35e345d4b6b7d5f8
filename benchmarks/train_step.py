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
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

THREADS = 2
ALLOCATOR = "glibc.malloc.hugetlb=1"  # for all contestants, unless the environment says otherwise
BATCHES = 4  # different ones, in turn
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
SGEMM = 2048  # side of the square matrices whose product gives the peak
OURS, EAGER, COMPILED, PEAK = "gpt4v_jax", "torch eager", "torch compiled", "sgemm"


@dataclasses.dataclass(frozen=True)
class Case:
    width: int
    context: int
    depth: int
    heads: int
    gelu: str  # tanh | exact
    steps: int  # a round
    rows: int = 12
    vocab: int = 65

    @property
    def name(self) -> str:
        return f"width {self.width} x context {self.context}, {self.gelu} GELU"

    @property
    def tokens(self) -> int:
        return self.rows * self.context


CASES = [
    Case(width, context, depth, heads, gelu, steps)
    for width, context, depth, heads, steps in ((128, 64, 4, 4, 30), (384, 256, 6, 6, 2))
    for gelu in ("tanh", "exact")
]


def token_batches(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> BATCHES x (tokens, targets), [B,T] int32: the same for every contestant."""
    stream = np.random.default_rng(0).integers(0, case.vocab, (BATCHES, case.rows, case.context + 1), dtype=np.int32)
    return [(rows[:, :-1], rows[:, 1:]) for rows in stream]


# ---- contestants: (case) -> (facts to check, step(i) -> nothing, wait() -> last loss)


def ours(case: Case):
    import jax

    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax import sharding
    from gpt4v_jax.model import flops
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import optim
    from gpt4v_jax.training import step as step_lib

    run = our_config(case)
    mesh = sharding.make_mesh(run.mesh)
    jax.set_mesh(mesh)
    layout = batch_lib.layout(run.model, run.data)
    model = GPT4V(run.model, layout)
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(model))
    state = step_lib.init_state(model, tx, run.seed, mesh)
    train_step = step_lib.compile_train_step(model, tx, run, state, mesh)
    empty = batch_lib.empty(layout, case.rows)
    position = np.broadcast_to(np.arange(case.context, dtype=np.int32)[:, None], empty.position.shape)
    document, weight = np.ones_like(empty.document), np.ones_like(empty.weight)
    batches = [
        empty.replace(tokens=tokens, target=target, position=position, document=document, weight=weight)
        for tokens, target in token_batches(case)
    ]
    values = None

    def step(i):
        nonlocal state, values
        state, values = train_step(state, sharding.put_batch(batches[i % BATCHES], mesh))

    return {"parameters": sum(flops.parameters(state.params).values())}, step, lambda: float(values["loss"])


def our_config(case: Case):
    from gpt4v_jax import config

    backbone = config.Backbone(
        depth=case.depth, width=case.width, heads=case.heads, norm="layer", norm_eps=1e-5, bias=True,
        activation={"tanh": "gelu_tanh", "exact": "gelu"}[case.gelu],
    )  # fmt: skip
    model = config.Model(vocab=case.vocab, context=case.context, position="learned", backbone=backbone)
    optimizer = config.Optim(
        lr=LR, schedule="constant", warmup=0, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, clip=CLIP
    )
    return config.Config(batch=case.rows, model=model, optim=optimizer, mesh=config.Mesh(data=1))


def torch_gpt2(case: Case, compiled: bool = False):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.depth, n_head=case.heads,
        activation_function={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[case.gelu], use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )).train()  # fmt: skip
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    facts = {
        "parameters": sum(p.numel() for p in parameters),
        "attention": model.config._attn_implementation,
    }
    run = torch.compile(model) if compiled else model
    batches = token_batches(case)
    loss = None

    def step(i):
        nonlocal loss
        tokens, target = (torch.from_numpy(x).long() for x in batches[i % BATCHES])
        # shift_labels: the targets are shifted already, so that every position is trained, as in ours
        loss = run(input_ids=tokens, labels=target, shift_labels=target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return facts, step, lambda: loss.item()


def sgemm(case: Case):
    """The peak: a product of square float32 matrices by torch (oneMKL), the fastest one at hand."""
    import torch

    torch.set_num_threads(THREADS)
    a, b = torch.randn(SGEMM, SGEMM), torch.randn(SGEMM, SGEMM)
    out = torch.empty(SGEMM, SGEMM)
    return {}, lambda i: torch.mm(a, b, out=out), lambda: 0.0


CONTESTANTS = {
    OURS: ours,
    EAGER: torch_gpt2,
    COMPILED: lambda case: torch_gpt2(case, compiled=True),
    PEAK: sgemm,
}


# ---- a contestant's process


def work(pipe, name: str, case: Case) -> None:
    """Makes the contestant, warms it up and then runs a round whenever asked: n steps -> (wall, CPU) seconds a step."""
    try:
        facts, step, wait = CONTESTANTS[name](case)
        step(0)
        facts["first_loss"] = wait()
        for i in range(1, 4):
            step(i)
        wait()
        pipe.send(facts)
    except Exception as error:  # such as no C++ compiler for torch.compile: reported, and the others go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send({"error": text[:300]})
        return
    while steps := pipe.recv():
        before, cpu = time.perf_counter(), _cpu_seconds()
        for i in range(steps):
            step(i)
        wait()
        pipe.send(((time.perf_counter() - before) / steps, (_cpu_seconds() - cpu) / steps))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- the run


def measure(case: Case, rounds: int, say=print) -> dict:
    """-> {"facts": {contestant: facts}, "seconds": {contestant: [a round's wall seconds a step]}, "cpu": the same}."""
    context = multiprocessing.get_context("spawn")
    workers, facts = {}, {}
    try:
        for name in CONTESTANTS:  # one after the other: each compiles and warms up undisturbed
            pipe, far = context.Pipe()
            process = context.Process(target=work, args=(far, name, case), daemon=True)
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
    run = our_config(case)
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
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "torch", "transformers")}
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
