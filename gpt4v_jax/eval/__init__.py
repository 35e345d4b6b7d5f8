"""Evaluators by name, as a config's `eval.evaluators` lists them: each is a function of a common.Subject -> Result.

Of a mixture, "questions@easyvqa" is `questions` on its data set easyvqa.
"""

import functools
import importlib.util

import jax

from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.data.windows import Windows
from gpt4v_jax.eval import common, embedding, generated, language, questions, retrieval

EVALUATORS = {
    "questions": questions.accuracy,  # exact answers, by kind
    "permuted": questions.permuted,  # the same model with another record's media
    "blanked": questions.blanked,  # the same model with grey pictures and silence
    "counted": questions.counted,  # the most frequent answer to each question's words; no model
    "answers": language.answers,  # the loss on answers and captions
    "windows": language.windows,  # validation loss of a text
    "masked": functools.partial(language.denoised, kind="masked"),  # loss and accuracy on what this objective masks
    "span": functools.partial(language.denoised, kind="span"),  # the same of the others
    "prefix": functools.partial(language.denoised, kind="prefix"),
    "wer": generated.wer,  # word error rate of what is written, for speech
    "bleu": generated.bleu,  # BLEU and chrF of what is written, for translation
    "zero_shot": embedding.zero_shot,  # the text nearest to a medium, in the space of objective.contrastive
    "embedding": embedding.recall,  # retrieval in that space, both ways
    "retrieval": retrieval.recall,  # which text belongs to which picture, by likelihood
}

DENOISED = ("masked", "span", "prefix")  # objectives, too
EMBEDDED = ("zero_shot", "embedding")
TEXT = ("windows", "span", "prefix")  # of plain text alone


def named(evaluator: str) -> tuple[str, str]:
    """"questions@easyvqa" -> ("questions", "easyvqa"); "questions" -> ("questions", "")."""
    name, _, data_set = evaluator.partition("@")
    config.one_of("evaluator", name, tuple(EVALUATORS))
    return name, data_set


def check(evaluator: str, source, data: str, kinds: tuple[str, ...] = ()) -> None:
    """Raises InputError for an evaluator that the documents of a data set do not fit. kinds: config.Data.kinds."""
    name = named(evaluator)[0]
    if name in DENOISED and name not in kinds:
        raise config.InputError(f"the evaluator {name!r} scores what data.objective={name!r} makes, and the run has "
                                f"{', '.join(kinds)}")
    if source.layout.source and source.layout.place != "source" and "span" not in kinds:
        raise config.InputError("there is no scoring yet for a model with a separate encoder (model.source) that has "
                                "not learnt by data.objective='span': its source would be empty")
    if name == "masked":
        return
    if name in TEXT and not isinstance(source, Windows):
        raise config.InputError(f"the data set {data} is no plain text: use the evaluator 'questions'")
    if name not in TEXT and not isinstance(source, sources.Conversations):
        raise config.InputError(f"the data set {data} has no questions: use the evaluator 'windows'")
    if name in EMBEDDED:
        if not source.layout.pairs:
            raise config.InputError(f"the evaluator {name!r} needs a space of media and texts: model.embed is 0, or "
                                    "the model reads no media")
        if not any(all(record.pair) for record in source.records):
            raise config.InputError(f"the evaluator {name!r} needs media with a text, and {data} has none")
        return
    if name not in (*TEXT, "answers") and not any(record.turns for record in source.records):
        raise config.InputError(f"the data set {data} has captions alone, which {name!r} does not ask: use 'answers'")
    if name == "permuted" and sum(bool(record.all_media) for record in source.records) < 2:
        raise config.InputError(f"the evaluator 'permuted' exchanges media, and {data} has none, or one record of them")
    package = {"wer": "jiwer", "bleu": "sacrebleu"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise config.InputError(f"the evaluator {name!r} needs {package}: pip install 'gpt4v_jax[scores]'")
    if package and jax.process_count() > 1:
        raise config.InputError(f"the evaluator {name!r} writes text, which takes one process: leave it out here, and "
                                "run gpt4v_jax.evaluate without --distributed afterwards")


def metrics(evaluator: str, source) -> tuple[str, ...]:
    """-> those that an evaluator gives of a source and that a checkpoint can be the best by."""
    name = named(evaluator)[0]
    if name == "windows":
        return ("loss", "loss_a_character", "loss_a_letter")
    if name in DENOISED:
        return ("loss", "accuracy")
    if name in EMBEDDED:
        found = embedding.kinds(source)
        ways = tuple(f"R@{k}/{kind}/{way}" for kind in found for way in ("text", "medium") for k in retrieval.AT)
        return ("accuracy", *(ways if name == "embedding" else (f"accuracy/{kind}" for kind in found)))
    kinds = sorted({turn.kind for record in source.records for turn in record.turns})
    by_kind = tuple(f"accuracy/{kind}" for kind in kinds)
    return {
        "answers": ("loss",), "counted": ("accuracy", *by_kind), "wer": ("wer", "accuracy"),
        "bleu": ("bleu", "chrf", "accuracy"),
        "retrieval": ("accuracy", "plain", *(f"R@{k}/{kind}" for kind in kinds for k in retrieval.AT)),
    }.get(name, ("accuracy", "loss", *by_kind))  # fmt: skip


def run(evaluator: str, subject: common.Subject) -> common.Result:
    return EVALUATORS[named(evaluator)[0]](subject)
