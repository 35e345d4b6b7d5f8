"""Speculative decoding: greedy answers are those of plain decoding, drawn ones follow the target model's law."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt4v_jax import config
from gpt4v_jax.data import chat, packing, tokenizer
from gpt4v_jax.generate import decode, draft, sample, speculative
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.generate.draft import Law, Lookup
from tests import tiny
from tests.generate.test_decode import ask, forward, make

LOOKUP = Lookup(4, 2)
NONE = np.zeros((6, 0), np.int32)  # the sources of six rows


def noisy(trained, share: float):
    """-> a draft model that says often, but not always, what `trained` says."""
    other = tiny.make_model(trained.model.config, seed=1)[1]
    return dataclasses.replace(
        trained, params=jax.tree.map(lambda a, b: (1 - share) * a + share * b, trained.params, other)
    )


def same(trained, prompts, proposer, tokens=12, k=3, law=decode.GREEDY, stop=()):
    """Greedy answers against decode.generate's -> (the answers' tokens, the counts as numpy arrays)."""
    read = tiny.reader(trained.layout)
    expected = decode.generate(trained, prompts, read, tokens, law, stop_strings=stop)
    found, counts = speculative.generate(trained, prompts, read, tokens, proposer, k, law, stop_strings=stop)
    assert found == expected
    return [answer.tokens for answer in found], speculative.Counts(*map(np.asarray, counts))


# ---- greedy


# The others, of which a step of decoding sees no more than of these, are make soak's.
@pytest.mark.parametrize("name", tiny.fusions("encoder_decoder"))
def test_greedy_is_plain_greedy_whatever_the_fusion(name):
    number = list(tiny.FUSIONS).index(name)
    trained = make(media=True, axes=3 if number % 2 else 1, context=32, **tiny.FUSIONS[name])
    texts = ("I U2", "V S5 U1", "U4 A3 I U2", "U1", "S7 U2 A1 U1")
    prompts = [chat.document(tiny.pieces(text, seed), tiny.SPECIAL, trained.layout) for seed, text in enumerate(texts)]
    _, counts = same(trained, prompts, LOOKUP if number % 4 == 1 else noisy(trained, 0.1), 10)
    assert 0 < counts.accepted.sum() < counts.drafted.sum(), "some are accepted and some are not"


@pytest.fixture(scope="module")
def ragged():
    """-> (a model, 12 prompts). Every law that goes by slots, positions or indices; prompts up to the context's end."""
    trained = make(context=32, tied=False, position="learned", pattern=("local", "global"), window=4, buckets=8)
    words = ["a", "bc", "def" * 3, "ghij", "kl mn op" * 2, "ab" * 10, "p", "rst", "uvw", "xyx", "b a" * 6, "d" * 27]
    return trained, [ask(trained, word, [i] if i % 4 == 0 else []) for i, word in enumerate(words)]


def test_rows_fill_the_context_in_mid_draft(ragged):
    """Learned positions end there: what is proposed behind must not spoil what is before."""
    trained, prompts = ragged
    found, counts = same(trained, prompts, noisy(trained, 0.1), 16)
    assert sorted({len(row) for row in found})[0] < 6 and max(map(len, found)) == 16
    assert 0 < counts.accepted.sum() < counts.drafted.sum()
    assert len(set(counts.rounds.tolist())) > 2


def test_rows_end_in_mid_draft(ragged):
    trained, prompts = ragged
    free = [answer.tokens for answer in decode.generate(trained, prompts, tiny.reader(trained.layout), 16)]
    later = [token for row in free for token in set(row[1:])]
    end = max(sorted(set(later)), key=later.count)
    ended = make(end=end, context=32, tied=False, position="learned", pattern=("local", "global"), window=4, buckets=8)
    found, counts = same(ended, prompts, noisy(ended, 0.1), 16)
    assert (counts.rounds <= [len(row) for row in found]).all(), "what has ended goes no further"
    assert 3 < sum(len(row) < len(all) for row, all in zip(found, free, strict=True)) < len(prompts)


def test_a_prompt_that_cannot_be_read(ragged):
    trained, prompts = ragged

    def read(medium):
        if medium.key == 4:
            raise packing.BadMedium("damaged")
        return tiny.reader(trained.layout)(medium)

    expected = decode.generate(trained, prompts, read, 16)
    assert speculative.generate(trained, prompts, read, 16, noisy(trained, 0.1), 3)[0] == expected
    assert expected[4].finish == "unreadable"


