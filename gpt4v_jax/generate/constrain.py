"""Output held to a regular expression, a list of choices or a JSON schema: which tokens may come next.

By llguidance (https://github.com/guidance-ai/llguidance, the extra "serve"): regular expressions are automata, so none
of them backtracks, and JSON is an Earley parser over them. A mask holds just the tokens after which the output can
still be completed: nothing is forced, so a draw follows the model's own probabilities, renormalised over the mask.
"""

import copy
import json
import re
from collections.abc import Sequence

import numpy as np

from gpt4v_jax import config
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.generate import grammar as grammar_lib
from gpt4v_jax.generate import spelling
from gpt4v_jax.generate.grammar import Grammar, choices, json_object, json_schema, regex

__all__ = ["Grammar", "Matcher", "choices", "json_object", "json_schema", "masks", "regex"]

# A blank, or a line's end and indentation. With any amount of white space a small model may write nothing else.
WHITE = r"\x20|\n\x20{0,20}"
STATES = 20_000  # of an automaton, 1 to 2 kB each
NO_FORCING = '%llguidance {"no_forcing": true}\n'  # else x{1000000} would be spelt out before the first token


class Matcher:
    """One request's place in its grammar."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, continues: bool = False):
        """continues: the output goes on from a plain prompt, so that its first blank is kept by every decoder.

        Raises InputError for what is no grammar, for one that no output of this tokenizer matches, and for a tokenizer
        such as WordPiece (`spelling.token_bytes`).
        """
        self.grammar, self.spelling = grammar, spelling.of(tokenizer)
        import llguidance  # behind the message of spelling.of

        self._first = None if continues else self.spelling.first
        self._inner = llguidance.LLMatcher(
            self.spelling.trie, _lark(grammar, self.spelling, drops=self._first is not None), log_level=0,
            limits=llguidance.LLParserLimits(max_lexer_states=STATES, verbose_errors=False),
        )  # fmt: skip
        if self._inner.is_error():
            raise config.InputError(f"{grammar.shown} cannot be used: {_reason(self._inner.get_error())}")
        self._ended = False
        self._mask = self._compute()

    def allowed(self) -> np.ndarray:
        """-> [V] bool, the tokens that may come next; V of the tokenizer; read-only. Ends are among them once the
        output is complete. Without end tokens none is left where nothing more can come.

        Raises InputError where no token of the vocabulary writes what must come, and where a mask takes too long.
        """
        if self._mask is None:
            self._mask = self._compute()
        return self._mask

    def _compute(self) -> np.ndarray:
        ends = self.spelling.ends
        if self._ended:
            return ends
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=len(ends), bitorder="little").astype(bool)
        if self._first is not None:
            mask &= self._first | ends
        error = self._inner.get_error()
        if error or not (mask.any() or self._inner.is_accepting()):
            nothing = not error or "NoExtension" in error
            reason = "no text that this tokenizer writes matches it" if nothing else _reason(error)
            raise config.InputError(f"{self.grammar.shown}: {reason}")
        mask.flags.writeable = False
        return mask

    def advance(self, token: int) -> None:
        """`token` comes next. Raises ValueError for one that is not allowed, and has then changed nothing."""
        if not 0 <= token < len(self.spelling.ends) or not self.allowed()[token]:
            raise ValueError(f"token {token} is not allowed here by {self.grammar.shown}")
        if self.spelling.ends[token]:
            self._ended = True
        elif not self._inner.consume_token(int(token)):
            raise config.InputError(f"{self.grammar.shown}: {_reason(self._inner.get_error())}")
        self._mask = self._first = None

    @property
    def finished(self) -> bool:
        """The output is complete, and nothing but an end may follow."""
        return not (self.allowed() & ~self.spelling.ends).any()

    def copy(self) -> "Matcher":
        """-> one that goes on from here by itself: for several answers to one prompt, or beams."""
        other = copy.copy(self)
        other._inner = self._inner.deep_copy()
        return other


def masks(matchers: Sequence[Matcher | None], vocab: int) -> np.ndarray:
    """-> [B,V] bool, the tokens that each row may draw. V = vocab, the model's, which may exceed its tokenizer's.

    A row without a matcher may draw all. So may one that is finished without an end token, for a softmax over nothing
    is NaN: look at `finished` before its draw is used.
    """
    found = np.ones((len(matchers), vocab), bool)
    for row, matcher in zip(found, matchers, strict=True):
        if matcher is not None and matcher.allowed().any():
            row[: len(matcher.allowed())] = matcher.allowed()
            row[len(matcher.allowed()) :] = False
    return found


def _lark(grammar: Grammar, spelt: spelling.Spelling, drops: bool) -> str:
    """-> the grammar in llguidance's dialect of Lark. drops: the decoder drops one blank at the output's begin."""
    from llguidance import regex_to_lark

    if grammar.kind == "schema":
        if spelt.missing:
            raise config.InputError(f"{grammar.shown}: this tokenizer cannot write {spelt.missing!r}, which JSON needs")
        schema = json.dumps({"x-guidance": {"whitespace_pattern": WHITE}} | json.loads(grammar.text))
        return NO_FORCING + ('start: " "? json' if drops else "start: json") + f"\njson: %json {schema}"
    whole = "(GIVEN & ~/(?s: .*)/) | (/ / GIVEN)" if drops else "GIVEN"
    # Intersected with what can be written, so that no token leads to where no other goes on.
    within = f" & /{spelt.alphabet}*/" if spelt.alphabet else ""
    return f"{NO_FORCING}start: WHOLE\nWHOLE: ({whole}){within}\nGIVEN: /{regex_to_lark(grammar.text, 'dws')}/"


def _reason(error: str) -> str:
    """-> what the library's message says, without its quotation of the grammar."""
    text = re.split(r"\n<|\n *\d+ \| ", error)[0]
    found = re.search(r"error: (.+)", text)
    text = found[1] if found else re.sub(r'^at \d+\(\d+\): |(?s:invalid regex ".*" \(in \w+\): )', "", text)
    return grammar_lib.SHORT.repr(" ".join(text.split()))[1:-1] if len(text) > 200 else " ".join(text.split())
