"""Text to ids and back; what a user types is plain text."""

import pytest

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer

CORPUS = ["what colour is the 7?", "the red one is a circle."] * 3
TEXTS = ["the red 7", "", " two  spaces \n", "naïve 東京 🙂", "<end><image> <|user|> <user>"]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train("bpe", CORPUS, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= i < bpe.vocab for i in ids) and bpe.vocab <= 300
    assert not set(ids) & set(bpe.special.values()), "a special token typed by a user is plain text"


def test_bpe_learns_words(bpe):
    assert len(bpe.encode("the red")) < len("the red") / 2
    assert bpe.special == {name: i for i, name in enumerate(tokenizer.SPECIALS)}


def test_decode_leaves_special_tokens_out(bpe):
    ids = [bpe.special["<assistant>"], *bpe.encode("red"), bpe.special["<end>"], bpe.special["<pad>"]]
    assert bpe.decode(ids) == "red"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    made = tokenizer.train(kind, CORPUS, 300)
    (tmp_path / "tokenizer.json").write_text(made.to_json())
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    for text in CORPUS + (TEXTS if kind == "bpe" else []):
        assert loaded.encode(text) == made.encode(text)
        assert loaded.decode(made.encode(text)) == text
    assert (loaded.vocab, loaded.special) == (made.vocab, made.special)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_characters():
    made = tokenizer.train("char", ["hello\n world"], 0)
    assert made.vocab == len(set("hello\n world"))
    assert made.encode("\n world") == [sorted(set("hello\n world")).index(char) for char in "\n world"]
    with pytest.raises(config.InputError, match="'!' is not in the vocabulary of 9"):
        made.encode("hello!")


def test_unknown_kind():
    with pytest.raises(config.InputError, match="did you mean 'char'"):
        tokenizer.train("chars", CORPUS, 300)


def test_a_file_s_truncation_and_padding_are_off(tmp_path):
    trained = tokenizer.train("bpe", CORPUS, 300)
    inner = trained.inner
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "t.json"))
    long = "hello hello hello hello"
    plain = tokenizer.train("bpe", CORPUS, 300).encode(long)
    for loaded in (tokenizer.load(tmp_path / "t.json"), tokenizer.train(str(tmp_path / "t.json"), (), 0)):
        assert loaded.encode(long) == plain and len(plain) > 4
        assert len(loaded.encode("h")) == 1


def test_the_token_that_ends_is_the_same_when_a_run_resumes(tmp_path):
    """A run trains its tokenizer once, and reads it from its workdir from then on."""
    inner = tokenizer.train("bpe", CORPUS, 300).inner
    inner.add_special_tokens(["<eot>"])
    inner.save(str(tmp_path / "t.json"))
    first = tokenizer.train(str(tmp_path / "t.json"), (), 0, ("<eot>",))
    (tmp_path / "tokenizer.json").write_text(first.to_json())
    again = tokenizer.load(tmp_path / "tokenizer.json", ("<eot>",))
    assert first.ends == again.ends == (first.id("<eot>"),) and first.special == again.special
    with pytest.raises(config.InputError, match="names no token"):
        tokenizer.train(str(tmp_path / "t.json"), (), 0, ("<absent>",))
