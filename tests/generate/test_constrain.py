"""Constrained output: what a mask allows, by brute force and by random walks, for each kind of tokenizer."""

import functools
import gc
import json
import re
import reprlib
import string
import time
import weakref

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.generate import constrain, spelling

ASCII = string.printable[:95]
TEXT = 'one two 12 {"a": [true, null]} yes no\nnaïve ☃ yes no one two 12'
PIECES = ["▁yes", "yes", "no", "▁no", "▁▁", "o▁n", '{"', '":', "tr", "ue", "12", "ab", "<b>"]


def sentencepiece(kind):
    """Like Llama's, with bytes for unknown characters, or like T5's, without; pieces cross words, to be awkward."""
    specials = ["<s>", "</s>", "<unk>"]
    fallback = [f"<0x{b:02X}>" for b in range(256)] if kind == "llama" else []
    tokens = [*specials, *fallback, "▁", *ASCII[:-1], *PIECES]
    if kind == "llama":
        model = models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
        decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        model, decoder = models.Unigram([(t, -1.0) for t in tokens], 2), decoders.Metaspace("▁")
    inner = tokenizers.Tokenizer(model)
    inner.decoder = decoder
    inner.add_special_tokens(specials)
    return tokenizer_lib.Tokenizer(inner, ("</s>",))


@functools.cache
def make(kind):
    if kind in ("llama", "t5"):
        return sentencepiece(kind)
    return tokenizer_lib.train(kind, [ASCII + "\né" if kind == "char" else TEXT] * 3, 429)


KINDS = ["char", "byte", "bpe", "llama", "t5"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def drops(kind):
    return kind in ("llama", "t5")


@functools.cache
def closing(made):
    return np.array([text in (b'"', b"}", b"]") for text in spelling.token_bytes(made)])


def walks(grammar, made, number=50, most=120):
    """-> texts of random allowed tokens; where one becomes long, of those that close JSON, if there are any."""
    rng, start, texts = np.random.default_rng(0), constrain.Matcher(grammar, made), []
    for _ in range(number):
        matcher, ids = start.copy(), []
        while not matcher.finished:
            assert len(ids) < 5 * most, made.decode(ids)
            mask = matcher.allowed() & closing(made) if len(ids) >= most else matcher.allowed()
            found = np.flatnonzero(mask if mask.any() else matcher.allowed())
            ids.append(int(found[rng.integers(len(found))]))
            matcher.advance(ids[-1])
        texts.append(made.decode(ids))
    return texts


# ---- bytes of tokens


@each_kind
def test_token_bytes_are_what_the_decoder_writes(kind):
    made = make(kind)
    written, before = spelling.token_bytes(made), made.id("a")
    assert all(not written[id] for id in set(range(made.vocab)) - set(made.words().tolist()))
    for id in made.words():
        try:
            text = written[id].decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        assert made.decode([before, id]) == "a" + text, made.token(id)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_bytes_of_a_text_are_its_own(kind):
    written = spelling.token_bytes(make(kind))
    assert b"".join(written[id] for id in make(kind).encode(TEXT)) == TEXT.encode()
    assert {bytes([b]) for b in range(256)} <= set(written)


def test_bytes_that_fall_back():
    made = make("llama")
    assert spelling.token_bytes(made)[made.id("<0xC3>")] == b"\xc3"


def test_no_bytes_of_ones_own():
    for made in (tokenizer_lib.train("wordpiece", [TEXT], 200), without_decoder()):
        with pytest.raises(config.InputError, match="sets blanks by rules: use one of bytes"):
            constrain.Matcher(constrain.regex("a"), made)


def without_decoder():
    return tokenizer_lib.Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0})))


def test_the_trie_goes_with_its_tokenizer():
    made = tokenizer_lib.train("byte", [], 0)
    assert spelling.of(made) is spelling.of(made)
    trie = weakref.ref(spelling.of(made))
    del made
    gc.collect()
    assert trie() is None


# ---- masks


