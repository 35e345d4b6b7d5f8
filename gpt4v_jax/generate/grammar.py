"""What an output may be held to: a regular expression, choices or a JSON schema, within limits that keep it harmless.

Nothing here knows of tokens: `constrain.Matcher` joins a grammar and a tokenizer.
"""

import dataclasses
import fractions
import json
import math
import reprlib
from collections.abc import Iterator, Sequence

from gpt4v_jax import config

MOST_BYTES = {"regex": 4096, "choices": 1 << 16, "schema": 1 << 16}
MOST_CHOICES = 1000
DEEPEST = 64  # levels of a schema's JSON
# llguidance follows a $ref by recursion, and some 4,000 levels overflow 8 MiB of stack: the whole process dies of it.
MOST_LEVELS = 1000
# In one schema. Without these limits 800 multipleOf took 106 s and 3 GB, and 600 patternProperties 137 s.
MOST_OF = {"multipleOf": 8, "patternProperties": 32}
MOST_MULTIPLE = 10_000  # states of an automaton that divides; of 300,000 one takes 3 s

ONE = ("items", "additionalItems", "additionalProperties")  # their value is a schema
LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
PLAIN = (
    "$ref", "type", "const", "enum", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems", "required",
    "minProperties", "maxProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
NOTES = (
    "$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly",
)  # fmt: skip
KEYWORDS = {*ONE, *LIST, *NAMED, *PLAIN, *NOTES}
SHORT = reprlib.Repr()  # of values in messages, whatever their size and depth
SHORT.maxlevel, SHORT.maxlist, SHORT.maxstring = 3, 4, 60


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Made by `regex`, `choices`, `json_schema` or `json_object`."""

    kind: str  # regex | choices | schema
    text: str  # a regular expression, or a schema as JSON
    shown: str  # what messages say of it


def regex(pattern: str) -> Grammar:
    """The whole output matches `pattern`, in the syntax of Rust's regex crate, without look-around and back references.

    \\d, \\w and \\s are ASCII, as with Python's re.ASCII: a small model need not know Kawi digits.

    Raises InputError where it is too long, empty or no text; `Matcher` raises where it is no regular expression.
    """
    if pattern == "":
        raise config.InputError("regex='' matches nothing but an empty output: leave it out")
    _escapes("regex", _text("regex", pattern))
    return _grammar("regex", pattern, pattern)


def choices(texts: Sequence[str]) -> Grammar:
    """The whole output is one of `texts`. Raises InputError for none, too many, too long ones and an empty one."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise config.InputError(f"choices={SHORT.repr(texts)} must be a list of at least one text")
    if len(texts) > MOST_CHOICES:
        raise config.InputError(f"{len(texts)} choices: give at most {MOST_CHOICES}")
    if "" in texts:
        raise config.InputError(f"choices={SHORT.repr(texts)}: one of them is empty: leave it out")
    return _grammar("choices", "|".join(literal(_text("a choice", text)) for text in texts), texts)


def json_schema(schema: dict) -> Grammar:
    """The whole output is JSON of this schema (draft 2020-12), its properties in the schema's order.

    A schema may refer to itself. Keys beyond `properties` may come twice, in which the standard is stricter. Raises
    InputError for keywords that are not enforced, and for what is too deep or too large.
    """
    shown = f"schema={SHORT.repr(schema)}"
    if not isinstance(schema, dict):
        raise config.InputError(f"{shown} must be an object")
    deep = f"{shown} is nested more than {DEEPEST} levels deep: make it flatter"
    try:
        made = _grammar("schema", json.dumps(schema, allow_nan=False), schema)
    except (TypeError, ValueError) as error:
        raise config.InputError(f"{shown} is no JSON: {error}") from None
    except RecursionError:
        raise config.InputError(deep) from None
    depth, refs, patterns, multiples = _depth(schema), set(), [], []
    if depth > DEEPEST:
        raise config.InputError(deep)
    for part in _parts(schema):
        odd = next((key for key in part if key not in KEYWORDS), None)
        if odd is not None:  # the library overlooks keywords that it never heard of, such as maxLenght
            raise config.InputError(f"{shown}: the keyword {SHORT.repr(odd)} cannot be enforced: leave it out")
        refs |= {str(part["$ref"])} if "$ref" in part else set()
        patterns += part["patternProperties"] if isinstance(part.get("patternProperties"), dict) else ()
        multiples += [part["multipleOf"]] if "multipleOf" in part else []
        _escapes("pattern", str(part.get("pattern", "")))
    for pattern in patterns:
        _escapes("a key of patternProperties", str(pattern))
    for key, found in (("multipleOf", multiples), ("patternProperties", patterns)):
        if len(found) > MOST_OF[key]:
            raise config.InputError(f"{shown} has {len(found)} {key}: give at most {MOST_OF[key]}")
    if _common(multiples) > MOST_MULTIPLE:
        raise config.InputError(
            f"multipleOf={SHORT.repr(multiples)}: their least common multiple, in units of the last decimal place, may "
            f"be {MOST_MULTIPLE}: give rounder ones"
        )
    if depth * (1 + len(refs)) > MOST_LEVELS:
        raise config.InputError(
            f"{shown} has {len(refs)} different $ref and {depth} levels, the product may be {MOST_LEVELS}: make it "
            "flatter"
        )
    return made


def json_object() -> Grammar:
    """The whole output is a JSON object, whichever."""
    return json_schema({"type": "object"})


def literal(text: str) -> str:
    """-> a regular expression that matches just this text, within [] too."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _grammar(kind: str, text: str, given) -> Grammar:
    shown, size = f"{kind}={SHORT.repr(given)}", len(text.encode())
    if size > MOST_BYTES[kind]:
        raise config.InputError(f"{shown} has {size} bytes: give at most {MOST_BYTES[kind]}")
    return Grammar(kind, text, shown)


def _text(what: str, text) -> str:
    if not isinstance(text, str):
        raise config.InputError(f"{what}={SHORT.repr(text)} must be a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise config.InputError(f"{what}={SHORT.repr(text)} is not Unicode: it has half a surrogate pair") from error
    return text


def _escapes(what: str, pattern: str) -> None:
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # the library overlooks it
        raise config.InputError(f"{what}={SHORT.repr(pattern)} ends in a backslash that escapes nothing: write two")


def _common(multiples: list) -> int:
    """-> the least common multiple of the numbers among them, in units of the last decimal place of any."""
    numbers = [fractions.Fraction(str(value)) for value in multiples if type(value) in (int, float)]
    unit = math.lcm(*(number.denominator for number in numbers))
    return math.lcm(*(int(number * unit) for number in numbers))


def _depth(value) -> int:
    """-> levels of objects and arrays, level by level: a recursive function would die of what this is to find."""
    level, depth = [value], 0
    while level := [inner for inner in level if isinstance(inner, (dict, list, tuple))]:
        depth += 1
        level = [child for inner in level for child in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def _parts(schema) -> Iterator[dict]:
    """-> the schema, and all schemas inside it; `true`, `false` and what is none are left to the library."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        inner = [value] if key in ONE else []
        if key in LIST and isinstance(value, (list, tuple)):
            inner = value
        elif key in NAMED and isinstance(value, dict):
            inner = value.values()
        for part in inner:
            yield from _parts(part)
