"""What benchmarks.clients gives lm-eval and tells of what it found; the clients themselves are `make clients`'s."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import client_checks, clients
from gpt4v_jax.generate import score
from gpt4v_jax.serve import completions
from gpt4v_jax.training import workdir


def test_node_has_the_same_checks():
    text = Path(client_checks.__file__).with_suffix(".mjs").read_text()
    found = re.findall(r"""^  (['"])(.+)\1: async""", text, re.M)
    assert [name for _, name in found] == list(client_checks.CHECKS)


def test_the_model_of_bytes_has_eight_bits_a_byte(tmp_path):
    clients.bytes_of_zero(tmp_path)
    trained = workdir.restore(tmp_path)
    text = "zwölf"
    prompt = completions.text_prompt(trained, text)
    assert not trained.chats and len(prompt.document) == len(text.encode()) == 6
    found, _ = score.prompt(trained, prompt.document, None, 0)
    np.testing.assert_allclose(found[1:], -np.log(256), rtol=1e-6)


def test_one_answer_in_four_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "go_on", lambda it, q, **more: _Answer("of it"))
    monkeypatch.setattr(clients, "ask", lambda it, q, **more: f"chat of {q}")
    monkeypatch.setattr(clients, "said", lambda answer: answer)
    monkeypatch.setattr(clients, "ids_of", lambda it, text: text.split("of")[:2])
    found = clients.records(None)
    assert found.keys() == clients.EVALS.keys() == clients.KINDS.keys()
    for task in ("greedy", "until", "chat"):
        assert [row["a"] == "zz" for row in found[task]] == [False, False, False, True] * 2
    shortest = [min(range(4), key=lambda i: len(row["c"][i])) for row in found["choice"]]
    assert [row["a"] != i for row, i in zip(found["choice"], shortest, strict=True)] == [False, False, False, True] * 2
    clients.write_task(tmp_path, "choice", found["choice"])
    task = json.loads((tmp_path / "choice.yaml").read_text())
    rows = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert [json.loads(row) for row in rows] == found["choice"] and task["output_type"] == "multiple_choice"


class _Answer:
    def __init__(self, text: str):
        self.text, self.choices = text, [self]


def test_what_fails_is_told():
    fine = dict.fromkeys(client_checks.CHECKS, "yes")
    scores = {"rolling": {"bits_per_byte,none": 8.00000002}, "choice": {"acc,none": 0.5}}
    evals = dict.fromkeys(clients.EVALS, "0.7500") | clients.scored(scores, ["rolling", "choice"])
    text = "\n".join(clients.lines(fine, fine | {"stop": "no: a | b\nand"}, evals))
    assert "openai python 0, openai node 1, lm-eval 1\n" in text
    assert "| stop | yes | no: a \\| b and |" in text and "| 8.0000 | 8.0000 |" in text and "| no: 0.5000 |" in text
    with pytest.raises(subprocess.CalledProcessError) as error:
        clients.run(sys.executable, "-c", "raise ValueError('x')")
    assert clients.why(error.value).endswith("ended with status 1: ValueError: x")


def test_a_check_that_raises_is_a_no(monkeypatch):
    def check(it):
        assert it == "what", "the reason"

    monkeypatch.setattr(client_checks, "CHECKS", {"good": lambda it: None, "bad": check})
    found = client_checks.by_python("it")
    assert found["good"] == "yes" and found["bad"].startswith("no: AssertionError the reason")
