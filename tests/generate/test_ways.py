"""Beams and speculation with what else `generate` takes: guidance, logits processors, grammars."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.generate import beam, constrain, decode, sample, speculative
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.generate.draft import Lookup
from tests import tiny
from tests.generate.test_decode import LETTERS, ask, both, make  # noqa: F401
from tests.generate.test_speculative import noisy

GUIDED = sample.Sampling(guidance_scale=2.0)


def no_neighbours(past, logits):
    """A processor: a token and the one before it are no neighbours in the vocabulary."""
    near = jnp.abs(jnp.arange(logits.shape[1]) - past.back(1)[:, None]) <= 2
    return jnp.where(near, -jnp.inf, logits)


def few(past, logits):
    """A processor: five tokens are left."""
    return jnp.where(jnp.isin(jnp.arange(logits.shape[1]), jnp.array(FIVE)), logits, -jnp.inf)


FIVE, END = (7, 11, 13, 20, 30), 13


# ---- beams


def answers(prompts, negative=(), **more):
    return dict(prompts=prompts, **({"sampling": GUIDED, "negative": negative} if negative else {}), **more)


@pytest.mark.parametrize("name", tiny.fusions("cross_attention"))
def test_one_beam_says_what_decode_does(name):
    """Prompts of other lengths than the second ones, with and without pictures."""
    trained = make(context=48, **tiny.FUSIONS[name])
    read = tiny.reader(trained.layout)
    asked = answers([ask(trained, "abc", [0]), ask(trained, "de")], [ask(trained, "abc"), ask(trained, "xyxuv", [3])])
    expected = decode.generate(trained, read=read, max_new_tokens=10, logits_processor=[no_neighbours], **asked)
    found = beam.generate(trained, read=read, max_new_tokens=10, num_beams=1, logits_processor=[no_neighbours], **asked)
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    free = decode.generate(trained, read=read, max_new_tokens=10, **asked)
    assert [a.tokens for a in free] != [a.tokens for a in expected]


@pytest.mark.parametrize("guided", [True, False])
def test_enough_beams_find_every_guided_answer(guided):
    """Their scores are the sums of what one step after each beginning says, without a cache of beams."""
    trained = make(context=48, end=END, tied=False)
    prompt, second = [8, 9, 21], [25, 9]
    others = [t for t in FIVE if t != END]
    whole = [(*a, b) for a in itertools.product(others, repeat=2) for b in FIVE]
    every = [(END,), *((t, END) for t in others), *whole]

    def plain(ids):
        return [prompts_lib.plain(ids)]

    def step(said):
        asked = answers(plain(prompt + said), plain(second + said) if guided else ())
        scores = decode.generate(trained, max_new_tokens=1, output_scores=True, **asked)[0].scores[0]
        return scores if guided else scores - np.logaddexp.reduce(scores)

    known = {said: step(list(said)) for n in range(3) for said in itertools.product(others, repeat=n)}
    sums = np.array([sum(known[a[:i]][a[i]] for i in range(len(a))) for a in every])
    scores = sums / np.array([len(a) for a in every])
    best = np.argsort(-scores)
    asked = answers(plain(prompt), plain(second) if guided else ())
    found = beam.generate(trained, max_new_tokens=3, num_beams=85, num_return_sequences=85, early_stopping="never",
                          logits_processor=[few], **asked)  # fmt: skip
    said = [tuple(t for t in every[i] if t != END) for i in best]
    assert len(every) == 85 and [a.tokens for a in found] == said
    np.testing.assert_allclose([a.sequences_score for a in found], scores[best], atol=1e-4)


@pytest.mark.parametrize("way", ["processor", "guidance"])
def test_beams_are_hugging_face_s(both, way):  # noqa: F811
    """Their own guidance leaves the second prompt's cache where its beams were: here it is a full forward each time."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    trained, model = both

    class NoNeighbours(LogitsProcessor):
        def __call__(self, input_ids, scores):
            near = (torch.arange(scores.shape[1]) - input_ids[:, -1:]).abs() <= 2
            return scores.masked_fill(near, -torch.inf)

    class Guidance(LogitsProcessor):
        def __call__(self, input_ids, scores):
            theirs = model(input_ids[:, 5:]).logits[:, -1].log_softmax(-1)
            return theirs + 2 * (scores - theirs)

    prompts = [np.random.default_rng(seed).integers(6, 32, size=6) for seed in range(4)]
    asked, second = ([prompts_lib.plain(p) for p in of] for of in (prompts, [p[5:] for p in prompts]))
    more = answers(asked, second) if way == "guidance" else answers(asked, logits_processor=[no_neighbours])
    ours = beam.generate(trained, max_new_tokens=12, num_beams=3, num_return_sequences=2, **more)
    there = model.generate(
        torch.tensor(np.array(prompts)), max_new_tokens=12, do_sample=False, pad_token_id=0, num_beams=3,
        num_return_sequences=2, return_dict_in_generate=True, output_scores=True,
        logits_processor=LogitsProcessorList([Guidance() if way == "guidance" else NoNeighbours()]),
    )  # fmt: skip
    expected = [row[6:].tolist() for row in there.sequences]
    assert [list(a.tokens) for a in ours] == [row[: row.index(5)] if 5 in row else row for row in expected]
    np.testing.assert_allclose([a.sequences_score for a in ours], there.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
    free = beam.generate(trained, asked, None, 12, 3, num_return_sequences=2)
    assert [a.tokens for a in free] != [a.tokens for a in ours]


@pytest.fixture(scope="module", params=["x", None], ids=["end token", "none"])
def spelling(request):
    """-> a model that writes letters, with and without an end token."""
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    ends = (request.param,) if request.param else ()
    return dataclasses.replace(make(context=64, size=0), tokenizer=tokenizer_lib.Tokenizer(letters, ends))


def test_beams_find_every_choice(spelling):
    """... of each prompt, best first, by the sums of what the model says of its tokens."""
    words = ["abc", "cab", "dad", "bee", "a"] if spelling.tokenizer.ends else ["abc", "cab", "dad", "bee"]
    asked = [prompts_lib.prompt(spelling, text) for text in ("ab", "stu v")]
    found = beam.generate(spelling, asked, None, 12, 6, num_return_sequences=6, grammar=constrain.choices(words))

    def sums(prompt, word):
        told = decode.generate(spelling, [prompt], None, 12, grammar=constrain.choices([word]), logprobs=0)[0]
        return sum(told.logprobs) / len(told.tokens)

    for i, prompt in enumerate(asked):
        mine = found[6 * i : 6 * i + 6]
        by_word = {word: sums(prompt, word) for word in words}
        answered = [a for a in mine if a.finish == "stop"]
        # "a" may go on to "abc": only the end token says that it does not, and its probability counts.
        scores = {a.text: a.sequences_score for a in answered}
        assert set(scores) == set(words) and [a.finish for a in mine[len(words) :]] == ["forbidden"] * (6 - len(words))
        for word in set(words) - {"a"}:
            np.testing.assert_allclose(scores[word], by_word[word], atol=1e-4)
        assert [a.sequences_score for a in answered] == sorted(scores.values(), reverse=True)


def test_one_beam_in_a_grammar_is_greedy_in_it(spelling):
    """One row ends long before the other; a stop string may cut it."""
    asked = [prompts_lib.prompt(spelling, text) for text in ("ab", "stu v", "w")]
    for grammar, stop in ((constrain.regex("[a-d]{3,20}"), ()), (constrain.choices(["ab", "dadadada"]), ()),
                          (constrain.regex("[a-d]{9}"), ("ab", "da", "c"))):  # fmt: skip
        expected = decode.generate(spelling, asked, None, 8, grammar=grammar, stop_strings=stop)
        found = beam.generate(spelling, asked, None, 8, 1, grammar=grammar, stop_strings=stop)
        assert [(a.text, a.finish) for a in found] == [(a.text, a.finish) for a in expected]


def test_drawn_beams_keep_to_a_grammar(spelling):
    asked = [prompts_lib.prompt(spelling, "ab")] * 6
    found = beam.generate(spelling, asked, None, 8, 3, sample.Sampling(2.0, top_k=4), range(6),
                          num_return_sequences=3, grammar=constrain.choices(["abc", "cab", "dad", "bee"]))  # fmt: skip
    texts = {a.text for a in found if a.finish == "stop"}
    assert texts <= {"abc", "cab", "dad", "bee"} and len(texts) > 2


def test_a_beam_that_cannot_go_on_takes_no_other_along(monkeypatch):
    """One in a dead end, where no token writes what must come: the others say what there is."""
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    trained = dataclasses.replace(make(context=64, size=0), tokenizer=tokenizer_lib.Tokenizer(letters, ("x",)))
    asked = [prompts_lib.prompt(trained, "ab")]
    real = constrain.Matcher.advance

    def advance(matcher, token):
        real(matcher, token)
        matcher.text = (*getattr(matcher, "text", ()), token)
        if trained.tokenizer.decode(matcher.text).startswith("da"):
            raise config.InputError("no text that this tokenizer writes matches it")

    monkeypatch.setattr(constrain.Matcher, "advance", advance)
    found = beam.generate(trained, asked, None, 8, 3, num_return_sequences=3,
                          grammar=constrain.choices(["abc", "cab", "dad"]))  # fmt: skip
    assert {a.text for a in found if a.finish == "stop"} == {"abc", "cab"} and found[-1].finish == "forbidden"


def test_only_the_empty_text_matches():
    """... and no token ends it."""
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    trained = dataclasses.replace(make(context=64, size=0), tokenizer=tokenizer_lib.Tokenizer(letters, ()))
    asked = [prompts_lib.prompt(trained, "ab")]
    found = beam.generate(trained, asked, None, 8, 2, num_return_sequences=2, grammar=constrain.regex("a{0}"))
    assert [(a.text, a.finish) for a in found] == [("", "stop"), ("", "forbidden")]


# ---- speculation


@pytest.mark.parametrize("proposer", ["lookup", "draft"])
@pytest.mark.parametrize("name", tiny.fusions("cross_attention"))
def test_greedy_speculation_says_what_decode_does(name, proposer):
    trained = make(context=64, **tiny.FUSIONS[name])
    read = tiny.reader(trained.layout)
    draft = Lookup(4, 2) if proposer == "lookup" else noisy(trained, 0.1)
    asked = answers([ask(trained, "abcabc", [0]), ask(trained, "de")], [ask(trained, "b"), ask(trained, "xyxuv", [3])])
    asked["logits_processor"] = [no_neighbours]
    expected = decode.generate(trained, read=read, max_new_tokens=24, **asked)
    found, counts = speculative.generate(trained, read=read, max_new_tokens=24, draft=draft, num_assistant_tokens=3,
                                         **asked)  # fmt: skip
    assert found == expected
    assert 0 < counts.accepted.sum() < counts.drafted.sum()


def test_drawn_speculation_obeys_processors():
    """Between each two tokens, whoever proposed them; and what lies behind the text is 0, as decode has it."""
    trained = make(context=64)

    def process(past, logits):
        behind = jnp.arange(past.tokens.shape[1]) >= past.length[:, None]
        return jnp.where((past.tokens * behind).any(axis=1)[:, None], jnp.nan, no_neighbours(past, logits))

    prompt = ask(trained, "abcabc")
    found, counts = speculative.generate(trained, [prompt] * 20, None, 12, noisy(trained, 0.1), 3,
                                         sample.Sampling(1.0), range(20), logits_processor=[process])  # fmt: skip
    for answer in found:
        assert (np.abs(np.diff([*prompt.tokens[-1:], *answer.tokens])) > 2).all() and len(answer.tokens) == 12
    assert 0 < counts.accepted.sum() < counts.drafted.sum()


def test_drawn_speculation_follows_the_guided_law():
    """4,000 draws of two tokens, of which a draft model that is not guided proposes the second."""
    trained, rows, law = make(context=64, tied=False, size=0), 4000, dataclasses.replace(GUIDED, temperature=1.0)
    ids, other = [8, 9, 29, 12, 8, 9], [12, 25]
    asked, second = prompts_lib.plain(ids), prompts_lib.plain(other)
    found, counts = speculative.generate(trained, [asked] * rows, None, 2, noisy(trained, 0.3), 2, law, range(rows),
                                         negative=[second] * rows)  # fmt: skip
    drawn = np.array([a.tokens for a in found])

    def probabilities(guided: bool, said):
        """-> [n,V] after each list of tokens."""
        more = answers([prompts_lib.plain(ids + s) for s in said],
                       [prompts_lib.plain(other + s) for s in said] if guided else ())  # fmt: skip
        scores = [a.scores[0] for a in decode.generate(trained, max_new_tokens=1, output_scores=True, **more)]
        return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))

    def p_value(guided: bool) -> float:
        each = probabilities(guided, [[t] for t in range(tiny.VOCAB)])
        expected = (probabilities(guided, [[]]).T * each).ravel().astype(np.float64) * rows
        seen = np.bincount(drawn[:, 0] * tiny.VOCAB + drawn[:, 1], minlength=tiny.VOCAB**2)
        often = expected >= 5
        pooled = [np.append(x[often], x[~often].sum()) for x in (seen, expected / expected.sum() * rows)]
        assert len(pooled[0]) > 5
        return stats.chisquare(*pooled).pvalue

    assert p_value(True) > 1e-4 and p_value(False) < 1e-9
    assert (np.bincount(counts.accepted, minlength=2) > 100).all()


