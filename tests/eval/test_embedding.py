"""Labels and retrieval in the space of media and texts: vectors whose neighbours are known; a run with all of it."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from gpt4v_jax import config, evaluate, train
from gpt4v_jax import eval as eval_lib
from gpt4v_jax.data import files, sources
from gpt4v_jax.eval import embedding
from gpt4v_jax.training import checkpoint, metrics
from tests.data.test_media import png
from tests.eval.test_retrieval import TOKENIZER, subject
from tests.test_train import Killed

EYE = np.eye(8, dtype=np.float32)


def found(monkeypatch, evaluator, captions, media, texts, lost=(), other=()):
    """media, texts: [n,E] of the captions; records of the kind "name" are all right."""
    there = np.array([i not in lost for i in range(len(captions))])

    def embedded(_, pairs):
        if pairs.items[0][2].kind == "name":
            return EYE[: len(other)], EYE[: len(other)], np.ones(len(other), bool)
        return media * there[:, None], texts * there[:, None], there

    monkeypatch.setattr(embedding, "embedded", embedded)
    return evaluator(subject(captions, other))


def test_zero_shot(monkeypatch):
    """Text 2 is text 0; picture 1 lies nearest to text 3's vector, picture 2 to text 0's, which is its own."""
    texts = EYE[[0, 1, 0, 3]]
    result = found(monkeypatch, embedding.zero_shot, ["a", "b", "a", "d"], EYE[[0, 3, 0, 3]], texts, other=["x", "y"])
    assert result.kinds == {"caption": (3, 4), "name": (2, 2)} and result.right == (True, False, *[True] * 4)
    assert result.metrics["accuracy/caption"] == 0.75 and result.metrics["accuracy"] == pytest.approx(5 / 6)
    lost = found(monkeypatch, embedding.zero_shot, ["a", "b", "a", "d"], texts, texts, lost=(0, 3))
    assert lost.right == (False, True, True, False), "what cannot be read is wrong, and its text stays if others say it"
    assert found(monkeypatch, embedding.zero_shot, ["a"], EYE[:1], EYE[:1], lost=(0,)).right == (False,)


def test_zero_shot_by_prompts(monkeypatch):
    """An answer's vector is the mean of its prompts', of length 1; here the answers' own would all be wrong."""
    given = subject(["a", "b"])
    run = dataclasses.replace(given.run, eval=config.Eval(prompts=("one {}", "{}, two")))
    asked = types.SimpleNamespace(**vars(given) | {"run": run, "tokenizer": TOKENIZER})
    vectors = {"one a": EYE[0], "a, two": EYE[0], "one b": EYE[1], "b, two": EYE[2]}
    # The second picture is 0.7 of "b" and 0.6 of "a"; by sums 1 and 1.2, by one prompt of "b" 0.5.
    media = np.stack([EYE[0], 0.6 * EYE[0] + 0.7 * 0.5**0.5 * (EYE[1] + EYE[2])])

    def embedded(_, pairs):
        said = [TOKENIZER.decode(turn.answer_ids) for _, _, turn in pairs.items]
        return media, np.stack([vectors.get(text, -media[i]) for i, text in enumerate(said)]), np.ones(2, bool)

    monkeypatch.setattr(embedding, "embedded", embedded)
    assert embedding.zero_shot(asked).right == (True, True)
    for bad in ("a picture", "{} and {}", "{x}", "{} {0}"):
        with pytest.raises(config.InputError, match="must have one {}"):
            config.Eval(prompts=(bad,))


def test_recall(monkeypatch):
    texts = EYE[[0, 1, 0, 3]]
    result = found(monkeypatch, embedding.recall, ["a", "b", "a", "d"], texts, texts)
    assert {value for name, value in result.metrics.items() if name.startswith("R@")} == {1.0}
    turned = found(monkeypatch, embedding.recall, list("abcd"), EYE[[1, 0, 2, 3]] + 0.1 * EYE[[0, 2, 3, 3]], EYE[:4])
    assert [turned.metrics[f"R@{k}/caption/text"] for k in (1, 5, 10)] == [0.5, 1, 1]
    assert turned.right == (False, False, True, True)
    # Text 1's row of pictures is (1, 0, 0, 0), its own 0: one is above, two are equal.
    assert turned.metrics["R@1/caption/medium"] == 0.5
    lost = found(monkeypatch, embedding.recall, list("abcd"), EYE[:4], EYE[:4], lost=(2,))
    assert lost.right == (True, True, False, True)


def test_what_the_evaluators_need():
    source = subject(["a"]).source
    for name in eval_lib.EMBEDDED:
        with pytest.raises(config.InputError, match=f"'{name}' needs a space of media and texts: model.embed is 0"):
            eval_lib.check(name, source, "given")
    for name in eval_lib.DENOISED:
        with pytest.raises(config.InputError, match=f"'{name}' scores what data.objective='{name}' makes.* next_token"):
            eval_lib.check(name, source, "given", ("next_token",))


