"""What a workdir remembers of its data."""

import json

import pytest

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer
from gpt4v_jax.training import workdir
from gpt4v_jax.training.workdir import Trained


def test_other_documents_than_the_run_began_with_are_refused(tmp_path):
    known = {"documents": 1200, "plan": "0badcafe", "texts": ["poems"]}
    workdir.describe(tmp_path, config.Config(), tokenizer.train("byte", [], 0), known)
    assert workdir.data_of(tmp_path) == known
    workdir.check_data(tmp_path, known)
    with pytest.raises(config.InputError, match="its data were 1,200 documents, and are 1,201 or of other lengths now"):
        workdir.check_data(tmp_path, known | {"documents": 1201, "plan": "0badcaff"})
    (tmp_path / "environment.json").write_text(json.dumps({"commit": "1"}))  # of an older version, or imported
    workdir.check_data(tmp_path, known)


@pytest.mark.parametrize("texts, mixture, chats", [
    (None, ("poetry",), False), (None, ("emoji",), True), (None, ("poetry", "emoji"), True),
    (("tfds:lm1b",), ("tfds:lm1b",), False), ((), ("tfds:lm1b",), True),
])  # fmt: skip
def test_a_model_of_texts_alone_does_not_chat(texts, mixture, chats):
    run = config.Config(data=config.Data(mixture=mixture))
    assert Trained(run, None, tokenizer.train("byte", [], 0), None, None, None, 0, texts).chats == chats
