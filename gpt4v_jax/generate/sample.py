"""Logits -> the next token, by the names and with the meaning of Hugging Face's `generate`.

    processed   what a row has said so far changes its logits: bias, penalties, what is forbidden
    restrict    what is left of a distribution: temperature, top-k, top-p, min-p, typical, epsilon and eta cut-off
    draw        the token

All of them take the rules of each row, so that requests with different ones share a batch and one compiled program.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt4v_jax import config


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. What is not set changes nothing; greedy is the default."""

    temperature: float | None = None  # logits are divided by it; 0: greedy. Not set: 1 with do_sample=True, else 0
    top_k: int = 0  # keep only the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens until their mass reaches p (Holtzman et al. 2020)
    min_p: float = 0.0  # keep what is at least so many times as probable as the best token (Nguyen et al. 2024)
    typical_p: float = 1.0  # keep what is nearest to the entropy, until its mass reaches p (Meister et al. 2023)
    epsilon_cutoff: float = 0.0  # keep what is at least so probable (Hewitt et al. 2022)
    eta_cutoff: float = 0.0  # keep what has min(eta, sqrt(eta) exp(-entropy)) at least (Hewitt et al. 2022)
    do_sample: bool | None = None  # False: greedy, whatever else is set
    repetition_penalty: float = 1.0  # of tokens in prompt or answer: a positive logit is divided by it, a negative
    # one multiplied (Keskar et al. 2019)
    presence_penalty: float = 0.0  # OpenAI's: taken from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # OpenAI's: as often as the answer has them
    no_repeat_ngram_size: int = 0  # no n tokens stand twice in prompt and answer (Paulus et al. 2018)
    min_new_tokens: int = 0  # the answer does not end before
    guidance_scale: float = 1.0  # log p + (scale - 1) (log p - log p of a second prompt) (Ho & Salimans 2021)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that do not come about
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)

    def __post_init__(self):
        if self.temperature is None:
            object.__setattr__(self, "temperature", 1.0 if self.do_sample else 0.0)
        for name, least, most in BOUNDS:
            value = getattr(self, name)
            if not least <= value <= most:  # also NaN
                bounds = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
                raise config.InputError(f"{name}={value} must be {bounds}{MEANING.get(name, '')}")
        for name in ("top_p", "typical_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise config.InputError(f"{name}={getattr(self, name)} leaves nothing to draw: it must be above 0")
        if self.do_sample and not self.temperature:
            raise config.InputError("temperature=0.0 is greedy: with do_sample=True it must be above 0")
        if self.do_sample is False:
            object.__setattr__(self, "temperature", 0.0)
        if 0 < self.temperature < COLDEST:
            raise config.InputError(f"temperature={self.temperature} must be {COLDEST} or more, or 0, which is greedy")
        for token, value in self.logit_bias:
            if not abs(value) <= MOST:  # also NaN
                raise config.InputError(f"logit_bias of the token {token} is {value}: at most {MOST:g} either way")
        if not all(self.bad_words_ids):
            raise config.InputError("one of bad_words_ids is empty: leave it out")


COLDEST = 1e-4  # below it logits divided by the temperature leave float32
MOST = 1e4  # of temperatures, penalties and scales: beyond it float32 says nothing more
BOUNDS = (
    ("temperature", 0, MOST), ("top_k", 0, math.inf), ("top_p", 0, 1), ("min_p", 0, 1), ("typical_p", 0, 1),
    ("epsilon_cutoff", 0, 1), ("eta_cutoff", 0, 1), ("repetition_penalty", 0, MOST), ("presence_penalty", -MOST, MOST),
    ("frequency_penalty", -MOST, MOST), ("no_repeat_ngram_size", 0, math.inf), ("min_new_tokens", 0, math.inf),
    ("guidance_scale", -MOST, MOST),
)  # fmt: skip
MEANING = {"temperature": "; 0 is greedy", "top_k": "; 0 is all tokens", "no_repeat_ngram_size": "; 0 is no such law"}
NUMBERS = tuple(name for name, *_ in BOUNDS)
CUTS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
WHOLE = ("top_k", "no_repeat_ngram_size", "min_new_tokens")
OFF = {field.name: field.default for field in dataclasses.fields(Sampling)} | {"temperature": 0.0}


@flax.struct.dataclass
class History:
    """What the rows have read and said, as tokens."""

    tokens: jax.Array  # [B,L] int32: prompt, then answer
    length: jax.Array  # [B] int32: of both
    prompt: jax.Array  # [B] int32: of the prompt

    def back(self, n: int):
        """-> [B] int32: the n-th last token; -1 where there is none."""
        at = self.length - n
        return jnp.where(at >= 0, jnp.take_along_axis(self.tokens, jnp.maximum(at, 0)[:, None], axis=1)[:, 0], -1)

    def append(self, token_B):
        rows = jnp.arange(len(self.length))
        return self.replace(tokens=self.tokens.at[rows, self.length].set(token_B), length=self.length + 1)


def history(prompts: Sequence[Sequence[int]], room: int) -> History:
    """Of prompts, with room for so many tokens more."""
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), length.max(initial=0) + room), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return History(jnp.array(tokens), jnp.array(length), jnp.array(length))


