"""What a round of speculative decoding is made of: the law of drawing, proposals, and a cache that takes them back."""

import dataclasses

import jax
import jax.numpy as jnp

from gpt4v_jax import config
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Proposes what followed the latest n-gram where it first stood in the text; the longest n that is found counts."""

    prompt_lookup_num_tokens: int = 10
    max_matching_ngram_size: int = 2

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise config.InputError(f"{name}={value} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Law:
    """Logits [N,V] and the rows' History -> probabilities [N,V] that are drawn from; greedy: all on the argmax; 0 of
    all tokens where none is allowed. The draft has the same law, else less is accepted; but it is not guided."""

    sampling: sample.Sampling = sample.Sampling()  # noqa: RUF009, frozen
    end: tuple[int, ...] = ()  # tokens that end an answer
    processors: tuple[decode.Processor, ...] = ()

    @property
    def parts(self) -> int:
        """-> 2 where the target model's rows are followed by those of the second prompts, else 1."""
        return 1 if self.sampling.guidance_scale == 1 else 2

    def guided(self, logits):
        """[parts*B,...,V] -> [B,...,V]."""
        if self.parts == 1:
            return logits
        ours, theirs = jnp.split(logits.reshape(-1, logits.shape[-1]), 2)
        found = sample.guided(ours, theirs, jnp.full(len(ours), self.sampling.guidance_scale))
        return found.reshape(-1, *logits.shape[1:])

    def __call__(self, logits, past: sample.History):
        rules = sample.rules([self.sampling], logits.shape[1])
        rules = {name: jnp.broadcast_to(x, (len(logits), *x.shape[1:])) for name, x in rules.items()}
        x = sample.processed(logits, past, rules, self.end)
        if self.processors:  # what lies behind may be proposals that were not taken
            there = jnp.arange(past.tokens.shape[1]) < past.length[:, None]
            past = past.replace(tokens=jnp.where(there, past.tokens, 0))
        for process in self.processors:
            x = process(past, x)
        if self.sampling.temperature:
            p = jax.nn.softmax(sample.restrict(x, rules), axis=-1)
        else:
            p = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[1])
        return jnp.where((x > -jnp.inf).any(axis=-1, keepdims=True), p, 0.0)

    def along(self, logits_BTV, past: sample.History, tokens_BK):
        """-> [B,T,V], T = K + 1: the probabilities before each of the tokens and behind the last, each with a history
        that has the tokens before it. past has room for K tokens more."""
        B, T, V = logits_BTV.shape
        tokens = attention.entered(past.tokens, tokens_BK, past.length)
        each = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), past.replace(tokens=tokens))
        each = each.replace(length=each.length + jnp.tile(jnp.arange(T), B))  # what lies behind is not read
        return self(logits_BTV.reshape(B * T, V), each).reshape(B, T, V)

    def draw(self, keys_B, p_BV):
        """-> [B] int32; -1 where all p are 0. p need not sum to 1."""
        token = jnp.argmax(p_BV, axis=-1)
        if self.sampling.temperature:
            token = jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BV))
        return jnp.where(p_BV.any(axis=-1), token, -1).astype(jnp.int32)


def look_up(text_BL, length_B, k: int, size: int):
    """-> (tokens [B,k] int32, how many of them were found [B] int32): those that follow the first of the longest
    n-grams, n <= size, that are equal to the last one."""
    at = jnp.arange(text_BL.shape[1])
    run, alike = jnp.zeros_like(text_BL), at < length_B[:, None] - 1  # how much of an n-gram ends at each token
    for j in range(size):
        last = jnp.take_along_axis(text_BL, jnp.maximum(length_B - 1 - j, 0)[:, None], axis=1)
        alike &= (jnp.roll(text_BL, j, axis=1) == last) & (at >= j)
        run += alike
    start = jnp.argmax(run, axis=1) + 1
    count = jnp.where(run.any(axis=1), jnp.minimum(k, length_B - start), 0)
    where = jnp.minimum(start[:, None] + jnp.arange(k), text_BL.shape[1] - 1)
    return jnp.take_along_axis(text_BL, where, axis=1), count


def propose(draft: GPT4V, params, past: sample.History, cache: attention.Cache, keys, k: int, law: Law):
    """-> (the next tokens [B,k] int32, the probabilities that they were drawn from [B,k,V], the cache with all of
    them and the text's last token, which it does not have before). past has room for k + 1 tokens more."""

    def one(carry, j):
        past, cache = carry
        logits, cache = decode.extend(draft, params, past.back(1)[:, None], cache)
        q = law(logits[:, 0], past)
        token = jnp.maximum(law.draw(fold(keys, j), q), 0)  # where none is allowed the target's law says so, too
        return (past.append(token), cache), (token, q)

    # One step more than tokens: the last one, too, is entered, so that the cache is as the target model's.
    (_, cache), (tokens, q) = jax.lax.scan(one, (past, cache), jnp.arange(k + 1))
    return tokens[:k].T, q[:k].swapaxes(0, 1), cache


def kept(before: attention.Cache, after: attention.Cache, taken_B, T: int) -> attention.Cache:
    """-> `after`, which has T tokens a row more than `before`, with only the first `taken` [B] of them.

    Each row's are moved behind what it has, over its padding: so rows that accept less leave no holes, and the cursor
    is where the longest row ends. What is left behind a row's end has document 0.
    """
    places = jnp.arange(before.document.shape[1])
    used = jnp.max(jnp.where(before.document > 0, places + 1, 0), axis=1)

    def move(x):
        new = jax.lax.dynamic_slice_in_dim(x, before.cursor, T, axis=attention.slots(x))
        return attention.entered(x, new, used)

    end = used + taken_B
    return after.replace(
        k=tuple(map(move, after.k)),
        v=tuple(map(move, after.v)),
        document=jnp.where(places < end[:, None], move(after.document), 0),
        step=move(after.step),
        index=move(after.index),
        cursor=jnp.max(end),
        next_position=before.next_position + taken_B[:, None],
        last_step=before.last_step + taken_B,
        last_index=before.last_index + taken_B,
    )


def fold(keys_B, number):
    """number: [B], or one for all rows."""
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(number) else None))(keys_B, number)
