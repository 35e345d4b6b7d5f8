"""wer and bleu beside jiwer and sacrebleu called directly, and the questions that are asked for them."""

import dataclasses

import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import files, packing, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.eval import common, generated
from gpt4v_jax.generate import decode
from tests import tiny
from tests.data.test_media import png

jiwer = pytest.importorskip("jiwer")
sacrebleu = pytest.importorskip("sacrebleu")

TRUTH = ["the cat sat on the mat", "a dog runs over the green grass", "two birds", "one small house by the sea",
         "the sun, it shines.", "a man reads a long book in the park"]  # fmt: skip
SAID = ["the cat sat on the mat", "a dog runs over green grass now", "birds", "", "the sun, it shines",
        "a man reads the long book in a park"]  # fmt: skip
REVERSED = [" ".join(text.split()[::-1]) for text in TRUTH]


def scored(evaluator, said, truth) -> common.Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "answers", lambda subject: (list(said), list(truth)))
        return evaluator(None)


def test_wer_is_jiwer_s():
    found = scored(generated.wer, SAID, TRUTH)
    assert found.metrics["wer"] == pytest.approx(jiwer.wer(TRUTH, SAID)) and 0.2 < found.metrics["wer"] < 0.9
    assert found.right == (True, False, False, False, False, False)
    assert found.metrics["accuracy"] == pytest.approx(1 / 6) and found.kinds == {"answers": (1, 6)}
    assert scored(generated.wer, TRUTH, TRUTH).metrics == {"wer": 0, "wer/low": 0, "wer/high": 0, "accuracy": 1}
    worse = scored(generated.wer, [text + " and much more of it all" for text in TRUTH], TRUTH)
    assert worse.metrics["wer"] > 1, "insertions count, too"


def test_bleu_and_chrf_are_sacrebleu_s():
    found = scored(generated.bleu, SAID, TRUTH)
    assert found.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SAID, [TRUTH]).score)
    assert found.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SAID, [TRUTH]).score)
    assert 10 < found.metrics["bleu"] < 90 and found.right[0] and found.kinds == {"answers": (1, 6)}
    assert scored(generated.bleu, TRUTH, TRUTH).metrics["bleu"] == pytest.approx(100)
    assert scored(generated.bleu, [""] * 6, TRUTH).metrics["bleu"] == 0


@pytest.mark.parametrize("said", [SAID, REVERSED, ["cat the", "grass a", "birds", "", "sun", "book"], ["x"] * 6, TRUTH])
def test_bleu_of_the_counts_is_the_corpus_s(said):
    """Also where no four words in a row are right, and sacrebleu smooths."""
    metric = sacrebleu.metrics.BLEU(effective_order=True)
    counts = np.array([generated._counts(metric.sentence_score(s, [t])) for s, t in zip(said, TRUTH, strict=True)])
    for at in (range(6), [0, 2], [1, 1, 4, 5], [2]):
        expected = sacrebleu.corpus_bleu([said[i] for i in at], [[TRUTH[i] for i in at]]).score
        assert generated._bleu(counts[list(at)].sum(0)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("evaluator, name", [
    (generated.wer, "wer"), (generated.bleu, "bleu"), (generated.bleu, "chrf"),
])  # fmt: skip
def test_intervals(evaluator, name, caplog):
    """They contain the value, shrink with more sentences, and are the same each time."""
    widths = []
    for times in (1, 4, 16):
        m = scored(evaluator, SAID * times, TRUTH * times).metrics
        assert m[f"{name}/low"] < m[name] < m[f"{name}/high"]
        assert m == scored(evaluator, SAID * times, TRUTH * times).metrics
        widths.append(m[f"{name}/high"] - m[f"{name}/low"])
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]
    assert not caplog.records, "sacrebleu may warn at each sentence"


def test_the_interval_of_a_model_that_has_learnt_nothing():
    """Some words are right, never four in a row."""
    m = scored(generated.bleu, REVERSED * 4, TRUTH * 4).metrics
    assert 0 < m["bleu"] < 10 and m["bleu/low"] < m["bleu"] < m["bleu/high"]
    nothing = scored(generated.bleu, ["", "zzz"], ["a cat", "a dog"]).metrics
    assert nothing["chrf"] == nothing["chrf/low"] == nothing["chrf/high"] == 0
    some = scored(generated.bleu, ["a cat", ""], ["a cat", "b"]).metrics
    assert some["chrf/low"] == 0 < some["chrf"] <= some["chrf/high"] == 100


