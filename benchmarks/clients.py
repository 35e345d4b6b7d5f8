"""The clients of others, as they are, at a live server: python -m benchmarks.clients [--out docs/results]

`python -m gpt4v_jax.serve` is asked by openai's Python and node clients, each with the same list of checks
(client_checks.py, client_checks.mjs), and by lm-evaluation-harness, whose tasks are local files and whose scores are
known before. The node client and lm-eval are installed into a temporary folder. The models are of random weights: what
they say does not matter.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import openai
import tokenizers

from benchmarks.bad_input import TRAIN
from benchmarks.client_checks import CHECKS, KEY, NAME, QUEUED, ask, by_python, go_on, ids_of, media, said
from benchmarks.train_step import ALLOCATOR, machine
from gpt4v_jax import batch, config
from gpt4v_jax.data import tokenizer
from gpt4v_jax.model import gpt4v
from gpt4v_jax.training import checkpoint, step, workdir

NODE, LM_EVAL = "openai@6.49.0", "lm-eval[api]==0.4.13"
SECONDS = 600.0  # after which we give up on a client
# A small model that reads pictures, clips and sounds, after a step of training; its head is no embedding table, or it
# would say the last token again and again.
SMALL = [*TRAIN, "--config.model.backbone.depth=2", "--config.model.backbone.width=96", "--config.model.tied=False"]


# ---- openai's clients


def by_node(folder: Path, address: str) -> dict[str, str]:
    """-> the same by client_checks.mjs, in a folder of its own."""
    if not (shutil.which("node") and shutil.which("npm")):
        return dict.fromkeys(CHECKS, "not run: no node or no npm here")
    folder.mkdir()
    (folder / "media.json").write_text(json.dumps(media()))
    shutil.copy(Path(__file__).with_name("client_checks.mjs"), folder)
    try:
        run("npm", "install", "--no-audit", "--no-fund", NODE, cwd=folder)
        return json.loads(run("node", "client_checks.mjs", address, KEY, NAME, "media.json", cwd=folder))
    except Exception as error:  # whatever it is: the page tells it
        return dict.fromkeys(CHECKS, why(error))


# ---- lm-eval

ZERO, CHAT = "zero", "local-chat-completions"
EVALS = {  # task -> (the server, lm-eval's model, the metric, the score that it must have, what it is)
    "rolling": (ZERO, "local-completions", "bits_per_byte", "8.0000", "log-likelihood of texts, one longer than "
                "max_length, where each of 256 bytes is as likely"),
    "choice": (ZERO, "local-completions", "acc", "0.7500", "multiple choice there: the shortest is the likeliest"),
    "greedy": (NAME, "local-completions", "acc", "0.7500", "log-likelihood: is this token the greedy one?"),
    "until": (NAME, "local-completions", "exact_match", "0.7500", "generate_until: what the Python client was told"),
    "chat": (NAME, CHAT, "exact_match", "0.7500", "the same of chats"),
}  # fmt: skip
UNTIL = ["e", "4"]
GENERATES = {"output_type": "generate_until", "generation_kwargs": {"until": UNTIL, "max_gen_toks": 24}}
KINDS = {
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": ""},
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "c"},
    "greedy": {"output_type": "loglikelihood"}, "until": GENERATES, "chat": GENERATES,
}  # fmt: skip


def bytes_of_zero(folder: Path) -> None:
    """Writes a run whose tokens are the 256 bytes and whose head is zero, so that all are equally likely."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    backbone = config.Backbone(depth=2, width=32, heads=2)
    made = config.Config(model=config.Model(vocab=256, context=512, tied=False, backbone=backbone))
    params = step.init_params(gpt4v.GPT4V(made.model, batch.layout(made.model, made.data)), 0)
    params["head"] = jax.tree.map(jax.numpy.zeros_like, params["head"])
    workdir.create(folder)
    workdir.describe(folder, made, tokenizer.Tokenizer(inner), {"texts": [made.data.name]})
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(step.State(0, params, {}))