Rules = dict[str, jax.Array]  # of all rows, by Sampling's names; what no row has set is not there


def rules(samplings: Sequence[Sampling], vocab: int) -> Rules:
    """Of rows [B]: numbers are [B], int32 or float32, logit_bias is [B,V], bad_words_ids [B,W,n], right-aligned after
    -1. Raises InputError for tokens that the vocabulary does not have."""
    B = len(samplings)
    found = {}
    for name in NUMBERS:
        values = [getattr(s, name) for s in samplings]
        if any(value != OFF[name] for value in values):
            as_whole = np.minimum(values, 2**30).astype(np.int32)
            found[name] = as_whole if name in WHOLE else np.array(values, np.float32)
    if any(s.logit_bias for s in samplings):
        found["logit_bias"] = np.zeros((B, vocab), np.float32)
        for row, s in zip(found["logit_bias"], samplings, strict=True):
            for token, value in s.logit_bias:
                row[_known("logit_bias", token, vocab)] += value
    words = [[w for w in s.bad_words_ids if [_known("bad_words_ids", t, vocab) for t in w]] for s in samplings]
    if any(words):
        longest = max(len(word) for row in words for word in row)
        found["bad_words_ids"] = np.full((B, max(map(len, words)), longest), -1, np.int32)
        for row, of_row in zip(found["bad_words_ids"], words, strict=True):
            for place, word in zip(row, of_row, strict=False):
                place[longest - len(word) :] = word
    return {name: jnp.asarray(value) for name, value in found.items()}


def _known(name: str, token: int, vocab: int) -> int:
    if not 0 <= token < vocab:
        raise config.InputError(f"{name} names the token {token}: the vocabulary has 0 to {vocab - 1}")
    return token


def processed(logits_BV, past: History, rules: Rules, end: tuple[int, ...] = ()):
    """-> the logits [B,V] with bias and penalties, -inf where a token is forbidden. end: tokens that end an answer."""
    V, places = logits_BV.shape[1], jnp.arange(past.tokens.shape[1])
    rows = jnp.arange(len(logits_BV))[:, None]

    def counts(since):
        """-> [B,V] float32: how often each token stands from `since` [B] on."""
        there = (places >= since[:, None]) & (places < past.length[:, None])
        return jnp.zeros(logits_BV.shape).at[rows, past.tokens].add(there)

    def forbid(logits, tokens_BN, forbidden_BN):
        return jnp.where(jnp.zeros(logits.shape, bool).at[rows, tokens_BN].max(forbidden_BN), -jnp.inf, logits)

    if "logit_bias" in rules:
        logits_BV += rules["logit_bias"]
    if "repetition_penalty" in rules:
        factor = jnp.where(counts(0 * past.prompt) > 0, rules["repetition_penalty"][:, None], 1.0)
        logits_BV = jnp.where(logits_BV < 0, logits_BV * factor, logits_BV / factor)
    if "presence_penalty" in rules or "frequency_penalty" in rules:
        said, none = counts(past.prompt), jnp.zeros(len(logits_BV))
        logits_BV -= rules.get("presence_penalty", none)[:, None] * (said > 0)
        logits_BV -= rules.get("frequency_penalty", none)[:, None] * said
    if "no_repeat_ngram_size" in rules:
        size = rules["no_repeat_ngram_size"][:, None]

        def agree(n, again):
            same = (jnp.roll(past.tokens, n, axis=1) == past.back(n)[:, None]) & (places >= n)
            return again & (same | (n >= size))

        # A place's token is forbidden where the size - 1 tokens before it are those that stand at the end.
        again = (size > 0) & (places < past.length[:, None])
        again = jax.lax.fori_loop(1, jnp.minimum(size.max(), len(places) + 1), agree, again)
        logits_BV = forbid(logits_BV, past.tokens, again)
    if "bad_words_ids" in rules:
        words = rules["bad_words_ids"]
        last = words[..., -1]
        about = last >= 0
        for n in range(1, words.shape[2]):
            about &= (words[..., -1 - n] < 0) | (words[..., -1 - n] == past.back(n)[:, None])
        logits_BV = forbid(logits_BV, jnp.maximum(last, 0), about)
    if "min_new_tokens" in rules and end:
        early = past.length - past.prompt < rules["min_new_tokens"]
        logits_BV = jnp.where(early[:, None] & jnp.isin(jnp.arange(V), jnp.array(end)), -jnp.inf, logits_BV)
    return logits_BV