# ---- a run

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
LINE = "a rose is a rose, is a rose; so it goes on and on. "


def records(data, split):
    if data.name == "pictures":
        out = []
        for name, colour in COLOURS.items():
            given = type("Given", (files.File,), {"read": lambda self, c=colour: png(np.full((8, 8, 3), c, np.uint8))})
            out.append({"turns": [files.Turn("colour", (given("image", ""), "what?"), name)]})
        return out * (3 if split == "train" else 1)
    return [{"text": LINE * 8}]


def config_of(**changes):
    values = config.default()
    values.steps, values.batch, values.log_every, values.save_every = 4, 4, 1, 2
    values.data.update(
        mixture=("pictures: 2", "masked", "span", "prefix", "plain: 0.5"), tokenizer="byte", window=24, threads=0,
        objectives=("masked=masked", "span=span", "prefix=prefix"),
    )  # fmt: skip
    block = {"depth": 1, "width": 16, "heads": 2, "dropout": 0.1}
    values.model.update(context=48, embed=8)
    values.model.image.update(size=8, patch=4)
    values.model.backbone.update(**block, pattern=("cross",))
    values.model.source = config.sections(block)
    values.objective.update(contrastive=1.0, z_loss=1e-3, answers_only=False)
    values.optim.warmup = 2
    values.eval.update(batch=4, every=4, evaluators=("zero_shot@pictures", "embedding@pictures", "masked@masked",
                                                     "span@span", "prefix@prefix", "windows@plain"))  # fmt: skip
    values.update_from_flattened_dict(changes)
    return config.from_flag(values)


def trained(folder, run, monkeypatch, kill_at=0):
    """-> {step: the state that was saved}; kill_at: dies when that one is on disk."""
    states, real = {}, checkpoint.Checkpoints.save

    def save(checkpoints, state):
        real(checkpoints, state)
        states[int(state.step)] = jax.device_get(state)
        if kill_at == int(state.step):
            checkpoints.wait()
            raise Killed

    monkeypatch.setattr(sources, "open_split", records)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    try:
        train.train(run, folder)
    except Killed:
        assert kill_at
    monkeypatch.setattr(checkpoint.Checkpoints, "save", real)
    return states


def test_every_objective_in_one_run_that_is_killed(tmp_path, monkeypatch):
    """Masked, span, prefix, next-token and paired documents, two micro-batches: resumed it ends bit-equal, and every
    evaluator says its numbers, in the run and after it."""
    run = config_of(**{"compute.accumulate": 2})
    whole = trained(tmp_path / "whole", run, monkeypatch)
    first = trained(tmp_path / "killed", run, monkeypatch, kill_at=2)
    second = trained(tmp_path / "killed", run, monkeypatch)
    assert sorted(first) == [2] and sorted(second) == [4]
    jax.tree.map(np.testing.assert_array_equal, second[4], whole[4])
    lines = metrics.read(tmp_path / "whole")
    values = {name for line in lines for name in line}
    assert {"loss", "token_loss", "z_loss", "contrastive", "masked@masked/accuracy", "span@span/loss",
            "prefix@prefix/loss", "windows@plain/loss", "embedding@pictures/R@1/colour/text",
            "zero_shot@pictures/accuracy/colour"} <= values  # fmt: skip
    loss = next(line for line in lines if "loss" in line)
    assert loss["loss"] == pytest.approx(loss["token_loss"] + 1e-3 * loss["z_loss"] + loss["contrastive"], rel=1e-5)
    monkeypatch.setattr(sources, "splits", lambda data: ["train", "validation"])
    after = evaluate.evaluate(tmp_path / "whole", ["validation"], ["masked@masked"], step=4)
    last = [line["masked@masked/loss"] for line in lines if "masked@masked/loss" in line][-1]
    assert after["masked-validation"]["masked"].metrics["loss"] == pytest.approx(last, rel=1e-6)


def test_pairs_learn_colours(tmp_path, monkeypatch):
    """Four colours: each picture finds its word, and each word its picture."""
    run = config_of(**{
        "data.mixture": ("pictures",), "data.objectives": (), "model.source": None, "steps": 40, "batch": 4,
        "model.backbone.pattern": ("global",), "model.backbone.dropout": 0.0, "objective.contrastive_loss": "softmax",
        "optim.lr": 1e-2, "eval.every": 40, "save_every": 40, "log_every": 40,
        "eval.evaluators": ("zero_shot", "embedding"),
    })  # fmt: skip
    trained(tmp_path / "run", run, monkeypatch)
    last = metrics.read(tmp_path / "run")[-1]
    assert last["zero_shot/accuracy"] == last["embedding/R@1/colour/text"] == last["embedding/R@1/colour/medium"] == 1