def records(it) -> dict[str, list[dict]]:
    """-> those of each task; but for "rolling" the answer of one in four is another than the model's."""
    texts = [f"the {letter}" for letter in string.ascii_lowercase]
    best = {q: go_on(it, q, max_tokens=1).choices[0].text for q in texts}
    whole = [q for q in texts if best[q] and ids_of(it, q + best[q])[:-1] == ids_of(it, q)]  # no part of a character
    asked = {"greedy": {q: best[q] for q in whole[:8]},
             "until": {q: go_on(it, q, max_tokens=24, stop=UNTIL).choices[0].text for q in texts[:8]},
             "chat": {q: said(ask(it, q, max_tokens=24, stop=UNTIL)) for q in texts[:8]}}  # fmt: skip
    return {task: [{"q": q, "a": "zz" if n % 4 == 3 else a} for n, (q, a) in enumerate(rows.items())]
            for task, rows in asked.items()} | {
        "rolling": [{"a": text} for text in ("a short one", "zw\u00f6lf Boxk\u00e4mpfer " * 30)],
        "choice": [{"q": f"{n}:", "c": ["a" * (1 + (n + k) % 4) for k in range(4)], "a": (-n + (n % 4 == 3)) % 4}
                   for n in range(8)],
    }  # fmt: skip


def write_task(folder: Path, task: str, rows: list[dict]) -> None:
    """Writes what lm-eval reads: a task and its records."""
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"task": task, "dataset_path": "json", "test_split": "test", "doc_to_text": "q", "doc_to_target": "a",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}}, "target_delimiter": "",
            "metric_list": [{"metric": EVALS[task][2]}]}  # fmt: skip
    (folder / f"{task}.yaml").write_text(json.dumps(made | KINDS[task]))  # JSON is YAML


