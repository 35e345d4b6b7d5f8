"""Beam search against Hugging Face's, against all answers there are, and against the full forward pass."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from benchmarks import references
from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.generate import beam, decode, sample, speculative
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.interop import hf
from gpt4v_jax.model import attention
from gpt4v_jax.training import step as step_lib
from tests import tiny
from tests.generate.test_decode import both, make  # noqa: F401

forward = jax.jit(step_lib.forward, static_argnums=0)
NEW = 10  # tokens of the longest answer


def search(model, params, documents, num_beams, room, end, **how):
    """-> the beams of prompts, media included; room: one number, or one a prompt."""
    room = [room] * len(documents) if isinstance(room, int) else room
    batch = fill(model, documents)
    logits, cache = decode.prefill(model, params, batch, batch.tokens.shape[1] + NEW)
    return beam.search(model, params, logits, cache, num_beams, room, end, **how)


def fill(model, documents):
    return packing.stack([packing.fill([d], tiny.reader(model.layout), model.layout) for d in documents])


def longer(document, tokens):
    """-> the prompt and an answer."""
    n = len(tokens)
    made = chat.shifted(
        np.append(document.tokens, tokens).astype(np.int32), np.zeros(len(document) + n, bool),
        np.append(document.ar, np.ones(n, bool)), document.media,
    )  # fmt: skip
    return dataclasses.replace(made, source=document.source, source_at=document.source_at)


def rescored(model, params, document, answers) -> np.ndarray:
    """-> the sums of the answers' log-probabilities, from one full forward pass."""
    logits = forward(model, params, fill(model, [longer(document, a) for a in answers]))
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    first = len(document) - 1
    return np.array([sum(row[first + i, t] for i, t in enumerate(a)) for row, a in zip(log_p, answers, strict=True)])


# ---- against Hugging Face


PROMPTS = [np.random.default_rng(i).integers(9, 80, n).tolist() for i, n in enumerate((9, 2, 5))]
START = 2
ENDS = {"gpt2": (8, 40, 48, 62, 67, 81), "llama": (9, 21, 31, 57, 63, 82), "t5": (14, 34, 66)}  # that are reached


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """-> name -> (their model, our module, our parameters), of random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    @functools.cache
    def make(name):
        torch.manual_seed(0)
        architecture, folder = getattr(transformers, references.CASES[name].architecture), tmp_path_factory.mktemp(name)
        theirs = architecture(architecture.config_class(**copy.deepcopy(references.CASES[name].values))).eval()
        theirs.save_pretrained(folder)
        ours = hf.load(folder)
        layout = batch_lib.layout(ours.config, config.Data())
        layout = dataclasses.replace(layout, context=9, source=min(layout.source, 9))
        return theirs, hf.module_of(ours.config)[0].clone(layout=layout), ours.params

    return make


def reference_beams(model, prompts, num_beams, end, **how):
    """-> HF's [(tokens, score)] of each prompt; they want padding on the left."""
    import torch

    width = max(map(len, prompts))
    padded = [[0] * (width - len(p)) + p for p in prompts]
    seen = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    start = {"decoder_start_token_id": START} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(seen), num_beams=num_beams, do_sample=False,
            eos_token_id=list(end) or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
            **{"max_new_tokens": NEW, "num_return_sequences": num_beams} | start | how,
        )  # fmt: skip
    found = []
    for row in out.sequences[:, 1 if start else width :].tolist():
        n = next((i + 1 for i, token in enumerate(row) if token in end), len(row))
        found.append(tuple(row[:n]))
    scores = [None] * len(found) if num_beams == 1 else out.sequences_scores.tolist()
    each = len(found) // len(prompts)
    return [list(zip(found, scores, strict=True))[i : i + each] for i in range(0, len(found), each)]


def documents(model, prompts):
    if model.config.source:
        start = prompts_lib.plain([START])
        return [dataclasses.replace(start, source=tuple(p), source_at=(0,) * len(p)) for p in prompts]
    return [prompts_lib.plain(p) for p in prompts]