@each_kind
@pytest.mark.parametrize("continues", [False, True])
def test_masks_of_choices_by_brute_force(kind, continues):
    made = make(kind)
    texts = ["yes", "no", "yes no", " no", "12", "1", "é", "☃", "<b>"]
    written, dropped = spelling.token_bytes(made), drops(kind) and not continues
    writable = [t for t in texts if kind not in ("char", "t5") or t not in ("☃", *["é"] * (kind == "t5"))]
    whole = {t.encode() for t in writable}
    if dropped:  # the decoder takes one blank away
        whole = {b" " + t for t in whole} | {t for t in whole if not t.startswith(b" ")}
    for seed in range(5):
        rng, raw = np.random.default_rng(seed), b""
        matcher = constrain.Matcher(constrain.choices(texts), made, continues)
        while not matcher.finished:
            for id, text in enumerate(written):
                expected = bool(text) and any(one.startswith(raw + text) for one in whole)
                if dropped and not raw:
                    expected = expected and text.count(b" ") <= text.startswith(b" ")
                expected = raw in whole if id in made.ends else expected
                assert matcher.allowed()[id] == expected, (raw, text)
            words = matcher.allowed() & ~matcher.spelling.ends
            matcher.advance(token := int(rng.choice(np.flatnonzero(words))))
            raw += written[token]
        assert raw in whole
        assert matcher.allowed().tolist() == [id in made.ends for id in range(made.vocab)]


REGEXES = [
    r"(ab|a){0,4}c", r"\d{1,3}(\.\d{2})? (km|mi)", r"^[^x]{1,6}x$", r" ?(yes|no)\n?", r"(?i:true)|[\w\s]{3}",
    "(a+){1,4}b", r"\D[^\W\d]\S",
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("pattern", REGEXES)
def test_random_walks_match_the_regex(kind, pattern):
    for text in walks(constrain.regex(pattern), make(kind)):
        assert re.fullmatch(pattern, text, re.ASCII), text


@each_kind
def test_random_walks_end_as_a_choice(kind):
    texts = ["yes", "no", "yes no", "no one", "{}"]
    assert {"yes no", "no one", "{}"} <= set(walks(constrain.choices(texts), make(kind))) <= set(texts)


TREE = {
    "$defs": {"tree": {
        "type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
        "required": ["n"], "additionalProperties": False,
    }},
    "$ref": "#/$defs/tree",
}  # fmt: skip


def is_tree(value):
    return (set(value) <= {"n", "next"} and type(value["n"]) is int
            and ("next" not in value or is_tree(value["next"])))  # fmt: skip


SCHEMAS = [  # (schema, what its values are)
    ({"enum": ["red", 7, None]}, lambda v: v in ("red", 7, None)),
    ({"type": "integer", "minimum": -5, "exclusiveMaximum": 120}, lambda v: type(v) is int and -5 <= v < 120),
    ({"type": "integer", "minimum": 0, "maximum": 9999, "multipleOf": 97}, lambda v: v % 97 == 0),
    ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: isinstance(v, str) and 2 <= len(v) <= 4),
    ({"type": "string", "pattern": "^[a-c]{2}[0-9]$"}, lambda v: re.fullmatch("[a-c]{2}[0-9]", v)),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
     lambda v: 1 <= len(v) <= 3 and all(type(item) is bool for item in v)),
    ({"anyOf": [{"type": "null"}, {"const": {"a": [1]}}]}, lambda v: v in (None, {"a": [1]})),
    ({"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"enum": [1, 2]}},
      "required": ["name", "age"], "additionalProperties": False},
     lambda v: list(v) == ["name", "age"] and len(v["name"]) <= 3 and v["age"] in (1, 2)),
    (TREE, is_tree),
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("schema, valid", SCHEMAS, ids=map(str, range(len(SCHEMAS))))
def test_random_walks_are_json_of_the_schema(kind, schema, valid):
    for text in walks(constrain.json_schema(schema), make(kind)):
        assert valid(json.loads(text)), text


@each_kind
def test_random_walks_are_json_objects(kind):
    for text in walks(constrain.json_object(), make(kind), 10):
        assert isinstance(json.loads(text), dict)


def test_no_token_leads_where_no_other_goes_on():
    made = tokenizer_lib.train("char", ["ab"], 0)
    assert constrain.Matcher(constrain.regex("ac|b"), made).allowed().tolist() == [False, True]
    with pytest.raises(config.InputError, match="regex='c': no text that this tokenizer writes"):
        constrain.Matcher(constrain.regex("c"), made)
    with pytest.raises(config.InputError, match="this tokenizer cannot write .*, which JSON needs"):
        constrain.Matcher(constrain.json_object(), made)


def test_an_end_of_the_vocabulary_is_no_text():
    made = tokenizer_lib.train("char", ["ab\n"], 0, end=("\n",))
    matcher = constrain.Matcher(constrain.regex("a\nb|b"), made)
    assert np.flatnonzero(matcher.allowed()).tolist() == [made.id("b")]
    matcher.advance(made.id("b"))
    assert matcher.finished and np.flatnonzero(matcher.allowed()).tolist() == list(made.ends)