# ---- the questions

TOKENIZER = tokenizer_lib.train("byte", [], 0)
MODEL = dataclasses.replace(tiny.make_config(context=40), vocab=TOKENIZER.vocab)
QUESTIONS = ["a longer question?", "b?", "c is long?", "d", "e, what is it?", "f?", "gg?"]


def asked(rows: int, questions=QUESTIONS, bad=()) -> common.Subject:
    """Records of a picture, a question and its answer; record 1 is one of two turns. bad: whose picture is none."""
    good, records = png(np.zeros((4, 4, 3), np.uint8)), []

    class Given(files.File):
        def read(self):
            return b"no picture" if int(self.path) in bad else good

    for i, question in enumerate(questions):
        ends = "\n" if i == 6 else ""  # which is no part of an answer
        turns = [files.Turn("k", (Given("image", str(i)), question), f"answer {i}{ends}")]
        turns += [files.Turn("k", ("and?",), "last")] * (i == 1)
        records.append({"where": f"file:{i}", "turns": turns})
    data = config.Data(name="given", bad=1.0)
    run = config.Config(model=MODEL, data=data, eval=config.Eval(batch=rows))
    layout = batch_lib.layout(MODEL, data)
    source = sources.from_records(records, data, TOKENIZER, layout, seed=None)
    mesh = sharding.make_mesh(config.Mesh())
    return common.Subject(run, layout, TOKENIZER, mesh, None, None, source, "test")


def echoed(subject) -> tuple[list[str], list[str], list[list[str]], int]:
    """-> (answers: each prompt's own text, the true ones, the prompts of each batch, the longest answer)."""
    batches, lengths = [], set()

    def generate(trained, prompts, read, max_new_tokens):
        assert max(map(len, prompts)) < trained.layout.context, "the real one refuses"
        texts = [trained.tokenizer.decode(p.tokens[p.tokens >= len(tokenizer_lib.SPECIALS)]) for p in prompts]
        batches.append(texts)
        lengths.add(max_new_tokens)
        rows = [packing.fill([p], read, trained.layout) for p in prompts]
        return [
            decode.Answer(f" {text}\n", (), "stop") if row.document.any() else decode.Answer("", (), "unreadable")
            for text, row in zip(texts, rows, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "generate", generate)
        said, truth = generated.answers(subject)
    (longest,) = lengths
    return said, truth, batches, longest


ALL = [*QUESTIONS[:2], "b?answer 1and?", *QUESTIONS[2:]]  # a later turn is asked after those before it


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 20])
def test_every_question_is_asked_once_and_answered_in_its_place(rows):
    said, truth, batches, longest = echoed(asked(rows))
    assert said == ALL and truth == [*(f"answer {i}" for i in range(2)), "last", *(f"answer {i}" for i in range(2, 7))]
    assert [len(batch) for batch in batches] == [rows] * -(-len(ALL) // rows), "one shape"
    flat = [text for batch in batches for text in batch]
    assert sorted(flat[: len(ALL)]) == sorted(ALL) and set(flat[len(ALL) :]) <= {flat[len(ALL) - 1]}
    assert longest == 2 * len("answer 6\n") + 1


def test_a_prompt_that_cannot_be_read_is_a_wrong_answer():
    said, truth, *_ = echoed(asked(3, bad=(2, 5)))
    assert [i for i, text in enumerate(said) if not text] == [3, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "answers", lambda subject: (["" if not s else t for s, t in zip(said, truth)], truth))  # noqa: B905
        assert [i for i, right in enumerate(generated.wer(None).right) if not right] == [3, 6]


def test_a_prompt_that_no_row_can_hold_is_a_wrong_answer(capsys):
    """As common.score counts it; a run must not end in an evaluation because of one long question."""
    said, truth, *_ = echoed(asked(3, [*QUESTIONS, "too long? " * 5]))
    assert said == [*ALL, ""] and len(truth) == 9
    assert "1 of 9 questions count as wrong: no row can hold them" in capsys.readouterr().err
