"""The page of `make soak`: python -m benchmarks.exactness --shown runs/exactness.jsonl --out docs/results

Tests note what they have shown in the file --shown (tests/conftest.py); this makes tables of it.
"""

import json
import platform
from pathlib import Path

import jax
from absl import flags

from gpt4v_jax import command, config
from gpt4v_jax.training import workdir

_SHOWN = flags.DEFINE_string("shown", "runs/exactness.jsonl", "the file that the tests wrote")
_OUT = flags.DEFINE_string("out", "docs/results", "the folder of the page")
TITLES = {  # file of the tests -> title of its table, in order
    "test_exactness": "Stopped, killed, damaged",
    "test_devices": "Eight forced devices, and one",
    "test_step": "The same step by other routes",
    "test_objectives": "The loss in pieces of the vocabulary",
    "test_contrastive": "Pairs",
    "test_gpt4v": "What a position sees; packed rows",
    "test_decode": "Cached decoding, and prompts in a batch",
    "test_sweep": "Sweeps",
    "test_files": "Experiments",
}
PAGE = """# Exactness

Made by `make soak`, which ran {tests} tests in {minutes:.0f} minutes, commit {commits}; Python {python}, jax {jax},
{cores} CPU cores, shared. Every row is what a test has measured and compared with its bar; a test that fails leaves no
row.
"""


def page(lines: list[dict]) -> str:
    """The lines that tests noted -> Markdown."""
    times = {line["test"]: line["minutes"] for line in lines}
    commits = sorted({line["commit"] for line in lines})
    text = [PAGE.format(
        tests=len(times), minutes=sum(times.values()), commits=" and ".join(commits), jax=jax.__version__,
        cores=workdir.environment()["cores"], python=platform.python_version(),
    )]  # fmt: skip
    files = [Path(line["test"].partition("::")[0]).stem for line in lines]
    for file in dict.fromkeys([*TITLES, *files]):
        rows, title = [line for line, of in zip(lines, files, strict=True) if of == file], TITLES.get(file, file)
        if rows:
            text.append(f"## {title}\n\n| what | measured | bar | minutes |\n|---|---|---|---|")
            cells = [[str(row[key]).replace("|", "\\|") for key in ("what", "value", "bar")] for row in rows]
            text += [f"| {' | '.join(cell)} | {row['minutes']:.1f} |" for cell, row in zip(cells, rows, strict=True)]
            text.append("")
    return "\n".join(text)


def main() -> None:
    path = Path(_SHOWN.value)
    if not path.is_file():
        raise config.InputError(f"--shown={path} is not there: make soak writes it")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    workdir.write(Path(_OUT.value) / "exactness.md", page(lines))
    print(f"{len(lines)} rows: {_OUT.value}/exactness.md")


if __name__ == "__main__":
    command.run(main)
