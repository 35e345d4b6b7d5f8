"""Evaluators by name, as a config's `eval.evaluators` lists them: each is a function of a common.Subject -> Result."""

from gpt4v_jax import config
from gpt4v_jax.data import sources
from gpt4v_jax.eval import language, questions

EVALUATORS = {
    "questions": questions.accuracy,  # exact answers, by kind
    "permuted": questions.permuted,  # the same model with another scene's picture
    "counted": questions.counted,  # the most frequent answer to each question's words; no model
    "windows": language.windows,  # validation loss of a text
}


def check(names, source, data: str) -> None:
    """Raises InputError for an evaluator that does not exist, or that the documents of a data set do not fit."""
    for name in names:
        config.one_of("evaluator", name, tuple(EVALUATORS))
        if name == "windows" and not isinstance(source, sources.Windows):
            raise config.InputError(f"the data set {data} is no plain text: use the evaluator 'questions'")
        if name != "windows" and not isinstance(source, sources.Conversations):
            raise config.InputError(f"the data set {data} has no questions: use the evaluator 'windows'")
