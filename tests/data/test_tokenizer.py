"""Text to ids and back; what a user types is plain text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "tokenizers"
with_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
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


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    made = tokenizer.train(kind, CORPUS, 300)
    (tmp_path / "tokenizer.json").write_text(made.to_json())
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    for text in CORPUS + ([] if kind == "char" else TEXTS):
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


# ---- every kind

FAMILY = "👩\u200d👩\u200d👧"
TYPED = [*tokenizer.SPECIALS, "[SEP]", "[CLS]", "[UNK]", "[MASK]", "[PAD]", "<|endoftext|>", "<s>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "[", "]", "<", ">", "\u2028",
        "hello", "wor", "##ld", "cafe", "京", "北", ",", "sep"]  # fmt: skip
GPT2_MERGES = ["h e", "he l", "hel l", "hell o", "\u0120 w", "\u0120w o", "< |"]  # \u0120 writes a space


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: a tokenizer} of every kind but "char", files in small."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in BERT))
    (folder / "cased.txt").write_text("".join(f"{token}\n" for token in [*BERT, "##L"]))
    byte = tokenizer.train("byte", (), 0)
    letters = [byte.token(byte.special["<audio>"] + 1 + b) for b in range(256)]
    tokens = [*letters, *(merge.replace(" ", "") for merge in GPT2_MERGES), "<|endoftext|>", "<s>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in GPT2_MERGES))
    typed = CORPUS + [f"{text} " * 50 for text in TYPED]  # a corpus that is full of them teaches none of them
    (folder / "tokenizer.json").write_text(tokenizer.train("bpe", typed, 300).to_json())
    kinds = {"byte": byte} | {kind: tokenizer.train(kind, typed, 400) for kind in ("bpe", "wordpiece")}
    files = {"json": "tokenizer.json", "gpt2": "", "bert": "vocab.txt", "bert cased": "cased.txt"}
    return kinds | {name: tokenizer.train(str(folder / file), (), 0) for name, file in files.items()}


KINDS = ("byte", "bpe", "wordpiece", "json", "gpt2", "bert", "bert cased")


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_that_is_typed_is_plain_text(made, kind):
    some = made[kind]
    special = {id for id in map(some.id, TYPED) if id is not None and some.token(id) != "[UNK]"}
    assert len(special) >= len(tokenizer.SPECIALS) and set(some.special.values()) <= special
    for text in TYPED:
        for around in (text, f" {text}{text} ", f"x{text}x"):
            assert not special & set(some.encode(around)), around
            assert not special & set(some.prompt(around)), around
    assert some.decode(sorted(special)) == "", "and decoding leaves them out"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_ids_of_their_own(made, kind):
    some = made[kind]
    assert list(some.special) == list(tokenizer.SPECIALS) and some.ends == (some.special["<end>"],)
    first = 0 if kind in ("byte", "bpe", "wordpiece", "json") else some.vocab - len(tokenizer.SPECIALS)
    assert list(some.special.values()) == list(range(first, first + len(tokenizer.SPECIALS)))
    assert max(some.inner.get_vocab().values()) == some.vocab - 1


def test_a_file_s_frame_is_not_laid_around_documents(made, tmp_path):
    inner = tokenizers.Tokenizer.from_str(made["bert"].to_json())
    inner.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inner.save(str(tmp_path / "t.json"))
    framed, ours = tokenizer.load(tmp_path / "t.json"), tokenizer.train(str(tmp_path / "t.json"), (), 0)
    assert framed.prompt("hello") == [2, *framed.encode("hello"), 3]
    assert ours.prompt("hello") == ours.encode("hello") == framed.encode("hello")


def test_a_token_that_ends_answers_cannot_be_typed(made, tmp_path):
    """Also one that its file does not call special."""
    inner = tokenizers.Tokenizer.from_str(made["bpe"].to_json())
    inner.add_tokens([tokenizers.AddedToken("<eot>", special=False)])
    inner.save(str(tmp_path / "t.json"))
    eot = inner.token_to_id("<eot>")
    path = tmp_path / "t.json"
    for some in (tokenizer.train(str(path), (), 0, ("<eot>",)), tokenizer.load(path, ("<eot>",))):
        assert some.ends == (eot,) and eot not in some.encode("hi <eot> there") and some.id("<eot>") == eot
        assert some.decode(some.encode("hi <eot> there")) == "hi <eot> there"


def random_texts(seed: int, count: int):
    """Of every plane of Unicode, with much of what goes wrong."""
    rng = np.random.default_rng(seed)
    odd = ["\0", "\r\n", "\n", "  ", "\t", "e\u0301", "\u0301", "🙂", FAMILY, "🇨🇳", "京", "北京", "\ufeff", "\u2028",
           "\x7f", "\ufffd", "\U0010ffff", "\ufffe", "a", " b", "'s", *TYPED]  # fmt: skip
    for _ in range(count):
        points = rng.integers(0, rng.choice([0x80, 0x800, 0x10000, 0x110000]), 10)
        parts = [chr(p) for p in points if not 0xD800 <= p < 0xE000] + list(rng.choice(odd, rng.integers(0, 12)))
        yield "".join(rng.permutation(parts)) if parts else ""


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "json"])
def test_every_text_comes_back(made, kind):
    some, seen = made[kind], 0
    for text in [*TEXTS, "\0", "\r\n", "🙂", "e\u0301", "\u0301", *random_texts(1, 300)]:
        ids = some.encode(text)
        assert some.decode(ids) == text
        assert all(0 <= id < some.vocab for id in ids) and (ids or not text)
        seen += len(text)
    assert seen > 1000


def test_half_a_surrogate_pair_is_no_text(made):
    for call in (made["byte"].encode, made["bert"].prompt):
        with pytest.raises(config.InputError, match="not Unicode"):
            call("\ud800")


def test_bytes(made):
    byte, n = made["byte"], len(tokenizer.SPECIALS)
    assert byte.vocab == 256 + n
    for text in [*TEXTS, *random_texts(2, 50)]:
        assert byte.encode(text) == [n + b for b in text.encode()]
    whole = byte.encode("京🙂")
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            assert byte.decode(whole[start:stop]) == bytes(i - n for i in whole[start:stop]).decode(errors="replace")
    assert byte.decode([*byte.encode("a京"), *byte.encode("京")[:2]]) == "a京\ufffd", "what was whole stays"


def test_word_pieces_are_trained():
    texts = ["The walker walks in 北京大学", "a talker talks, Café"] * 4
    made = tokenizer.train("wordpiece", texts, 200)

    def pieces(text, made=made):
        return [made.token(id) for id in made.encode(text)]

    assert pieces("北京 大学") == list("北京大学"), "Chinese characters are words of one"
    assert pieces("walker") == ["walker"] and "".join(pieces("walkalker")).replace("##", "") == "walkalker"
    assert all(piece.startswith("##") for piece in pieces("walkalker")[1:]) and len(pieces("walkalker")) > 1
    assert pieces("The 🙂 in🙂") == ["The", "[UNK]", "[UNK]"], "a word with an unknown character is unknown"
    assert pieces("Café") == ["Café"] and pieces("THE") == ["[UNK]"], "letters stay as they are"
    assert made.decode(made.encode("walks in  北京, 🙂")) == "walks in 北 京, [UNK]", "spaces are lost, [UNK] is shown"
    small = tokenizer.train("wordpiece", texts, 200, lower=True)
    assert pieces("THE CAFÉ", small) == ["the", "cafe"]
    with pytest.raises(config.InputError, match="for 'wordpiece' alone"):
        tokenizer.train("bpe", texts, 300, lower=True)


def test_training_gives_the_same_everywhere(tmp_path):
    """Processes of one run compare their tokenizers; the library's own order of ##x differs between processes."""
    code = (
        "import hashlib; from gpt4v_jax.data import tokenizer as t; "
        "print([hashlib.sha256(t.train(k, ['the quick brown fox', 'jumps over lazy 北京 dogs'] * 2, 300).to_json()"
        ".encode()).hexdigest() for k in t.KINDS])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1 and runs[0].stdout, runs[0].stderr


@pytest.mark.parametrize("kind, vocab", [("bpe", 262), ("wordpiece", 20)])
def test_a_vocabulary_below_the_alphabet(kind, vocab):
    with pytest.raises(config.InputError, match=f"{vocab} is too small.* take [0-9]+") as raised:
        tokenizer.train(kind, CORPUS, vocab)
    least = int(str(raised.value).split(" take ")[1].split(",")[0])
    assert tokenizer.train(kind, CORPUS, least).vocab == least


# ---- files of other models


def test_files_of_gpt2_and_bert(made):
    gpt2, bert, cased = made["gpt2"], made["bert"], made["bert cased"]
    assert [gpt2.token(id) for id in gpt2.encode("hello world")] == ["hello", "\u0120wo", "r", "l", "d"]
    assert [bert.token(id) for id in bert.encode("HELLO, World café 北京 x")] == [
        "hello", ",", "wor", "##ld", "cafe", "北", "京", "[UNK]",
    ]  # fmt: skip
    assert bert.decode(bert.encode("hello x")) == "hello [UNK]"
    assert [cased.token(id) for id in cased.encode("HELLO hello café")] == ["[UNK]", "hello", "[UNK]"]
    assert bert.id("\u2028") == 10 and bert.id("hello") == 11, "a line separator is no end of a line"


@pytest.mark.parametrize("files, named, says", [
    ({"vocab.txt": "hello\n"}, "vocab.txt", r"vocab.txt has no line \[UNK\]"),
    ({"vocab.txt": "[UNK]\na\nb\na\n"}, "vocab.txt", "'a' stands there twice, in line 4"),
    ({"vocab.txt": b"[UNK]\n\xff"}, "vocab.txt", "vocab.txt is not UTF-8"),
    ({}, "vocab.txt", "vocab.txt is missing"),
    ({}, "tokenizer.json", "tokenizer.json is missing"),
    ({"tokenizer.json": "{}"}, "tokenizer.json", "is no tokenizer of"),
    ({"vocab.json": "{}"}, "", "merges.txt is missing"),
    ({"merges.txt": ""}, "", "vocab.json is missing"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "", "are no BPE"),
    ({"vocab.json": "nonsense", "merges.txt": ""}, "", "are no BPE"),
])  # fmt: skip
def test_bad_files(tmp_path, files, named, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(config.InputError, match=says):
        tokenizer.train(str(tmp_path / named), (), 0)


@with_files
def test_ids_of_the_published_vocabularies():
    gpt2, bert = tokenizer.load(REAL / "gpt2"), tokenizer.load(REAL / "bert-base-uncased" / "vocab.txt")
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.vocab == 50257
    assert (bert.id("[CLS]"), bert.id("[SEP]"), bert.encode("Hello")) == (101, 102, [7592]) and bert.vocab == 30522
    assert tokenizer.train(str(REAL / "gpt2"), (), 0, ("<|endoftext|>",)).ends == (50256,)
    for folder in ("gpt2", "bert-base-uncased/vocab.txt"):
        more = tokenizer.train(str(REAL / folder), (), 0)
        assert more.special["<pad>"] == tokenizer.load(REAL / folder).vocab
    assert {token for token, added in gpt2.inner.get_added_tokens_decoder().items()} == {50256}


COMPARED = [
    *TEXTS, *TYPED, "Hello, World!", "It's we'll they'RE", "café naïve Ångström", "e\u0301 o\u0308", "\0 a\x07b\x7f",
    "a\r\nb\tc", "北京大学 is in 中国。", "我爱自然语言处理", "日本語のテキスト", "한국어", f"🙂🙃 {FAMILY} 🇨🇳",
    "Привет, мир", "مرحبا", "1,234.56 -7e-3", "\u2028\u00a0\u3000x", "\ufeffbom", "ＡＢＣ fullwidth", "x" * 120,
    "antidisestablishmentarianism", "a_b#c@d", "[SEP] [unused1] ##ing", *random_texts(3, 60),
]  # fmt: skip


@with_files
def test_gpt2_is_the_reference_s():
    transformers = pytest.importorskip("transformers")
    names = {"vocab": str(REAL / "gpt2" / "vocab.json"), "merges": str(REAL / "gpt2" / "merges.txt")}
    theirs, ours = transformers.GPT2TokenizerFast(**names), tokenizer.load(REAL / "gpt2")
    assert theirs("Hello world").input_ids == [15496, 995]
    for text in COMPARED:
        wanted = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == wanted, text
        assert ours.decode(wanted) == theirs.decode(wanted, clean_up_tokenization_spaces=False) == text


@with_files
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-chinese", "cased"])
def test_bert_is_the_reference_s(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = REAL / name / "vocab.txt"
    if name == "cased":  # none is at hand: the uncased one with a few words more
        path = tmp_path / "vocab.txt"
        words = "".join(f"{word}\n" for word in ("Hello", "It", "##RE", "World", "café"))
        path.write_bytes((REAL / "bert-base-uncased" / "vocab.txt").read_bytes() + words.encode())
    theirs = transformers.BertTokenizerFast(vocab=str(path), do_lower_case=name != "cased")
    ours = tokenizer.load(path)
    assert theirs("Hello").input_ids[0] == ours.id("[CLS]") == 101
    for text in COMPARED:
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids, text


# ---- the command


def say(*args, cwd=None):
    """-> (exit status, stdout, stderr)."""
    command = [sys.executable, "-m", "gpt4v_jax.data.tokenizer", *map(str, args)]
    done = subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the red circle\r\nthe red square\n")
    (tmp_path / "b.txt").write_bytes("红色 的 圆 红色\n".encode())
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


@pytest.mark.parametrize("kind", tokenizer.KINDS)
def test_train_and_show(kind, corpus, tmp_path):
    out = tmp_path / "tok.json"
    status, said, err = say("train", "--kind", kind, "--vocab", 300, "--out", out, *corpus)
    made = tokenizer.load(out)
    assert (status, said, err) == (0, f"{out}: {kind}, {made.vocab:,} tokens\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "tok.json"]
    text = "the red 圆"
    with open(corpus[0], newline="") as file:
        texts = [*file, corpus[1].read_text()]
    assert made.encode(text) == tokenizer.train(kind, texts, 300).encode(text)
    assert made.decode(made.encode(text)) == text and (made.id("\r") is not None or kind != "char")
    status, said, err = say("show", "--tokenizer", out, text)
    assert status == 0 and [int(line.split()[0]) for line in said.splitlines()] == made.encode(text)
    assert [line.split()[1] for line in said.splitlines() if kind == "wordpiece"] in ([], ["the", "red", "圆"])


@pytest.mark.parametrize("change, says", [
    ({"files": ["absent.txt"]}, "absent.txt is missing"),
    ({"files": ["."]}, "corpus . is missing, or no file"),
    ({"files": ["empty.txt"]}, "empty.txt is empty"),
    ({"files": ["empty.txt"], "kind": "char"}, "empty.txt is empty"),
    ({"files": ["empty.txt"], "kind": "wordpiece"}, "empty.txt is empty"),
    ({"files": ["a.txt", "latin.txt"]}, "latin.txt, line 2 is not UTF-8"),
    ({"kind": "bqe"}, "--kind='bqe' is none of .*did you mean 'bpe'"),
    ({"kind": "tok.json"}, "--kind='tok.json' is none of"),
    ({"out": "absent/tok.json"}, "--out=absent/tok.json: no folder absent"),
    ({"out": "."}, "--out=.: is a folder"),
    ({"vocab": 100}, "100 is too small"),
])  # fmt: skip
def test_bad_input_to_train(change, says, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("fine\ncaf\xe9\n".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    given = {"files": ["a.txt"], "out": "tok.json", "kind": "bpe", "vocab": 300} | change
    given |= {"files": list(map(Path, given["files"])), "out": Path(given["out"])}
    with pytest.raises(config.InputError, match=says):
        tokenizer.train_on(**given)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_refuses_leaves_what_is_there(corpus, tmp_path, monkeypatch):
    out = tmp_path / "tok.json"
    out.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(config.InputError, match="tok.json cannot be written: No space left"):
        tokenizer.train_on(corpus, out, "byte", 0)
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("args, says", [
    (["train", "--out", "tok.json", "absent.txt"], "the corpus absent.txt is missing"),
    (["train", "--out", "tok.json", "--kind", "bqe", "a.txt"], "did you mean 'bpe'"),
    (["train", "a.txt"], "--out is missing"),
    (["train", "--out", "tok.json"], "a file of text, or the text to show is missing"),
    (["train", "--out", "tok.json", "--vocab", "0", "a.txt"], "--vocab"),
    (["train", "--ouch", "tok.json", "a.txt"], "ouch"),
    (["trian", "a.txt"], "did you mean 'train'"),
    (["show", "hello"], "--tokenizer is missing"),
    (["show", "--tokenizer", "absent.json", "hello"], "absent.json is missing"),
    (["show", "--tokenizer", "absent.json", "hello", "world"], "put it in quotes"),
])  # fmt: skip
def test_bad_input_is_one_line(args, says):
    status, out, err = say(*args)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_importing_defines_no_flags():
    """Other commands have flags of the same names."""
    code = "import gpt4v_jax.data.tokenizer; from absl import flags; print({'out', 'kind', 'vocab'} & {*flags.FLAGS})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