def test_the_target_model_itself_as_the_draft():
    """All is accepted: k + 1 tokens a round. The prompt takes all of its width: the cache has no slot to spare."""
    trained = make(context=64, tied=False)
    prompts = [ask(trained, ("abcdefgh" * 4)[: 32 - 2]), ask(trained, "abc")]
    assert len(prompts[0]) == decode.BUCKET
    _, counts = same(trained, prompts, trained, decode.BLOCK, k=4)
    assert counts.rounds.tolist() == [3, 3] and counts.accepted.tolist() == [12, 12], "1 + 3 x (4 + 1) tokens"


LAWS = {
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "forbidden": {"no_repeat_ngram_size": 3, "min_new_tokens": 7, "bad_words_ids": ((24,), (9, 9), (7, 7, 7)),
                  "logit_bias": ((21, 4.0), (7, -2.0))},
    "frequency_penalty": {"frequency_penalty": 1.0}, "presence_penalty": {"presence_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.8}, "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "bad_words_ids": {"bad_words_ids": ((24,), (9, 9), (7, 7, 7))}, "min_new_tokens": {"min_new_tokens": 12},
    "logit_bias": {"logit_bias": ((20, 2.0), (7, -2.0))},
}  # fmt: skip


@pytest.mark.parametrize("name, proposer", [
    ("penalties", "lookup"), ("forbidden", "draft"),
    *(pytest.param(name, how, marks=pytest.mark.soak) for name in LAWS for how in ("draft", "lookup")),
])  # fmt: skip
def test_greedy_is_plain_greedy_under_laws_of_what_was_said(name, proposer):
    """Before each token of a proposal the law knows those before it."""
    trained = make(context=64, end=21)
    prompts = [ask(trained, text) for text in ("abcabc", "b", "the same the same", "xyx")]
    free = [answer.tokens for answer in decode.generate(trained, prompts, None, 24)]
    assert 21 in trained.tokenizer.ends and len(free[1]) == 3, "it ends early"
    proposer = LOOKUP if proposer == "lookup" else noisy(trained, 0.15)
    found, counts = same(trained, prompts, proposer, 24, law=sample.Sampling(**LAWS[name]))
    assert found != free and 0 < counts.accepted.sum() < counts.drafted.sum()


def test_what_an_encoder_reads_is_copied_but_was_not_said():
    trained = make(kind="encoder_decoder", context=64)
    prompts = [ask(trained, "abceabc"), ask(trained, "bdefg" * 3)]
    law = sample.Sampling(repetition_penalty=3.0, logit_bias=((8, 5.0), (11, 5.0)))
    found, _ = same(trained, prompts, LOOKUP, 12, law=law)
    assert all(set(row) & set(p.source) for row, p in zip(found, prompts, strict=True))
    assert same(trained, prompts, LOOKUP, 2, law=law)[1].drafted.all(), "of two tokens none can be copied from another"


def test_laws_that_leave_no_token():
    """Nothing is left once each has been said."""
    trained, prompts = make(context=64, end=99), [prompts_lib.plain([8, 9]), prompts_lib.plain([12])]
    for proposer, rounds in ((LOOKUP, tiny.VOCAB - 1), (trained, tiny.VOCAB // 4)):  # one and k + 1 tokens a round
        found, counts = same(trained, prompts, proposer, 40, law=sample.Sampling(no_repeat_ngram_size=1))
        assert [len(row) for row in found] == [tiny.VOCAB - 2, tiny.VOCAB - 1] and counts.rounds[1] == rounds


def test_stop_strings():
    """Also one that is completed in the middle of a round; rows that are stopped leave others as they are."""
    trained = make(context=64, tied=False)
    prompts = [ask(trained, text) for text in ("abc", "defg", "xyx")]
    free = [answer.text for answer in decode.generate(trained, prompts, None, 40)]
    law, proposer = sample.Sampling(1.0), noisy(trained, 0.1)
    drawn = [a.text for a in speculative.generate(trained, prompts, None, 40, proposer, 3, law, [1, 2, 3])[0]]
    for at in range(3, 12):
        found, _ = same(trained, prompts, proposer, 40, stop=[free[0][at : at + 3], free[1][2 * at : 2 * at + 2]])
        assert len(found[0]) < 40
        stop = drawn[2][at : at + 2]
        cut, _ = speculative.generate(trained, prompts, None, 40, proposer, 3, law, [1, 2, 3], [stop])
        for answer, text in zip(cut, drawn, strict=True):
            assert answer.text == text[: text.index(stop) if stop in text else None]
            assert answer.finish == ("stop" if stop in text else "length")


def test_a_row_depends_on_its_seed_alone():
    trained = make(context=64, tied=False)
    proposer = noisy(trained, 0.5)
    prompt, other = ask(trained, "abc"), ask(trained, "wholly else")

    def drawn(prompts, seeds):
        found, _ = speculative.generate(trained, prompts, None, 16, proposer, 3, sample.Sampling(1.0), seeds)
        return [answer.tokens for answer in found]

    a, _, c = drawn([prompt, other, prompt], [1, 3, 1])
    b, d, e = drawn([other, prompt, prompt], [7, 2, 1])[1:] + drawn([prompt], [1])
    assert a == c == d == e and a != b and len(set(a)) > 5


# ---- the cache


def start(trained, ids, rows: int, new: int, k: int, proposer=LOOKUP):
    """-> (State of `rows` equal rows whose last token is not in the caches yet, limit, the arguments before them)."""
    layout = dataclasses.replace(trained.layout, context=len(ids) - 1)
    batch = packing.stack([packing.fill([prompts_lib.plain(ids[:-1])], None, layout)])
    looks = isinstance(proposer, Lookup)

    def filled(trained):
        slots = speculative.slots(len(ids) - 1, new + 1, k)  # new + 1: the last token counts as the answer's first
        cache = decode.prefill(trained.model, trained.params, batch, slots)[1]
        return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0) if x.ndim else x, cache)

    length = jnp.full(rows, len(ids), jnp.int32)
    text = jnp.tile(jnp.array([*ids, *[0] * (new + k + 1)], jnp.int32), (rows, 1))
    counts = speculative.Counts(*(jnp.zeros(rows, jnp.int32) for _ in range(3)))
    past = sample.History(text, length, jnp.copy(length))
    state = speculative.State(
        past, jnp.zeros(rows, bool), filled(trained), None if looks else filled(proposer), counts
    )
    model = (trained.model, trained.params, *((proposer, None) if looks else (proposer.model, proposer.params)))
    return model, state, length + new


def keys(rows):
    return jax.vmap(jax.random.key)(jnp.arange(rows))


def test_rounds_leave_caches_without_holes():
    """However many rounds a call has: a row's text but its last token, one slot each, and the cursor behind the
    longest."""
    trained = make(context=64, tied=False, size=0)
    ids, k, law = [8, 9, 10, 11, 12], 3, Law(sample.Sampling(1.0))
    model, state, limit = start(trained, ids, 6, 12, k, noisy(trained, 0.5))
    lengths = []
    while not state.done.all():
        state = speculative.decode(*model, state, NONE, limit, keys(6), 1, k, law)
        lengths.append(state.past.length.tolist())
        held = np.asarray(state.past.length) - 1
        for cache in (state.cache, state.draft_cache):
            assert cache.cursor == held.max()
            np.testing.assert_array_equal(cache.document, np.arange(cache.document.shape[1]) < held[:, None])
            for found in (cache.next_position[:, 0], cache.last_step, cache.last_index):
                np.testing.assert_array_equal(found, held)
    assert any(len(set(row)) > 2 for row in lengths), "rows accept more and less"
    model, again, limit = start(trained, ids, 6, 12, k, noisy(trained, 0.5))
    again = speculative.decode(*model, again, NONE, limit, keys(6), 99, k, law)
    np.testing.assert_array_equal(again.past.tokens[:, :17], state.past.tokens[:, :17])
    assert (again.counts.rounds == state.counts.rounds).all()


# ---- the law


@pytest.mark.parametrize("proposer, sampling", [
    ("draft", sample.Sampling(0.7, top_k=3)), ("lookup", sample.Sampling(1.0)),
    # Each says another thing of the second token where it follows the first one than where it does not.
    ("draft", sample.Sampling(1.5, repetition_penalty=1.5, frequency_penalty=1.0, bad_words_ids=((12, 12),))),
], ids=["draft, restricted", "lookup", "what was said"])  # fmt: skip
def test_draws_follow_the_target_model(proposer, sampling):
    """20,000 draws of two tokens: both accepted, one, or none."""
    law = Law(sampling)
    trained, rows, ids = make(context=64, tied=False, size=0), 20_000, [8, 9, 29, 12, 8, 9]  # 29, then 12 are likely
    model, state, limit = start(trained, ids, rows, 2, 2, LOOKUP if proposer == "lookup" else noisy(trained, 0.3))
    state = speculative.decode(*model, state, jnp.zeros((rows, 0), jnp.int32), limit, keys(rows), 99, 2, law)
    drawn = np.asarray(state.past.tokens[:, len(ids) : len(ids) + 2])

    layout = dataclasses.replace(trained.layout, context=len(ids) + 1)
    batch = packing.stack([packing.fill([prompts_lib.plain([*ids, a])], None, layout) for a in range(tiny.VOCAB)])
    logits = forward(trained.model, trained.params, batch)
    before = sample.history([ids], 2)
    first = law(logits[:1, -2], before)
    each = jax.tree.map(lambda x: jnp.repeat(x, tiny.VOCAB, axis=0), before).append(jnp.arange(tiny.VOCAB))
    expected = np.asarray(first.T * law(logits[:, -1], each), np.float64).ravel()
    found = np.bincount(drawn[:, 0] * tiny.VOCAB + drawn[:, 1], minlength=tiny.VOCAB**2)
    assert not found[expected == 0].any(), "what is not allowed is never drawn"
    often = expected * rows >= 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (found, expected / expected.sum() * rows)]
    pooled = [x[pooled[1] > 0] for x in pooled]
    assert len(pooled[0]) > 5 and stats.chisquare(*pooled).pvalue > 1e-4
    assert (np.bincount(state.counts.accepted, minlength=3) > 100).all(), "all ways to come by two tokens"


