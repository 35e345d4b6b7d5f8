"""Choosing the next token: on distributions that are known, and beside Hugging Face's processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gpt4v_jax import config
from gpt4v_jax.generate import sample

P = np.array([0.5, 0.05, 0.25, 0.15, 0.05])
LOGITS = jnp.log(jnp.array([P, P[::-1]])) + jnp.array([[3.0], [-2.0]])  # logits are free up to a constant


def rules(rows: int = 2, vocab: int = 5, **sampling):
    return sample.rules([sample.Sampling(**sampling)] * rows, vocab)


def distribution(**sampling):
    return np.asarray(jax.nn.softmax(sample.restrict(LOGITS, rules(**sampling)), axis=-1))


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_a_power(temperature):
    expected = P ** (1 / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=temperature), [expected, expected[::-1]], rtol=1e-5)


@pytest.mark.parametrize("k, kept", [(1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (5, range(5)), (99, range(5))])
def test_top_k(k, kept):
    expected = np.where(np.isin(np.arange(5), kept), P, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=1.0, top_k=k), [expected, expected[::-1]], rtol=1e-5)


@pytest.mark.parametrize("p, kept", [
    (0.01, [0]), (0.49, [0]), (0.51, [0, 2]), (0.74, [0, 2]), (0.76, [0, 2, 3]), (0.99, range(5)), (1.0, range(5)),
])  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    expected = np.where(np.isin(np.arange(5), kept), P, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(distribution(temperature=1.0, top_p=p), [expected, expected[::-1]], rtol=1e-5)


def test_order_is_temperature_then_k_then_p():
    """At temperature 0.5 the two best hold 0.8 and 0.2 of their mass: 0.75 of it is the first alone. At temperature 1,
    or without the cut to two, it would not be."""
    np.testing.assert_allclose(distribution(temperature=0.5, top_k=2, top_p=0.75)[0], [1, 0, 0, 0, 0])
    assert (distribution(temperature=1.0, top_k=2, top_p=0.75)[0] > 0).sum() == 2
    assert (distribution(temperature=0.5, top_p=0.75)[0] > 0).sum() == 2


LAWS = {
    "all": {}, "temperature": {"temperature": 0.7}, "hot": {"temperature": 1.8}, "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.2}, "typical_p": {"typical_p": 0.5},
    "all together": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_draws_follow_the_law(law):
    """20,000 draws of 40 tokens, those expected less than five times taken together: chi-square, and none outside."""
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2
    p = _expected(logits.astype(np.float64), **LAWS[law])
    of_row = sample.rules([sample.Sampling(**{"temperature": 1.0} | LAWS[law])], 40)
    tiled = {name: jnp.tile(x, 20_000) for name, x in of_row.items()}
    drawn = np.asarray(sample.draw(jnp.tile(logits, (20_000, 1)), keys(*range(20_000)), tiled))
    counts = np.bincount(drawn, minlength=40)
    assert not counts[p == 0].any()
    rare = (p > 0) & (20_000 * p < 5)
    pooled = [np.append(x[(p > 0) & ~rare], x[rare].sum()) for x in (counts, 20_000 * p)]
    counts, expected = (x[: None if rare.any() else -1] for x in pooled)
    assert len(counts) > 2 and scipy.stats.chisquare(counts, expected).pvalue > 1e-4


def _expected(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """By sorting, in float64."""
    def normal(x):
        x = np.exp(x - x.max())
        return x / x.sum()

    def cut(p, order, mass):
        """Keeps the first ones in this order until they have the mass."""
        before = np.cumsum(p[order]) - p[order]
        kept = np.zeros(len(p), bool)
        kept[order] = before < mass
        return np.where(kept, p, 0) / p[kept].sum()

    p = normal(logits / temperature)
    if top_k:
        p = np.where(p >= np.sort(p)[-top_k], p, 0) / np.sort(p)[-top_k:].sum()
    if top_p < 1:
        p = cut(p, np.argsort(-p), top_p)
    if min_p:
        p = np.where(p >= min_p * p.max(), p, 0)
        p /= p.sum()
    if typical_p < 1:
        p = cut(p, np.argsort(np.abs(-np.log(p) + (p * np.log(p)).sum())), typical_p)
    return p


def test_greedy_is_the_argmax_whatever_the_key():
    for seed in range(3):
        drawn = sample.draw(LOGITS, keys(seed, seed), rules())
        assert drawn.tolist() == [0, 4] and drawn.dtype == jnp.int32


def test_a_row_is_drawn_by_its_own_key_alone():
    flat = jnp.zeros((4, 1000))
    first = sample.draw(flat, keys(7, 8, 7, 9), rules(4, 1000, temperature=1.0)).tolist()
    assert first[0] == first[2] and len(set(first)) == 3
    assert sample.draw(flat[:2], keys(9, 7), rules(2, 1000, temperature=1.0)).tolist() == [first[3], first[0]]


MANY = [
    sample.Sampling(), sample.Sampling(1.5, top_k=3), sample.Sampling(0.5, top_p=0.6), sample.Sampling(2.0, min_p=0.1),
    sample.Sampling(repetition_penalty=1.7), sample.Sampling(presence_penalty=0.6, frequency_penalty=-0.3),
    sample.Sampling(no_repeat_ngram_size=1), sample.Sampling(no_repeat_ngram_size=3), sample.Sampling(min_new_tokens=9),
    sample.Sampling(bad_words_ids=((4,), (7, 2), (1, 6, 5))), sample.Sampling(logit_bias=((3, -100.0), (8, 2.5))),
    sample.Sampling(1.0, typical_p=0.4), sample.Sampling(1.0, epsilon_cutoff=0.1),
    sample.Sampling(1.0, eta_cutoff=0.2), sample.Sampling(bad_words_ids=((6,),), repetition_penalty=0.5),
]  # fmt: skip


def past(rng, rows: int, vocab: int = 12) -> sample.History:
    """Prompts of 1 to 9 tokens, answers of 7: what repeats does so often."""
    found = sample.history([rng.integers(vocab, size=n) for n in rng.integers(1, 10, size=rows)], 7)
    for _ in range(6):
        found = found.append(jnp.array(rng.integers(vocab, size=rows), jnp.int32))
    return found


def test_rows_with_other_rules_beside_them_are_as_alone():
    rng = np.random.default_rng(0)
    logits, before = jnp.array(rng.normal(size=(len(MANY), 12)) * 3, jnp.float32), past(rng, len(MANY))

    def chosen(samplings, logits, before):
        of_rows = sample.rules(samplings, 12)
        x = sample.processed(logits, before, of_rows, (0,))
        return np.asarray(x), np.asarray(sample.restrict(x, of_rows))

    together = chosen(MANY, logits, before)
    for i, sampling in enumerate(MANY):
        row = slice(i, i + 1)
        alone = chosen([sampling], logits[row], jax.tree.map(lambda x, row=row: x[row], before))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-6)
        if sampling == sample.Sampling():
            np.testing.assert_array_equal(alone[0], logits[row])
        else:
            assert (alone[1] != logits[row]).any(), sampling


def test_penalties_and_bias_of_openai():
    """Of what the answer has said, not of the prompt: the presence once, the frequency as often."""
    before = sample.history([[1, 1, 2]], 4)
    for token in (3, 4, 4):
        before = before.append(jnp.array([token]))
    laws = sample.Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((2, -3.0), (4, 1.0)))
    found = sample.processed(jnp.zeros((1, 6)), before, sample.rules([laws], 6))
    np.testing.assert_allclose(found, [[0, 0, -3, -0.75, 0, 0]])


def test_a_row_that_is_not_guided_keeps_its_logits():
    ours, other = jnp.arange(12.0).reshape(2, 6), jnp.ones((2, 6))
    np.testing.assert_array_equal(sample.guided(ours, other, jnp.array([1.0, 2.0]))[0], ours[0])


# ---- beside Hugging Face's

LIKE = {
    "temperature": ("TemperatureLogitsWarper", {"temperature": 0.6}, [0.6]),
    "top_k": ("TopKLogitsWarper", {"top_k": 4}, [4]),
    "top_p": ("TopPLogitsWarper", {"top_p": 0.7}, [0.7]),
    "min_p": ("MinPLogitsWarper", {"min_p": 0.15}, [0.15]),
    "typical_p": ("TypicalLogitsWarper", {"typical_p": 0.6}, [0.6]),
    "epsilon_cutoff": ("EpsilonLogitsWarper", {"epsilon_cutoff": 0.05}, [0.05]),
    "eta_cutoff": ("EtaLogitsWarper", {"eta_cutoff": 0.1}, [0.1]),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", {"repetition_penalty": 1.3}, [1.3]),
    "no_repeat_ngram_size 1": ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 1}, [1]),
    "no_repeat_ngram_size 2": ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 2}, [2]),
    "no_repeat_ngram_size 3": ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 3}, [3]),
    "bad_words_ids": ("NoBadWordsLogitsProcessor", {"bad_words_ids": ((4,), (7, 2), (1, 6, 5))},
                      [[[4], [7, 2], [1, 6, 5]]]),
    "min_new_tokens 6": ("MinNewTokensLengthLogitsProcessor", {"min_new_tokens": 6}, [9, 6, [0, 3]]),
    "min_new_tokens 7": ("MinNewTokensLengthLogitsProcessor", {"min_new_tokens": 7}, [9, 7, [0, 3]]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE)
def test_each_law_is_hugging_face_s(name):
    """Of 200 rows with 9 tokens of a prompt and 6 of an answer: the same logits, and -inf at the same tokens."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    kind, values, given = LIKE[name]
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(200, 12)) * 2).astype(np.float32)
    before = sample.history(list(rng.integers(12, size=(200, 9))), 6)
    for _ in range(6):
        before = before.append(jnp.array(rng.integers(12, size=200), jnp.int32))
    theirs = getattr(processors, kind)(*given)(torch.tensor(np.asarray(before.tokens)).long(), torch.tensor(logits))
    of_rows = rules(200, 12, **{"temperature": 1.0} | values)
    ours = np.asarray(sample.restrict(sample.processed(jnp.array(logits), before, of_rows, (0, 3)), of_rows))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs.numpy()))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert name == "min_new_tokens 6" or (ours != logits).any()