def test_guidance_needs_its_second_prompts():
    trained = make()
    for way in (beam.generate, speculative.generate):
        for more in ({"sampling": GUIDED}, {"negative": [ask(trained, "a")]}):
            with pytest.raises(config.InputError, match="second prompts: give one for each of the 1 prompts"):
                way(trained, [ask(trained, "a")], **more)


@pytest.mark.parametrize("way", (decode.generate, beam.generate, speculative.generate))
def test_max_length_counts_the_prompt(way):
    """That of each prompt; max_new_tokens does not, and comes first."""
    trained = make(context=32)
    short, long = prompts_lib.plain((7, 8)), prompts_lib.plain((9, 20, 21, 22))

    def lengths(**given):
        found = way(trained, [short, long], **given)
        return [len(a.tokens) for a in (found[0] if isinstance(found, tuple) else found)]

    assert lengths(max_length=9) == [7, 5]
    assert lengths(max_length=9, max_new_tokens=3) == [3, 3]
    assert lengths(max_length=10**6) == [30, 28] and lengths() == [30, 28]
    with pytest.raises(config.InputError, match="max_length=4 counts the prompt, which has 4 positions"):
        lengths(max_length=4)
    with pytest.raises(config.InputError, match="max_new_tokens=0 must be"):
        lengths(max_new_tokens=0)