def agree(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert [b.tokens for b in one] == [tokens for tokens, _ in other]
        if other[0][1] is not None:
            np.testing.assert_allclose([b.score for b in one], [score for _, score in other], atol=1e-4, rtol=1e-5)


EVERY = list(itertools.product((0.0, 1.0, -0.5, 2.0), (False, True, "never")))
SOME = [(0.0, True), (1.0, False), (-0.5, "never"), (2.0, "never")]


@pytest.mark.parametrize("name, num_beams, settings", [
    ("gpt2", 4, EVERY), ("llama", 4, SOME), ("gpt2", 2, SOME), ("t5", 3, SOME),
    *(pytest.param(name, n, EVERY, marks=pytest.mark.soak) for name in ENDS for n in (2, 3, 4, 7)),
])  # fmt: skip
def test_beams_are_those_of_the_reference(name, num_beams, settings, pair):
    """All of a prompt's beams, and their scores."""
    reference, model, params = pair(name)
    asked, seen = documents(model, PROMPTS), {}
    for length_penalty, early in settings:
        how = {"length_penalty": length_penalty, "early_stopping": early}
        ours = search(model, params, asked, num_beams, NEW, ENDS[name], num_return_sequences=num_beams, **how)
        agree(ours, reference_beams(reference, PROMPTS, num_beams, ENDS[name], **how))
        seen[length_penalty, early] = [[b.tokens for b in row] for row in ours]
        assert all(b.finish == ("stop" if b.tokens[-1] in ENDS[name] else "length") for row in ours for b in row)
    if settings is EVERY and num_beams == 4 and name != "t5":
        assert len({len(tokens) for rows in seen.values() for row in rows for tokens in row}) > 4
        assert seen[1.0, True] != seen[1.0, False] and seen[0.0, False] != seen[2.0, False]
        assert seen[1.0, False] != seen[1.0, "never"] or seen[2.0, False] != seen[2.0, "never"]


@pytest.mark.parametrize("end", [ENDS["gpt2"][1:2], ()])
def test_the_best_beams_are_the_first_of_all(end, pair):
    reference, model, params = pair("gpt2")
    ours = search(model, params, documents(model, PROMPTS), 4, NEW, end, num_return_sequences=2)
    agree(ours, reference_beams(reference, PROMPTS, 4, end, num_return_sequences=2))
    assert {b.finish for row in ours for b in row} == ({"length", "stop"} if end else {"length"})


@pytest.mark.parametrize("early", [False, "never"])
def test_one_beam_is_greedy(early, pair):
    """Also where "never" would have a search go on behind the first end."""
    reference, model, params = pair("gpt2")
    how = {"length_penalty": 2.0, "early_stopping": early}
    ours = search(model, params, documents(model, PROMPTS), 1, NEW, ENDS["gpt2"], **how)
    agree(ours, reference_beams(reference, PROMPTS, 1, ENDS["gpt2"], **how))
    assert min(len(b.tokens) for b, in ours) < NEW


def scarce(least, price, tokens, log_p):
    """No end among the first `least` tokens, and each token costs `price` for each time that it was said."""
    rows, end = jnp.arange(len(tokens))[:, None], jnp.array(ENDS["gpt2"])
    early = ((tokens >= 0).sum(1) < least)[:, None]
    log_p = log_p.at[:, end].add(jnp.where(early, -jnp.inf, 0.0))
    return log_p.at[rows, tokens].add(-price * (tokens >= 0))


def test_process_is_a_logits_processor(pair):
    reference, model, params = pair("gpt2")
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    width = max(map(len, PROMPTS))

    class Costs(LogitsProcessor):
        def __call__(self, input_ids, scores):
            said = input_ids[:, width:]
            return scores.clone().scatter_add_(1, said, torch.full(said.shape, -0.7))

    theirs = reference_beams(
        reference, PROMPTS, 4, ENDS["gpt2"], min_new_tokens=4, logits_processor=LogitsProcessorList([Costs()])
    )
    ours = search(model, params, documents(model, PROMPTS), 4, NEW, ENDS["gpt2"], num_return_sequences=4,
                  process=jax.tree_util.Partial(scarce, 4, 0.7))  # fmt: skip
    agree(ours, theirs)
    assert min(len(b.tokens) for row in ours for b in row) >= 4
    compiled = beam._search._cache_size()
    other = search(model, params, documents(model, PROMPTS), 4, [8, NEW, 6], ENDS["gpt2"], length_penalty=0.5,
                   early_stopping="never", process=jax.tree_util.Partial(scarce, 5, 0.5))  # fmt: skip
    assert beam._search._cache_size() == compiled, "numbers compile nothing anew"
    assert [row[0].tokens for row in other] != [row[0].tokens for row in ours]


# ---- against all there is


def only(tokens, log_p):
    """Five tokens of the vocabulary."""
    return jnp.where(jnp.isin(jnp.arange(tiny.VOCAB), jnp.array(FIVE)), log_p, -jnp.inf)


FIVE, END = (7, 11, 13, 20, 30), 13


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_every_answer(length_penalty):
    model, params = tiny.make_model(tiny.make_config(tied=False))
    document = tiny.document("I U3", model.layout)
    others = [t for t in FIVE if t != END]
    whole = [(*a, b) for a in itertools.product(others, repeat=2) for b in FIVE]
    answers = [(END,), *((t, END) for t in others), *whole]
    scores = rescored(model, params, document, answers) / np.array([len(a) for a in answers]) ** length_penalty
    best = np.argsort(-scores)
    how = {"length_penalty": length_penalty, "process": only}
    found, = search(model, params, [document], 85, 3, (END,), num_return_sequences=85, early_stopping="never", **how)
    assert len(answers) == 85 and [b.tokens for b in found] == [answers[i] for i in best]
    np.testing.assert_allclose([b.score for b in found], scores[best], atol=1e-5)
    # Beyond that there is nothing: what is forbidden is no answer.
    more, = search(model, params, [document], 100, 3, (END,), num_return_sequences=100, **how)
    assert [b.tokens for b in more] == [b.tokens for b in found]


@pytest.mark.parametrize("name", tiny.fusions("encoder_decoder"))
def test_scores_are_those_of_the_full_forward(name):
    """And a prompt's beams depend neither on those beside it nor on how far they may go."""
    model, params = tiny.make_model(tiny.make_config(tied=False, **tiny.FUSIONS[name]))
    asked = [tiny.document(text, model.layout, seed) for seed, text in enumerate(("I U3", "U2", "I U1 I U2", "I U6"))]
    assert len({len(d) + len(d.source) for d in asked}) >= 3
    room, how = [7, 6, 4, 1], {"num_return_sequences": 4, "length_penalty": 0.7}
    together = search(model, params, asked, 4, room, (9, 12), **how)
    for document, most, beams in zip(asked, room, together, strict=True):
        tokens = [b.tokens for b in beams]
        assert len(set(tokens)) == 4 and max(map(len, tokens)) <= most
        scores = rescored(model, params, document, tokens) / np.array(list(map(len, tokens))) ** 0.7
        np.testing.assert_allclose([b.score for b in beams], scores, atol=1e-4)
        alone, = search(model, params, [document], 4, [most], (9, 12), **how)
        assert [b.tokens for b in alone] == tokens
        np.testing.assert_allclose([b.score for b in alone], scores, atol=1e-4)
    assert len({len(b.tokens) for row in together for b in row}) > 2


# ---- stop strings

WORDS = ["a", "b", "c", "ab", "ba", "ca", "bc", "cab", "abc", "bb", "cc", "x", "abcdef", *"defghijklmnopqr"]
SPELT = ["<0>", "<1>", "<2>", "<3>", *WORDS]  # of the 32 tokens


@dataclasses.dataclass(frozen=True)
class Spelt:
    """Tokens of several letters, so that a stop string begins within one and ends within another."""

    ends: tuple = (5,)
    special = {}

    def decode(self, ids):
        return "".join(SPELT[i] for i in ids)


@pytest.mark.parametrize("stop, num_beams, settings", [
    (["bbe", "oog", ">ab"], 3, [(1.0, False), (0.5, True)]), (["a"], 2, [(-0.5, "never"), (2.0, "never")]),
    *(pytest.param(stop, n, EVERY, marks=pytest.mark.soak) for stop in (["o"], ["ke", "oo"]) for n in (2, 4)),
])  # fmt: skip
@pytest.mark.parametrize("ends", [(5,), ()])
def test_stop_strings_end_beams_as_the_reference_s(stop, num_beams, settings, ends, both):  # noqa: F811
    import tokenizers
    import torch
    import transformers

    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(SPELT)}, "<0>"))
    theirs.decoder = tokenizers.decoders.Fuse()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)
    trained = dataclasses.replace(both[0], tokenizer=Spelt(ends))
    # The last token of a prompt begins no stop string: Hugging Face's may begin there.
    prompts = [[*np.random.default_rng(seed).integers(6, 32, size=5), SPELT.index("x")] for seed in range(6)]
    seen = []
    for length_penalty, early in settings:
        how = {"length_penalty": length_penalty, "early_stopping": early, "num_return_sequences": 2}
        there = both[1].generate(
            torch.tensor(np.array(prompts)), max_new_tokens=12, do_sample=False, pad_token_id=0, num_beams=num_beams,
            eos_token_id=list(ends) or None, stop_strings=stop, tokenizer=theirs, return_dict_in_generate=True,
            output_scores=True, **how,
        )  # fmt: skip
        asked = [prompts_lib.plain(p) for p in prompts]
        ours = beam.generate(trained, asked, None, 12, num_beams, stop_strings=stop, **how)
        assert len(ours) == len(there.sequences) == 12
        for answer, row in zip(ours, there.sequences[:, 6:].tolist(), strict=True):
            assert list(answer.tokens) == row[: len(answer.tokens)]
            said = "".join(SPELT[t] for t in answer.tokens)
            stopped, rest = any(s in said for s in stop), row[len(answer.tokens) :]
            assert answer.text == said[: min([said.index(s) for s in stop if s in said], default=None)]
            assert answer.finish == ("stop" if stopped or 5 in rest and ends else "length")
            assert (len(answer.tokens) == 12) or stopped or rest[0] in ends
            seen.append("text" if stopped else answer.finish)
        np.testing.assert_allclose([a.sequences_score for a in ours], there.sequences_scores.numpy(), rtol=1e-4)
    assert seen.count("text") > 3 and set(seen) > {"text"}, "some end by their text, and some otherwise"