def installed(folder: Path) -> Path:
    """-> the Python of a new environment with lm-eval."""
    python, beside = folder / "bin/python", Path(sys.executable).parent
    uv = shutil.which("uv", path=f"{beside}:{os.environ['PATH']}")
    run(*([uv, "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]), folder)
    run(*([uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]), LM_EVAL)
    return python


def by_lm_eval(folder: Path, addresses: dict[str, str], it) -> dict[str, str]:
    """addresses: of the servers -> task -> its score, with "no: " before one that it must not have, or before why there
    is none. folder: of the tasks."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
                                "OPENAI_API_KEY": KEY}  # fmt: skip
    found = {}
    try:
        for task, rows in records(it).items():
            write_task(folder, task, rows)
        python = installed(folder / "venv")
    except Exception as error:  # whatever it is: the page tells it
        return dict.fromkeys(EVALS, why(error))
    for server, model in dict.fromkeys(row[:2] for row in EVALS.values()):
        tasks, out = [task for task, row in EVALS.items() if row[:2] == (server, model)], folder / model / server
        url = f"{addresses[server]}/v1/{'chat/' if model == CHAT else ''}completions"
        told = f"model={NAME},base_url={url},auth_token={KEY},max_length=128,custom_prefix_token_id=10"
        try:
            run(python, "-m", "lm_eval", "--model", model, "--model_args", told, "--tasks", ",".join(tasks),
                "--include_path", folder, "--output_path", out, *["--apply_chat_template"] * (model == CHAT),
                env=environment)  # fmt: skip
            (result,) = out.rglob("results*.json")
            found |= scored(json.loads(result.read_text())["results"], tasks)
        except Exception as error:
            found |= dict.fromkeys(tasks, why(error))
    return found


def scored(results: dict, tasks: list[str]) -> dict[str, str]:
    scores = {task: f"{results[task][EVALS[task][2] + ',none']:.4f}" for task in tasks}
    return {task: score if score == EVALS[task][3] else f"no: {score}" for task, score in scores.items()}


# ---- the run and the report


def run(*command, **more) -> str:
    """-> what it printed. Raises CalledProcessError."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=SECONDS, **more).stdout


def why(error: Exception) -> str:
    if not isinstance(error, subprocess.CalledProcessError):
        return f"no: {type(error).__name__} {error}"
    last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
    return f"no: {Path(error.cmd[0]).name} ended with status {error.returncode}: {' '.join(last)}"


@contextlib.contextmanager
def served(folder: Path, *more: str) -> Iterator[str]:
    """-> the address of a server in a process of its own."""
    (folder / "keys").write_text(KEY)
    command = [sys.executable, "-m", "gpt4v_jax.serve", f"--workdir={folder}", "--port=0", f"--name={NAME}",
               f"--api_keys={folder}/keys", "--slots=2", f"--queued={QUEUED}", "--nowarm", *more]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((line for line in iter(server.stdout.readline, "") if "http://" in line), None)
        if line is None:
            sys.exit("error: the server did not start; run it by hand: " + " ".join(command))
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield re.search(r"http://[^/\s]+", line)[0]
    finally:
        server.kill()


def measure(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """-> what was found by Python, by node, by lm-eval."""
    run(sys.executable, "-m", "gpt4v_jax.train", f"--workdir={folder}/run", *SMALL)
    bytes_of_zero(folder / "zero")
    filtered = folder / "moderation.json"
    filtered.write_text(json.dumps({"words": [{"category": "rude", "entries": ["badword"]}]}))
    with (
        served(folder / "run", f"--moderation={filtered}") as address, served(folder / "zero") as zero,
        openai.OpenAI(base_url=address + "/v1", api_key=KEY, max_retries=0, timeout=120) as it,
    ):  # fmt: skip
        python, node = by_python(it), by_node(folder / "node", address)
        return python, node, by_lm_eval(folder, {NAME: address, ZERO: zero}, it)


def cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


def lines(python: dict[str, str], node: dict[str, str], evals: dict[str, str]) -> list[str]:
    wrong = {name: sum(told.startswith("no:") for told in found.values())
             for name, found in (("openai python", python), ("openai node", node), ("lm-eval", evals))}  # fmt: skip
    return [
        f"- what is not as it should be: {', '.join(f'{name} {count}' for name, count in wrong.items())}",
        "",
        "| check | openai python | openai node |",
        "|---|---|---|",
        *(f"| {name} | {cell(python[name])} | {cell(node[name])} |" for name in CHECKS),
        "",
        "| task of lm-eval | its model | metric | must be | is |",
        "|---|---|---|---:|---:|",
        *(f"| {task}: {what} | {model} | {metric} | {score} | {cell(evals[task])} |"
          for task, (_, model, metric, score, what) in EVALS.items()),
    ]  # fmt: skip


PAGE = """# Clients of others at a live server

Made by `{command}`.

{about}

`python -m gpt4v_jax.serve` with keys, a word list, and a small model of random weights that reads pictures, clips and
sounds; the clients are as they were published. "yes": all that benchmarks/client_checks.py, or client_checks.mjs,
asserts under this name holds. lm-eval has its tasks from local files and its tokens from the server. In all tasks but
the first the answer of one record in four is another than the model's.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for clients.md")
    args = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    os.environ["JAX_PLATFORMS"] = "cpu"
    node = f" (node {run('node', '--version').strip()})" if shutil.which("node") else ""
    about = machine() | {"clients": f"openai=={openai.__version__} (Python), {NODE}{node}, {LM_EVAL}"}
    with tempfile.TemporaryDirectory() as folder:
        table = lines(*measure(Path(folder)))
    about["load"] += f", {os.getloadavg()[0]:.1f} at the end"
    print("\n".join(table))
    if args.out:
        facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
        command = "python -m benchmarks.clients " + " ".join(sys.argv[1:])
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "clients.md").write_text(PAGE.format(command=command, about=facts, table="\n".join(table)))
        print(f"\nwritten: {args.out}/clients.md")
    sys.exit(any("| no:" in line for line in table))


if __name__ == "__main__":
    main()