@pytest.mark.parametrize("name, value", [
    ("top_k", 1), ("top_p", 0.2), ("min_p", 0.7), ("typical_p", 0.1), ("epsilon_cutoff", 0.3), ("eta_cutoff", 0.5),
])  # fmt: skip
def test_cuts_leave_so_many_tokens_as_hugging_face_s(name, value):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = (np.random.default_rng(0).normal(size=(200, 12)) * 2).astype(np.float32)
    theirs = getattr(processors, LIKE[name][0])(value, min_tokens_to_keep=3)(None, torch.tensor(logits)).numpy()
    few = rules(200, 12, **{"temperature": 1.0, name: value})
    ours = np.asarray(sample.restrict(jnp.array(logits), few | {"min_tokens_to_keep": jnp.full(200, 3)}))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    kept = (sample.restrict(jnp.array(logits), few) > -np.inf).sum(axis=1)
    assert (np.isfinite(ours).sum(axis=1) >= 3).all() and kept.min() < 3


def test_guidance():
    """As Hugging Face's UnbatchedClassifierFreeGuidanceLogitsProcessor mixes them."""
    ours, other = np.random.default_rng(0).normal(size=(2, 3, 12))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (ours, other))
    scale = np.array([1.5, 0.0, 3.0])
    found = sample.guided(jnp.array(ours), jnp.array(other), jnp.array(scale))
    np.testing.assert_allclose(found, scale[:, None] * (a - b) + b, rtol=1e-5, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize("values, named", [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_p": float("nan")}, "top_p=nan"), ({"min_p": 2}, "min_p=2"), ({"typical_p": 0.0}, "typical_p=0.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"), ({"min_new_tokens": -1}, "min_new_tokens=-1"),
    ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 is greedy"), ({"bad_words_ids": ((),)}, "is empty"),
    ({"logit_bias": ((1, float("nan")),)}, "logit_bias of the token 1 is nan"),
    ({"temperature": 1e-37}, "temperature=1e-37 must be 0.0001 or more"),
])  # fmt: skip
def test_values_that_mean_nothing(values, named):
    with pytest.raises(config.InputError, match=named):
        sample.Sampling(**values)


@pytest.mark.parametrize("values", [{"logit_bias": ((12, 1.0),)}, {"bad_words_ids": ((3, -1),)}])
def test_tokens_that_are_not_there(values):
    name = next(iter(values))
    with pytest.raises(config.InputError, match=f"{name} names the token (12|-1): the vocabulary has 0 to 11"):
        rules(2, 12, **values)


def test_do_sample():
    assert sample.Sampling(do_sample=True).temperature == 1 and sample.Sampling(0.7, do_sample=False).temperature == 0
    assert sample.Sampling().temperature == 0 and rules() == {}
