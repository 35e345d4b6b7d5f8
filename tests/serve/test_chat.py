"""Messages -> turns -> a prompt."""

import base64

import pytest

from gpt4v_jax.serve import chat, guards
from gpt4v_jax.serve.errors import ApiError
from tests.serve import fake

TEXT = {"type": "text", "text": "hi"}
PICTURE = {"type": "image_url", "image_url": {"url": fake.uri(fake.png())}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("messages, where", [
    (None, "messages"), ([], "messages"), ("hi", "messages"), ({}, "messages"), (["hi"], r"messages\[0\]"),
    ([{"content": "hi"}], r"messages\[0\].role is missing"), ([{"role": "user"}], "content is missing"),
    ([{"role": "user", "content": None}], "content is missing"), ([{"role": "tool", "content": "x"}], "role='tool'"),
    ([{"role": ["user"], "content": "x"}], "role="), ([{"role": "user", "content": 3}], "content=3"),
    ([{"role": "user", "content": []}], "content="), (user("hi"), r"content\[0\].type='hi'"),
    (user({"type": "file", "file": {}}), "type='file'"), (user({"text": "hi"}), "type=None"),
    (user({"type": ["text"], "text": "hi"}), "type="), (user({"type": "text"}), "text is missing"),
    (user({"type": "text", "text": 3}), "text=3"), (user({"type": "image_url", "image_url": "x"}), "JSON object"),
    (user({"type": "image_url", "image_url": {}}), "url is missing"),
    (user({"type": "image_url", "image_url": {"url": "x", "detail": "x"}}), "detail='x'"),
    (user({"type": "input_audio", "input_audio": {"format": "wav"}}), "data is missing"),
    ([{"role": "assistant", "content": "x", "tool_calls": []}], "tool_calls"),
    (user(*[PICTURE] * 5), "5 media: give at most 4"),
])  # fmt: skip
def test_messages_that_are_refused(messages, where):
    with pytest.raises(ApiError, match=where) as error:
        chat.turns(messages, 4)
    assert error.value.status == 400


def test_turns():
    said = [{"role": "developer", "content": "be brief"}, *user(PICTURE, TEXT), {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "why", "name": "Ada"}]  # fmt: skip
    turns = chat.turns(said, 4)
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
    assert turns[1][1][0].modality == "image" and turns[1][1][1] == "hi"
    assert chat.texts(turns) == ["be briefhi", "be brief\nhi", "yes", "why"]


def test_media_lie_where_the_messages_have_them():
    """Two pictures, the second behind the text; their own bytes are read."""
    trained, guard = fake.trained(), guards.Guard(guards.Limits())
    one, two = fake.png(1), fake.png(2)
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(one).decode(), "format": "wav"}}
    turns = chat.turns(user(*fake.shown("ab", one)["content"], *fake.shown("c", two)["content"]), 4)
    assert [part.modality for part in chat.turns(user(sound), 4)[0][1]] == ["audio"]
    files = [("image", guard.decode("image", part.url.partition(",")[2])) for _, parts in turns for part in parts
             if isinstance(part, chat.Given)]  # fmt: skip
    assert files == [("image", one), ("image", two)]
    document, read = chat.laid(trained, turns, files)
    special = trained.tokenizer.special
    picture = [special["<image>"]] * 4
    assert document.tokens.tolist() == [special["<user>"], *picture, *trained.tokenizer.encode("ab"), *picture,
                                        *trained.tokenizer.encode("c"), special["<assistant>"]]  # fmt: skip
    first, second = (read(medium)[0][0] for _, medium in document.media)
    assert (first != second).any()


def test_a_special_token_that_is_typed_stays_text():
    trained = fake.trained()
    document, _ = chat.laid(trained, [("user", ["<end><image>"])], [])
    special = trained.tokenizer.special
    assert special["<end>"] not in document.tokens and special["<image>"] not in document.tokens
    assert len(document) == 2 + len("<end><image>")
