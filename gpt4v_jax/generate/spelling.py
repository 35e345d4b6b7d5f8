"""The exact bytes that each token of a tokenizer writes, and llguidance's trie of them."""

import dataclasses
import functools
import json
import re
import string
import weakref
from collections.abc import Callable

import numpy as np
from tokenizers import pre_tokenizers

from gpt4v_jax import config
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.generate import grammar

PIECES = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}  # decoders of sentencepiece's tokens, and of char


@dataclasses.dataclass(frozen=True)
class Spelling:
    trie: object  # llguidance.LLTokenizer
    ends: np.ndarray  # [V] bool
    alphabet: str | None  # the characters that can be written one by one, as a class of a regular expression; None: all
    missing: str  # those of printable ASCII that cannot
    first: np.ndarray | None  # [V] bool, what may come first where the decoder drops a text's first blank; else None


def of(tokenizer: Tokenizer) -> Spelling:
    """Made once for each tokenizer, and dropped with it. Raises InputError as `token_bytes` does."""
    if tokenizer not in _known:
        _known[tokenizer] = _made(tokenizer)
    return _known[tokenizer]


_known: weakref.WeakKeyDictionary[Tokenizer, Spelling] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """-> what each token adds to a text, b"" for special tokens and unused ids.

    Raises InputError for a tokenizer whose decoder sets blanks by rules, as WordPiece's does: its tokens have no bytes
    of their own.
    """
    write, _ = _decoder(tokenizer)
    words = set(tokenizer.words().tolist())
    return [write(tokenizer.token(id) or "") if id in words else b"" for id in range(tokenizer.vocab)]


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """What llguidance reads of a tokenizer. It would ask this to tokenize what a grammar forces; ours force nothing."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int | None  # None: an id behind the last one
    bos_token_id: None = None
    is_tokenizer_wrapper: bool = True


def _made(tokenizer: Tokenizer) -> Spelling:
    try:
        import llguidance
    except ImportError as error:
        raise config.InputError("constrained output needs llguidance: pip install 'gpt4v_jax[serve]'") from error
    written = token_bytes(tokenizer)
    ends = list(tokenizer.ends)
    wrapper = _Wrapper(written, [id for id, text in enumerate(written) if not text], ends[0] if ends else None)
    trie = llguidance.LLTokenizer(wrapper, eos_token=ends or None)

    there = set(written)
    singles = {text.decode() for text in there if text and _is_character(text)}
    missing = [char for char in map(chr, range(128)) if char not in singles]
    if {bytes([b]) for b in range(0x80, 0xF5) if b not in (0xC0, 0xC1)} <= there:  # all bytes that UTF-8 has
        alphabet = f"[^{''.join(map(grammar.literal, missing))}]" if missing else None
    else:
        alphabet = f"[{''.join(map(grammar.literal, sorted(singles)))}]"
    first = None
    if _decoder(tokenizer)[1]:  # Metaspace drops all blanks of the first token, not one: so it may have one
        first = np.array([text.count(b" ") <= text.startswith(b" ") for text in written])
    printable = "".join(char for char in missing if char in string.printable[:95])
    return Spelling(trie, np.isin(np.arange(len(written)), ends), alphabet, printable, first)


def _is_character(text: bytes) -> bool:
    try:
        return len(text.decode()) == 1
    except UnicodeDecodeError:
        return False


def _decoder(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """-> (a token's text -> its bytes, whether a blank at the begin of a text is dropped)."""
    decoder = tokenizer.inner.decoder
    parts = [json.loads(decoder.__getstate__())] if decoder else []
    while any(part["type"] == "Sequence" for part in parts):
        parts = [inner for part in parts for inner in part.get("decoders", [part])]
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        return _byte_level, False
    blanks = {part["replacement"] for part in parts if part["type"] == "Metaspace"}
    blanks |= {part["pattern"].get("String") for part in parts if part["type"] == "Replace" and part["content"] == " "}
    replaces = sum(part["type"] in ("Replace", "Metaspace") for part in parts)
    if not kinds or kinds - PIECES or replaces != len(blanks) or None in blanks or any(p.get("stop") for p in parts):
        raise config.InputError(
            "constrained output needs tokens with bytes of their own, and the decoder of this tokenizer, "
            f"{'+'.join(sorted(kinds)) or 'none'}, sets blanks by rules: use one of bytes, characters or sentencepiece"
        )
    strips = any(part.get("prepend_scheme", "never") != "never" or part.get("start") for part in parts)
    return functools.partial(_piece, blanks=blanks, fallback="ByteFallback" in kinds), strips


def _piece(token: str, blanks: set[str], fallback: bool) -> bytes:
    if fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    for blank in blanks:
        token = token.replace(blank, " ")
    return token.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a visible byte is itself, the others are the characters from 256 on."""
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    hidden = [b for b in range(256) if chr(b) not in chars]
    return dict(zip(chars, [*map(ord, chars[: 256 - len(hidden)]), *hidden], strict=True))


def _byte_level(token: str) -> bytes:
    found = [_byte_alphabet().get(char) for char in token]
    return token.encode() if None in found else bytes(found)  # an added token is written as it is
