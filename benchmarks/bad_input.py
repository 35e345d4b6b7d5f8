"""Bad input at a live server: python -m benchmarks.bad_input [--quick] [--out docs/results]

The server is `python -m gpt4v_jax.serve`, with two keys. Whoever has one asks well: a question about a picture, an
answer of 64 tokens, again and again, from a process of its own. Whoever has the other sends each kind of bad input,
again as soon as it is answered. What is told of each kind: the status, the message, and how long the good answers took
beside those just before, when nothing else was asked. The model is of random weights: its answers do not matter here.
"""

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.bad_kinds import (
    BARS,
    CHAT,
    KEYS,
    TOKENS,
    Kind,
    client,
    crowd,
    gauge,
    kinds,
    picture,
    send,
    shown,
    uri,
)
from benchmarks.train_step import ALLOCATOR, machine

# A model of 12.5 M parameters that reads pictures, clips and sounds, after a step of training.
TRAIN = [
    "--config=configs/quickstart.py", "--config.data.name=digits_world/small", "--config.steps=1", "--config.batch=2",
    "--config.model.context=1024", "--config.model.backbone.depth=6", "--config.model.backbone.width=384",
    "--config.model.backbone.heads=6", "--config.model.video.size=40", "--config.model.video.patch=20",
    "--config.model.video.frames=8", "--config.model.video.tubelet=2", "--config.model.audio.bins=80",
    "--config.model.audio.patch=4", "--config.model.audio.seconds=6.0", "--config.data.video.per_row=1",
    "--config.data.audio.per_row=1", "--config.data.audio.patches=200", "--config.eval.evaluators=()",
    "--config.eval.best=",
]  # fmt: skip

PREFIXES = 32 << 20  # bytes of remembered prompts, few: good questions fill them, and that is no growth by bad input


# ---- the run