# ---- prompt lookup


@pytest.mark.parametrize("text, k, size, expected", [
    ([1, 2, 3, 4, 1, 2], 3, 2, [3, 4, 1]),
    ([1, 2, 3, 9, 2, 5, 1, 2], 2, 2, [3, 9]),
    ([7, 2, 3, 1, 2, 4, 1, 2], 2, 2, [4, 1]),  # the longer n-gram, though the shorter one stands before it
    ([7, 2, 3, 1, 2, 4, 1, 2], 2, 1, [3, 1]),
    ([1, 2, 3, 4, 5, 6], 3, 2, []),
    ([5, 5], 3, 2, [5]),  # of what follows there is no more
    ([5], 3, 2, []),
    ([0, 0, 0], 2, 9, [0]),  # an n-gram longer than the text
])  # fmt: skip
def test_look_up(text, k, size, expected):
    padded = jnp.array([[*text, 1, 2, 3, 0, 0][:13]], jnp.int32)
    tokens, count = draft.look_up(padded, jnp.array([len(text)]), k, size)
    assert tokens[0, : count[0]].tolist() == expected


def test_a_text_that_repeats_itself_needs_few_passes():
    """A random model with a tied head repeats the last token."""
    trained = make(context=64)
    found, counts = same(trained, [ask(trained, "abcabc")], LOOKUP, 32)
    assert len(found[0]) == 32 and counts.rounds[0] < 12


