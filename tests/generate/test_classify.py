"""Labels' probabilities are those of decoding; long texts are read in windows; what no classifier can be is refused."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt4v_jax import config, train
from gpt4v_jax.generate import classify, decode, prompts
from gpt4v_jax.training import workdir

LABELS = ("bad", "good")

step = jax.jit(decode.step, static_argnums=0)


@functools.cache
def trained(folder: Path) -> Path:
    """A run on 64 texts of words, "bad" where one of them is "awful", from a JSONL file."""
    rng, lines = np.random.default_rng(0), []
    for i in range(64):
        said = [*rng.choice(["one", "two", "six", "ten"], rng.integers(7)), ("fine", "awful")[i % 2]]
        lines.append({"prefix": " ".join(rng.permutation(said)), "suffix": LABELS[1 - i % 2]})
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = config.parse({
        "steps": 60, "batch": 8, "log_every": 60, "save_every": 60,
        "data": {"name": f"jsonl:{folder}/train.jsonl", "tokenizer": "bpe", "vocab": 280, "threads": 0},
        "model": {"context": 32, "embed_norm": True, "backbone": {"depth": 1, "width": 16, "heads": 2}},
        "optim": {"lr": 2e-2, "warmup": 5},
    })  # fmt: skip
    train.train(run, folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """-> a trained run. (serve/test_moderation asks for the same one.)"""
    return trained(tmp_path_factory.getbasetemp() / "classified")


@pytest.fixture(scope="module")
def model(folder):
    return workdir.restore(folder)


def decoded(model, text: str) -> np.ndarray:
    """-> [L]: the labels' probabilities by the cache, one token after the other."""
    scores = []
    for label in LABELS:
        logits, cache, _ = decode.begin(model, [prompts.prompt(model, text)], None, 8)
        score = 0.0
        for token in [*model.tokenizer.encode(label), model.tokenizer.special["<end>"]]:
            score += float(jax.nn.log_softmax(logits)[0, token])
            logits, cache = step(model.model, model.params, np.array([token]), cache)
        scores.append(score)
    return np.exp(scores) / np.exp(scores).sum()


def test_probabilities_are_those_of_decoding(model):
    made = classify.Classifier(model, LABELS)
    for text in ("awful", "two fine", "ten", ""):
        p = made.probabilities(text)
        assert p.shape == (1, 2)
        np.testing.assert_allclose(p[0], decoded(model, text), rtol=1e-4)
    other = classify.Classifier(model, LABELS[::-1], "one {} two")
    np.testing.assert_allclose(other.probabilities("six")[0, ::-1], decoded(model, "one six two"), rtol=1e-4)


def test_the_model_has_learnt_its_labels(model):
    made = classify.Classifier(model, LABELS)
    assert made.probabilities("six awful one")[0, 0] > 0.8 > 0.2 > made.probabilities("six fine one")[0, 0]


def test_long_texts_are_read_in_windows(model):
    made = classify.Classifier(model, LABELS, "one {} two")
    before, after = (model.tokenizer.encode(part) for part in ("one ", " two"))
    for words in (9, 40, 400):
        text = " ".join(["fine"] * words)
        ids, windows = model.tokenizer.encode(text), made._windows(text)
        assert all(len(w) <= model.layout.context - 3 - max(map(len, made._ids)) for w in windows)
        inner = [w[len(before) : len(w) - len(after)] for w in windows]
        size = len(inner[0])
        assert all(w[: len(before)] == before and w[len(w) - len(after) :] == after for w in windows)
        assert inner == [ids[k * (size // 2) : k * (size // 2) + size] for k in range(len(windows))]  # they overlap
        assert (len(windows) - 1) * (size // 2) + size >= len(ids) > (len(windows) - 2) * (size // 2) + size
        assert made.probabilities(text).shape == (len(windows), 2)
    assert made._windows("six") == [model.tokenizer.encode("one six two")]


def test_windows_do_not_depend_on_their_batch(model):
    made = classify.Classifier(model, LABELS)
    text = " ".join(["fine"] * 100 + ["awful"] + ["fine"] * 100)
    windows = made._windows(text)
    assert len(windows) > classify.WINDOWS and len(windows) % classify.WINDOWS
    alone = np.concatenate([made._scored([w], 1) for w in windows])
    np.testing.assert_allclose(made.probabilities(text), alone, rtol=1e-4)
    compiled = classify._nats._cache_size()
    made.probabilities(text[: len(text) // 2])
    assert classify._nats._cache_size() == compiled, "one program, however many windows"


def test_what_is_no_classifier(model, monkeypatch):
    for labels in (("bad",), ("bad", "bad", "good"), ("", "good"), ()):
        with pytest.raises(config.InputError, match="labels="):
            classify.Classifier(model, labels)
    for question in ("", "is it bad?", "{} or {}"):
        with pytest.raises(config.InputError, match="question="):
            classify.Classifier(model, LABELS, question)
    with pytest.raises(config.InputError, match="context of 32"):
        classify.Classifier(model, LABELS, "{}" + " six" * 40)
    monkeypatch.setattr(type(model), "chats", False)
    with pytest.raises(config.InputError, match="plain text"):
        classify.Classifier(model, LABELS)