def likely(tokens, log_p):
    return log_p.at[:, 9].add(2.5)


def test_to_be_stopped_is_to_end():
    """Also a candidate behind the first ones, which does not finish, must not live on."""
    model, params = tiny.make_model(tiny.make_config(tied=False))
    asked = [tiny.document(text, model.layout, seed) for seed, text in enumerate(("I U3", "U2", "I U1 I U2", "I U6"))]
    how = {"process": likely, "num_return_sequences": 4}
    ended = search(model, params, asked, 4, 8, (9,), **how)
    assert search(model, params, asked, 4, 8, (), stopped=lambda i, tokens: tokens[-1] == 9, **how) == ended
    assert len({len(b.tokens) for row in ended for b in row if b.finish == "stop"}) > 5


def test_what_stops_nothing_changes_nothing():
    trained = make(context=64, tied=False)
    prompts = [prompts_lib.plain([8, 9, 29]), prompts_lib.plain([12])]
    free = beam.generate(trained, prompts, None, 9, 3, num_return_sequences=3)
    assert beam.generate(trained, prompts, None, 9, 3, stop_strings=["zzz"], num_return_sequences=3) == free
    with pytest.raises(config.InputError, match="a stop string is empty"):
        beam.generate(trained, prompts, None, 9, 3, stop_strings=["a", ""])