def restrict(logits_BV, rules: Rules):
    """-> the logits that are drawn from: divided by the temperature, -inf where a token may not be drawn.

    Among the rules may be min_tokens_to_keep [B]: so many tokens no cut takes, as Hugging Face's beams have it."""

    def of(name):
        return rules[name][:, None]

    def cut(x, kept, key=None):
        """key [B,V]: highest for what is cut last; x where there is none."""
        if "min_tokens_to_keep" in rules:
            kept |= _highest(x if key is None else key, jnp.ones_like(x), of("min_tokens_to_keep"))
        return jnp.where(kept, x, -jnp.inf)

    def surprise(x):
        """-> (probabilities, their negative logarithms, the entropy [B,1])."""
        p, nats = jax.nn.softmax(x, axis=-1), -jax.nn.log_softmax(x, axis=-1)
        return p, nats, jnp.sum(jnp.where(p > 0, p * nats, 0.0), axis=-1, keepdims=True)

    def best(x):
        return x == x.max(axis=-1, keepdims=True)

    x = logits_BV
    if "temperature" in rules:
        x = x / jnp.where(of("temperature") > 0, of("temperature"), 1.0)
    if "top_k" in rules:
        x = cut(x, _highest(x, jnp.ones_like(x), of("top_k")) | (of("top_k") == 0))
    if "top_p" in rules:
        x = cut(x, _highest(x, jax.nn.softmax(x, axis=-1), of("top_p")) | (of("top_p") == 1))
    if "min_p" in rules:
        x = cut(x, x >= x.max(axis=-1, keepdims=True) + jnp.log(of("min_p")))
    if "typical_p" in rules:
        p, nats, entropy = surprise(x)
        typical = -jnp.abs(nats - entropy)
        x = cut(x, _highest(typical, p, of("typical_p")) | (of("typical_p") == 1), typical)
    if "epsilon_cutoff" in rules:
        x = cut(x, (jax.nn.softmax(x, axis=-1) >= of("epsilon_cutoff")) | best(x))
    if "eta_cutoff" in rules:
        p, _, entropy = surprise(x)
        eta = of("eta_cutoff")
        x = cut(x, (p >= jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-entropy))) | best(x))
    return x


def _highest(key_BV, mass_BV, enough_B1):
    """-> [B,V] bool: the highest keys until their mass reaches `enough`; equal keys stay or go together.

    The least key that stays is found bit by bit: a sort of the vocabulary takes many times as long on a CPU.
    """
    key = key_BV.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(key == 0, 0.0, key), jnp.uint32)  # -0.0 is 0.0
    order = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))  # unsigned, and rising as the keys do

    def one(i, least):
        higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= higher, mass_BV, 0.0), axis=-1, keepdims=True) >= enough_B1
        return jnp.where(reached, higher, least)

    return order >= jax.lax.fori_loop(0, 32, one, jnp.zeros((len(key_BV), 1), jnp.uint32))


def guided(logits_BV, other_BV, scale_B):
    """Classifier-free guidance (Ho & Salimans 2021, eq. 6, on log-probabilities): [B,V] of the prompt and of the second
    one -> [B,V]."""
    ours, theirs = (jax.nn.log_softmax(x, axis=-1) for x in (logits_BV, other_BV))
    scale = scale_B[:, None]
    return jnp.where(scale == 1, logits_BV, theirs + scale * (ours - theirs))  # a row without it keeps its logits


def draw(logits_BV, keys_B, rules: Rules):
    """-> token ids [B] int32; every row has its own key, so that a row's draw does not depend on its neighbours."""
    best = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if "temperature" not in rules:
        return best
    drawn = jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, rules)).astype(jnp.int32)
    return jnp.where(rules["temperature"] > 0, drawn, best)


def restricted(logits_BV, rules: Rules):
    """`restrict` of the rows that draw; a greedy row keeps its logits."""
    if "temperature" not in rules:
        return logits_BV
    return jnp.where(rules["temperature"][:, None] > 0, restrict(logits_BV, rules), logits_BV)