# ---- a matcher


@each_kind
def test_what_is_forbidden_raises_and_changes_nothing(kind):
    made = make(kind)
    matcher = constrain.Matcher(constrain.regex("a[bc]"), made)
    for token in (made.id("b"), -1, made.vocab, *made.ends):
        with pytest.raises(ValueError, match="is not allowed here by regex='a"):
            matcher.advance(token)
    matcher.advance(made.id("a"))
    assert matcher.allowed()[[made.id("b"), made.id("c"), made.id("a")]].tolist() == [True, True, False]


def test_every_end_ends_once_complete():
    inner = tokenizer_lib.train("byte", [], 0).inner
    made = tokenizer_lib.Tokenizer(inner, ("<end>", "<pad>"))
    matcher = constrain.Matcher(constrain.regex("ab?"), made)
    matcher.advance(made.id("a"))
    assert set(np.flatnonzero(matcher.allowed())) == {made.id("b"), *made.ends} and not matcher.finished
    matcher.advance(made.ends[1])
    assert matcher.finished and set(np.flatnonzero(matcher.allowed())) == set(made.ends)
    matcher.advance(made.ends[0])  # a row that waits for others goes on with ends
    with pytest.raises(ValueError, match="is not allowed"):
        matcher.advance(made.id("b"))


def test_a_copy_goes_on_by_itself():
    made = make("byte")
    one = constrain.Matcher(constrain.choices(["ab", "cd"]), made)
    other = one.copy()
    one.advance(made.id("a"))
    other.advance(made.id("c"))
    assert one.allowed()[made.id("b")] and other.allowed()[made.id("d")] and not other.allowed()[made.id("b")]


def test_masks_of_rows():
    made = tokenizer_lib.train("char", ["ab"], 0)
    matcher, done = (constrain.Matcher(constrain.regex(p), made) for p in ("a", "b"))
    done.advance(1)
    expected = [[True] * 3, [True, False, False], [True] * 3]
    assert constrain.masks([None, matcher, done], 3).tolist() == expected  # the third id is the model's alone
    assert done.finished and not done.allowed().any()


# ---- bad input


def chain(length):
    """$ref into $ref: 3,000 of them overflow the library's stack."""
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {}}, "$ref": "#/$defs/d0"}


def nested(depth):
    return functools.reduce(lambda inner, _: {"items": inner}, range(depth), {})