# ---- beams that are drawn


def test_one_beam_is_drawn_as_decode_draws():
    trained, prompts = make(context=64, tied=False), [prompts_lib.plain(p) for p in ([8, 9, 29], [12], [12])]
    for law in (sample.Sampling(1.0), sample.Sampling(1.4, top_k=3, no_repeat_ngram_size=1)):
        expected = decode.generate(trained, prompts, None, 12, law, [1, 2, 3])
        found = beam.generate(trained, prompts, None, 12, 1, law, [1, 2, 3])
        assert [a.tokens for a in found] == [a.tokens for a in expected] and found[1].tokens != found[2].tokens


def test_drawn_beams_depend_on_their_seed_alone():
    trained, law = make(context=64, tied=False), sample.Sampling(1.0, top_p=0.9)
    prompt, other = prompts_lib.plain([8, 9, 29]), prompts_lib.plain([12])

    def drawn(prompts, seeds, **more):
        found = beam.generate(trained, prompts, None, 8, 3, law, seeds, num_return_sequences=3, **more)
        return [tuple(a.tokens for a in found[i : i + 3]) for i in range(0, len(found), 3)]

    a, _, b, c = drawn([prompt, other, prompt, prompt], [4, 4, 4, 5])
    assert a == b != c and drawn([prompt], [4]) == [a] and drawn([other, prompt], [9, 5])[1] == c
    assert drawn([prompt], [4], stop_strings=["zzz"]) == [a]