def ask_well(address: str, pipe) -> None:
    """A process: good questions about one picture, one after the other, none of them twice, so that each must be read;
    (began, ended, status) of each, until something comes."""
    more = {"max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0}
    with client(address, "good") as asked:
        for n in itertools.count():
            if pipe.poll():
                break
            body = shown(uri(picture(64)), text=f"{n}: what is to be seen?") | more
            began = time.monotonic()
            status = asked.post(CHAT, json=body).status_code
            pipe.send((began, time.monotonic(), status))


@dataclasses.dataclass
class Found:
    name: str
    sent: int
    statuses: list[int]
    right: bool
    said: str
    times: list[float]  # the good answers' beside it, over the median of those just before
    mebibytes: float  # resident, at most, behind each that was sent


def resident(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def measure(workdir: Path, quick: bool, say=print) -> dict:
    """-> {"found": [Found], "alone": seconds of good answers, "mebibytes": (before, behind the first of each kind, at
    the end), "hits": of the victim, "end": seconds from SIGTERM under load to the end, "status": of the process}."""
    least = 2 if quick else 5
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as victim:
        folder = Path(name)
        keys = folder / "keys"
        keys.write_text("".join(f"{who} {key}\n" for who, key in KEYS.items()))
        hits = []
        threading.Thread(target=lambda: [hits.append(victim.accept()) for _ in range(10**6)], daemon=True).start()
        command = [sys.executable, "-m", "gpt4v_jax.serve", f"--workdir={workdir}", "--port=0", f"--api_keys={keys}",
                   "--allow_hosts=*", "--name=it", f"--prefix_bytes={PREFIXES}"]  # fmt: skip
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            line = ""
            while "http://" not in line:
                line = server.stdout.readline() or sys.exit("error: the server did not start; run it by hand: "
                                                            + " ".join(command))  # fmt: skip
            address = re.search(r"http://[^/\s]+", line)[0]
            threading.Thread(target=server.stdout.read, daemon=True).start()
            pipe, far = multiprocessing.get_context("spawn").Pipe()
            good = multiprocessing.get_context("spawn").Process(target=ask_well, args=(address, far), daemon=True)
            good.start()
            alone = _well(pipe, 4 * least)[least:]  # after what it compiles
            cases, before = kinds(victim.getsockname()[1], folder), resident(server.pid)
            with client(address, "bad") as asked:  # what compiles for a kind is no part of what others notice
                for kind in () if quick else cases:
                    for body in kind.bodies[:1]:
                        send(asked, kind, body)
            first, found = resident(server.pid), []
            for kind in cases:
                rest = statistics.median(_well(pipe, least))
                found.append(_beside(kind, address, pipe, least, rest, server.pid))
                found[-1].said = found[-1].said.replace(name, "/...")  # where it lay is this machine's alone
                say(line_of(found[-1]), flush=True)
            alone += _well(pipe, least)
            after = resident(server.pid)
            threading.Thread(target=crowd_to_the_end, args=(address,), daemon=True).start()
            while gauge(address, "running") < 8:
                time.sleep(0.02)
            server.send_signal(signal.SIGTERM)
            began = time.monotonic()
            status = server.wait(30)
            ended = time.monotonic() - began
            good.kill()
        finally:
            server.kill()
        return {"found": found, "alone": alone, "mebibytes": (before, first, after), "hits": len(hits), "end": ended,
                "status": status}  # fmt: skip


def crowd_to_the_end(address: str) -> None:
    with contextlib.suppress(Exception):  # the server ends beneath it
        crowd(address)


def _well(pipe, count: int) -> list[float]:
    """-> seconds of the next `count` good answers that begin from now on."""
    now, found = time.monotonic(), []
    while len(found) < count:
        began, ended, status = pipe.recv()
        if status != 200:
            sys.exit(f"error: a good request was answered with {status}")
        if began >= now:
            found.append(ended - began)
    return found


def _beside(kind: Kind, address: str, pipe, least: int, rest: float, pid: int) -> Found:
    """Sends a kind over and over until `least` good answers have begun and ended beside it."""
    statuses, right, said, over = [], True, "", threading.Event()
    seconds: list[float] = []
    most = 0.0

    def count():
        seconds.extend(_well(pipe, least))
        over.set()

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    sent = 0
    with client(address, "bad") as asked:
        while not over.is_set():
            if kind.act:
                fine, got, said = kind.act(address)
                right &= fine
                statuses += got
                sent += 1
                most = max(most, resident(pid))
            for body in kind.bodies:
                status, message = send(asked, kind, body)
                right &= status in kind.statuses
                statuses.append(status)
                said = said or message
                sent += 1
                most = max(most, resident(pid))
    counting.join()
    times = [s / rest for s in seconds]
    return Found(kind.name, sent, sorted(set(statuses)), right, said, times, most)


# ---- the report


def line_of(found: Found) -> str:
    statuses = ", ".join(map(str, found.statuses)) or "-"
    said = " ".join(found.said.split()).replace("|", "\\|")
    said = said if len(said) <= 110 else said[:107] + "..."
    return (f"| {found.name} | {found.sent} | {statuses}{'' if found.right else ' **wrong**'} | {said} | "
            f"{statistics.median(found.times):.2f} | {max(found.times):.2f} | {found.mebibytes:.0f} |")  # fmt: skip


def lines(result: dict) -> list[str]:
    found, (before, first, after) = result["found"], result["mebibytes"]
    slower = [f.name for f in found if statistics.median(f.times) > BARS["times"]]
    wrong = [f.name for f in found if not f.right]
    worst = max(found, key=lambda f: statistics.median(f.times))
    most, alone = max(f.mebibytes for f in found), 1000 * statistics.median(result["alone"])
    return [
        "| bad input | sent | status | the first message | good answers: median x | worst x | MiB |",
        "|---|---:|---|---|---:|---:|---:|",
        *map(line_of, found),
        "",
        f"- answered as they should be: {len(found) - len(wrong)} of {len(found)} kinds"
        + (f"; wrong: {'; '.join(wrong)}" if wrong else ""),
        f"- a good answer of {TOKENS} tokens takes {alone:.0f} ms alone; beside bad input at most "
        f"{statistics.median(worst.times):.2f} x in the median ({worst.name}), a single one "
        f"{max(max(f.times) for f in found):.2f} x; medians above {BARS['times']:g}: {'; '.join(slower) or 'none'}",
        f"- memory: {before:.0f} MiB before any bad input, {first:.0f} behind the first of each kind, {most:.0f} at "
        f"most from then on, {after:.0f} at the end: {max(first, most) - before:+.0f} (bar +{BARS['mebibytes']})",
        f"- connections that came to the port that must not be reached: {result['hits']}",
        f"- SIGTERM under 64 clients: ended after {result['end']:.1f} s (bar {BARS['end_seconds']:g}) with status "
        f"{result['status']}",
    ]  # fmt: skip


PAGE = """# Bad input at a live server

Made by `{command}`.

{about}

`python -m gpt4v_jax.serve` with a model of 12.5 M parameters that reads pictures, clips and sounds, and two users. One
asks about a picture and gets {tokens} tokens, one request after the other; the other one sends bad input, each kind
again as soon as it was answered, until {least} good answers have come and gone beside it. "x" is their time over the
median of the {least} just before, when nobody else asked; both clients run on the server's own cores. Before the
first kind each was sent once, which compiles what some of them need: that is in the memory, not in the times. Redirects
to forbidden addresses need a host that may be asked: tests/serve/test_fetch.py has them.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bad_input", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for bad_input.md")
    parser.add_argument("--workdir", type=Path, help="a run to serve, in place of a random model")
    parser.add_argument("--quick", action="store_true", help="2 good answers beside each kind: does it work?")
    args = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    os.environ["JAX_PLATFORMS"] = "cpu"
    about = machine()
    with tempfile.TemporaryDirectory() as made:
        workdir = args.workdir or Path(made) / "run"
        if not args.workdir:
            subprocess.run([sys.executable, "-m", "gpt4v_jax.train", f"--workdir={workdir}", *TRAIN], check=True)
        result = measure(workdir, args.quick)
    about["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    print("\n".join(lines(result)))
    if args.out:
        facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
        command = "python -m benchmarks.bad_input " + " ".join(sys.argv[1:])
        page = PAGE.format(command=command, about=facts, tokens=TOKENS, least=2 if args.quick else 5,
                           table="\n".join(lines(result)))  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bad_input.md").write_text(page)
        print(f"\nwritten: {args.out}/bad_input.md")


if __name__ == "__main__":
    main()