@pytest.mark.parametrize("build, given, message", [
    (constrain.regex, "[", r"regex='\[' cannot be used: unclosed character class"),
    (constrain.regex, "a)(b", "unopened group"),
    (constrain.regex, "a\\", "ends in a backslash"),
    (constrain.regex, "", "leave it out"),
    (constrain.regex, None, "regex=None must be a text"),
    (constrain.regex, "a(?=b)", "look-around"),
    (constrain.regex, r"(a)\1", "backreferences"),
    (constrain.regex, "a$b", r"lookarounds not supported yet; End in regex /a\$b/$"),
    (constrain.regex, r"[^\s\S]", "no text that this tokenizer writes"),
    (constrain.regex, "a" * 5000, r"aaa\.\.\.a+' has 5000 bytes: give at most 4096$"),
    (constrain.regex, "(" * 2000 + ")" * 2000, "nested parentheses"),
    (constrain.regex, "\ud800", "not Unicode"),
    (constrain.choices, [], r"choices=\[\] must be a list of at least one text"),
    (constrain.choices, "yes", "must be a list"),
    (constrain.choices, ["a", ""], "one of them is empty"),
    (constrain.choices, ["a", 3], "a choice=3 must be a text"),
    (constrain.choices, ["a"] * 1001, "1001 choices: give at most 1000"),
    (constrain.choices, ["a" * 70000], "bytes: give at most"),
    (constrain.json_schema, [], r"schema=\[\] must be an object"),
    (constrain.json_schema, {"type": "strange"}, "cannot be used: failed to .*: Invalid type: strange"),
    (constrain.json_schema, {"type": "string", "pattern": "["}, "unclosed character class"),
    (constrain.json_schema, {"type": "string", "pattern": "a\\"}, "ends in a backslash"),
    (constrain.json_schema, {"patternProperties": {"a\\": {}}}, "ends in a backslash"),
    (constrain.json_schema, {"type": "string", "format": "strange"}, "Unknown format"),
    (constrain.json_schema, {"items": {"maxLenght": 3}}, "the keyword 'maxLenght' cannot be enforced: leave it out"),
    (constrain.json_schema, {"properties": {"a": {"not": {}}}}, "the keyword 'not' cannot be enforced"),
    (constrain.json_schema, {"allOf": [{"uniqueItems": True}]}, "the keyword 'uniqueItems' cannot be enforced"),
    (constrain.json_schema, {"x-guidance": {"lenient": True}}, "the keyword 'x-guidance' cannot be enforced"),
    (constrain.json_schema, {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf .* not supported"),
    (constrain.json_schema, {"type": "integer", "minimum": 3, "maximum": 2}, "greater than maximum"),
    (constrain.json_schema, {"$ref": "#"}, r"schema={'\$ref': '#'}: no text"),
    (constrain.json_schema, {"allOf": [{"$ref": "#"}, {"type": "object"}]}, "circular references"),
    (constrain.json_schema, {"$ref": "https://example.com/a.json"}, "does not fetch"),
    (constrain.json_schema, {"$ref": "file:///etc/passwd"}, "does not fetch"),
    (constrain.json_schema, nested(100), "nested more than 64 levels"),
    (constrain.json_schema, nested(1000), "nested more than 64 levels"),
    (constrain.json_schema, nested(100_000), "nested more than 64 levels"),
    (constrain.json_schema, chain(1000), "1001 different .* make it flatter"),
    (constrain.json_schema, chain(3000), "bytes: give at most"),
    (constrain.json_schema, {"enum": ["a" * 100] * 1000}, "bytes: give at most 65536"),
    (constrain.json_schema, {"prefixItems": [{"multipleOf": 7}] * 9}, "has 9 multipleOf: give at most 8"),
    (constrain.json_schema, {"patternProperties": {f"a{i}": {} for i in range(33)}}, "has 33 patternProperties"),
    (constrain.json_schema, {"patternProperties": 3}, "cannot be used"),
    (constrain.json_schema, {"const": float("nan")}, "is no JSON"),
    (constrain.json_schema, {"const": {1, 2}}, "is no JSON"),
    (constrain.json_schema, {"const": "\ud800"}, "cannot be used"),
    (constrain.json_schema, {"type": "integer", "multipleOf": 10**9 + 7}, "multipleOf=.* may be 10000: give rounder"),
    (constrain.json_schema, {"allOf": [{"multipleOf": 1.01}, {"multipleOf": 103}]}, "may be 10000: give rounder"),
    (constrain.json_schema, {"multipleOf": 0}, "invalid multiple of"),
    (constrain.json_schema, {"multipleOf": "7"}, "cannot be used"),
], ids=lambda value: getattr(value, "__name__", reprlib.repr(value)[:30]))  # fmt: skip
def test_bad_input(build, given, message):
    start = time.process_time()
    with pytest.raises(config.InputError, match=message) as error:
        constrain.Matcher(build(given), make("byte"))
    assert len(str(error.value)) < 400
    assert time.process_time() - start < 1


@pytest.mark.parametrize("grammar", [
    constrain.regex("(a+)+$"), constrain.regex("(a|aa)*b"), constrain.regex("x{1000000}"),
    constrain.regex("((a{100}){100}){100}"), constrain.regex("[ab]*a[ab]{30}"), constrain.regex("(a?){500}a{500}"),
    constrain.json_schema(nested(60)), constrain.json_schema(chain(190)),
    constrain.json_schema({"type": "string", "minLength": 10**6}),
    constrain.json_schema({"type": "array", "minItems": 10**9}),
    constrain.json_schema({"prefixItems": [{"type": "integer", "multipleOf": 9973} for _ in range(8)]}),
    constrain.json_schema({"patternProperties": {f"^a{i}[a-z]*$": {"type": "string"} for i in range(32)}}),
    constrain.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
], ids=lambda grammar: grammar.shown[:40])  # fmt: skip
def test_what_looks_dangerous_is_quick(grammar):
    start, rng = time.process_time(), np.random.default_rng(0)
    matcher = constrain.Matcher(grammar, make("byte"))
    for _ in range(100):
        words = np.flatnonzero(matcher.allowed() & ~matcher.spelling.ends)
        if not len(words):
            break
        matcher.advance(int(rng.choice(words)))
    assert time.process_time() - start < 1