# By top_k=1 as many tokens stay as there are ends and one more; where none ends, two candidates are drawn a beam.
@pytest.mark.parametrize("num_beams, options, ends, length_penalty", [
    (2, {"temperature": 1.6, "top_k": 4, "logit_bias": ((5, 2.0), (9, 1.0))}, (5,), 1.0),
    (3, {"temperature": 4.0, "top_k": 1, "logit_bias": ((5, 1.0),)}, (5, 9), 2.0),
    (2, {"temperature": 0.7, "top_k": 3, "logit_bias": ((5, 2.0),)}, (), 1.0),
])  # fmt: skip
def test_drawn_beams_follow_the_law_of_the_reference_s(num_beams, options, ends, length_penalty, both):  # noqa: F811
    """4,000 draws each of up to three tokens, of the best beam and of the second: chi-square of two samples."""
    import torch

    trained, rows = dataclasses.replace(both[0], tokenizer=Spelt(ends)), 4000
    prompt = np.random.default_rng(3).integers(6, 32, size=6)
    law, how = sample.Sampling(**options), {"length_penalty": length_penalty, "num_return_sequences": 2}
    torch.manual_seed(0)
    there = both[1].generate(
        torch.tensor(prompt)[None].repeat(rows, 1), max_new_tokens=3, do_sample=True, pad_token_id=0,
        num_beams=num_beams, eos_token_id=list(ends) or None, temperature=law.temperature, top_k=law.top_k,
        sequence_bias={(token,): value for token, value in law.logit_bias}, **how,
    )[:, 6:].tolist()  # fmt: skip
    ours = beam.generate(trained, [prompts_lib.plain(prompt)] * rows, None, 3, num_beams, law, range(rows), **how)
    there = [tuple(row[: next((i for i, t in enumerate(row) if t in ends), 3)]) for row in there]
    for place in (0, 1):
        found = [sorted(map(str, x)) for x in (there[place::2], [a.tokens for a in ours[place::2]])]
        names = sorted(set(found[0]) | set(found[1]))
        counts = np.array([[x.count(name) for name in names] for x in found])
        often = counts.sum(axis=0) >= 20
        counts = np.column_stack([counts[:, often], counts[:, ~often].sum(axis=1)])
        counts = counts[:, counts.sum(axis=0) > 0]
        assert counts.shape[1] > 5 and scipy.stats.chi2_contingency(counts).pvalue > 1e-4
    assert not ends or min(len(a.tokens) for a in ours) < 3


# ---- bad values


@pytest.mark.parametrize("bad, message", [
    ({"num_beams": 0}, "num_beams=0 must be 1 (greedy) or more"),
    ({"num_return_sequences": 3}, "num_return_sequences=3 must be from 1 to num_beams=2"),
    ({"num_return_sequences": 0}, "num_return_sequences=0 must be from 1"),
    ({"early_stopping": "always"}, "early_stopping='always' must be False, True or 'never'"),
    ({"early_stopping": None}, "early_stopping=None must be"),
    ({"length_penalty": float("nan")}, "length_penalty=nan must be a number nearer to 0"),
    ({"length_penalty": float("-inf")}, "length_penalty=-inf must be a number nearer to 0"),
    ({"length_penalty": 1e3}, "length_penalty=1000.0 must be a number nearer to 0"),
    ({"room": [0]}, "room=0 for new tokens must be 1 or more"),
])  # fmt: skip
def test_bad_values(bad, message):
    with pytest.raises(config.InputError) as raised:
        beam.search(None, None, None, None, **{"num_beams": 2, "room": [3], "end": ()} | bad)
    assert message in str(raised.value)


def test_no_prompts_and_seeds_of_another_number():
    trained = make()
    assert beam.generate(trained, []) == [] and speculative.generate(trained, [])[0] == []
    with pytest.raises(config.InputError, match="1 seeds for 2 prompts"):
        beam.generate(trained, [prompts_lib.plain([5])] * 2, None, 1, 2, seeds=(1,))


def test_a_full_cache_is_refused():
    cache = attention.empty_cache(config.Backbone(depth=1, width=8, heads=1), 1, slots=2)
    with pytest.raises(AssertionError, match="too few slots"):
        beam.search(None, None, None, cache, 2, [3], ())