# ---- bad input


def test_a_draft_with_another_vocabulary():
    trained = make()
    one, other = (tokenizer.train(kind, ["abc abd"], 280) for kind in ("byte", "bpe"))
    with pytest.raises(config.InputError, match="another vocabulary"):
        speculative.check(*(dataclasses.replace(trained, tokenizer=kind) for kind in (one, other)))
    again = tokenizer.train("byte", [], 280)
    speculative.check(*(dataclasses.replace(trained, tokenizer=kind) for kind in (one, again)))
    wider = dataclasses.replace(trained.run, model=dataclasses.replace(trained.run.model, vocab=40))
    with pytest.raises(config.InputError, match="another vocabulary"):
        speculative.check(trained, dataclasses.replace(trained, run=wider))


def test_a_draft_that_lays_media_otherwise():
    """It needs prompts of its own; what is written does not depend on them."""
    trained, other = make(context=32, tied=False), make(kind="cross_attention", context=32)
    prompts, alone = [ask(trained, "abc", [0])], [ask(other, "abc", [0])]
    with pytest.raises(config.InputError, match="lays media otherwise"):
        speculative.check(trained, other, prompts)
    read = tiny.reader(trained.layout)
    expected = decode.generate(trained, prompts, read, 8)
    assert len(alone[0]) < len(prompts[0])
    assert speculative.generate(trained, prompts, read, 8, other, 3, draft_prompts=alone)[0] == expected


@pytest.mark.parametrize("values, named", [
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"num_assistant_tokens": 0}, "num_assistant_tokens=0"),
    ({"sampling": sample.Sampling(guidance_scale=2.0)}, "guidance_scale=2.0 with 0 second prompts"),
    ({"stop_strings": ["a", ""]}, "a stop string is empty"), ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
])  # fmt: skip
def test_values_that_mean_nothing(values, named):
    trained = make()
    with pytest.raises(config.InputError, match=named):
        speculative.generate(trained, [ask(trained, "a")], **values)
    with pytest.raises(config.InputError, match="max_matching_ngram_size=0"):
        Lookup(10, 0)
