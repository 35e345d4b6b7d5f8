"""Evaluators by name, as a config's `eval.evaluators` lists them: each is a function of a common.Subject -> Result."""

from gpt4v_jax.eval import language, questions

EVALUATORS = {
    "questions": questions.accuracy,  # exact answers, by kind
    "permuted": questions.permuted,  # the same model with another scene's picture
    "counted": questions.counted,  # the most frequent answer to each question's words; no model
    "windows": language.windows,  # validation loss of a text
}
