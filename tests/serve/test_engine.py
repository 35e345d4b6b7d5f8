"""Continuous batching: no answer depends on who else is there, on what is remembered, or on how the others end."""

import dataclasses
import itertools
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import constrain, decode, prompts, sample, weights
from gpt4v_jax.model import attention
from gpt4v_jax.serve import engine as engine_lib
from gpt4v_jax.serve import prefix
from gpt4v_jax.serve import rows as rows_lib
from gpt4v_jax.serve import slots as slots_lib
from gpt4v_jax.serve.engine import Engine
from gpt4v_jax.serve.requests import Busy, Request
from tests import tiny
from tests.generate.test_decode import LETTERS, ask, make

DRAWN = sample.Sampling(1.0)


class Said(NamedTuple):
    text: str
    tokens: tuple
    logprobs: tuple
    finish: str
    cached: int


def said(deltas) -> Said:
    joined = {name: tuple(x for d in deltas for x in getattr(d, name)) for name in ("tokens", "logprobs")}
    return Said("".join(d.text for d in deltas), finish=deltas[-1].finish, cached=deltas[0].cached, **joined)


class Asked:
    """A request that was submitted. `hold`: its first Delta stops the engine until `go`."""

    def __init__(self, engine: Engine, request: Request, hold: bool = False):
        self.deltas, self.over, self.told, self.go = [], threading.Event(), threading.Event(), threading.Event()
        if not hold:
            self.go.set()
        self.ticket = engine.submit(request, self.tell)

    def tell(self, delta):
        self.deltas.append(delta)
        self.told.set()
        assert self.go.wait(60)
        if delta.finish:
            self.over.set()

    def said(self) -> Said:
        assert self.over.wait(60), "no end"
        return said(self.deltas)


def together(engine: Engine, requests) -> list[Said]:
    return [asked.said() for asked in [Asked(engine, request) for request in requests]]


@pytest.fixture(scope="module")
def trained():
    return make(end=tiny.SPECIAL["<end>"])


@pytest.fixture
def running(trained):
    engine = Engine(trained, slots=3, queued=4)
    yield engine
    engine.close(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Prompts of a few positions have several chunks, texts several pages, and caches grow."""
    monkeypatch.setattr(prefix, "CHUNK", 3)
    monkeypatch.setattr(slots_lib, "PAGE", 8)
    monkeypatch.setattr(rows_lib, "LEAST", 2)


def requests(trained) -> list[Request]:
    """Short and long ones, with and without pictures, that begin alike, greedy and drawn by several laws."""
    read = tiny.reader(trained.layout)
    texts = [
        ("ab", 1), ("abc", 1), ("the same begin", 0), ("the same begins", 0), ("ab", 1)
    ]  # fmt: skip
    laws = [
        sample.Sampling(), DRAWN, sample.Sampling(0.7, top_k=9, top_p=0.8), sample.Sampling(frequency_penalty=1.5),
        sample.Sampling(1.0, logit_bias=((9, 2.0),)),
    ]  # fmt: skip
    return [
        Request(ask(trained, text, range(7, 7 + pictures)), read, 2 + 3 * (i % 3), law, seed=i, logprobs=2)
        for i, ((text, pictures), law) in enumerate(zip(texts, laws, strict=True))
    ]


@pytest.mark.parametrize("name", tiny.fusions("concat", "cross_attention"))
def test_an_answer_does_not_depend_on_company_or_memory(name, monkeypatch):
    """To the bit: all at once in three rows, twice, so that much is remembered; one by one; nothing remembered; also
    where a step has as few rows as are in use. And the tokens are those of decode.generate."""
    trained = make(**tiny.FUSIONS[name])
    asked = requests(trained)
    engine, forgetful = Engine(trained, slots=3), Engine(trained, slots=3, prefix_bytes=0)
    first, again = together(engine, asked), together(engine, asked)
    alone = [together(forgetful, [request])[0] for request in asked]
    for engine_of in (engine, forgetful):
        engine_of.close()

    def bare(found):
        return [answer._replace(cached=0) for answer in found]

    assert bare(first) == bare(again) == bare(alone)
    few = Engine(trained, slots=4)
    monkeypatch.setattr(rows_lib, "FEWEST", 2)
    few._rows.find_sizes()
    assert bare(together(few, asked)) == bare([together(few, [request])[0] for request in asked])
    few.close()
    assert not any(answer.cached for answer in alone)
    assert [answer.cached for answer in again] == [len(request.prompt) for request in asked]
    for request, answer in zip(asked, first, strict=True):
        plain = decode.generate(trained, [request.prompt], request.read, request.max_new_tokens, request.sampling,
                                [request.seed], logprobs=2)[0]  # fmt: skip
        assert (plain.text, plain.tokens, plain.finish) == answer[:2] + (answer.finish,)
        np.testing.assert_allclose(plain.logprobs, answer.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", weights.KINDS)
def test_greedy_answers_of_eight_and_of_one(kind):
    """To the bit, with the prefix cache and without, in every number of rows and of bits; in steps, and in bursts where
    this machine's have the same bits."""
    trained = weights.turned(make(tied=False, context=64), kind)
    texts = ("a", "bc", "the same begin", "the same begins", "bc", "xyx", "abcde", "b")
    asked = [Request(ask(trained, text), None, 4 + 5 * i) for i, text in enumerate(texts)]
    engines = [Engine(trained, slots=8), Engine(trained, slots=8, prefix_bytes=0)]
    for engine in engines:
        engine._rows.find_sizes()
    found = []
    for engine, more in itertools.product(engines, ({}, {"logprobs": 0})):  # whose log-probabilities are told has steps
        group = [dataclasses.replace(request, **more) for request in asked]
        found += [together(engine, group), [together(engine, [request])[0] for request in group]]
    for engine in engines:
        engine.close()
    tokens = [[answer.tokens for answer in answers] for answers in found]
    assert all(other == tokens[0] for other in tokens) and len(set(tokens[0])) > 5
    assert [len(answer) for answer in tokens[0]] == [request.max_new_tokens for request in asked]
    logprobs = [[answer.logprobs for answer in answers] for answers in found if answers[0].logprobs]
    assert len(logprobs) == 4 and all(other == logprobs[0] for other in logprobs), "to the bit"


@pytest.mark.parametrize("media", ["V", "S7"])
def test_a_clip_and_a_sound_are_remembered_by_what_they_show(media):
    trained = make(media=True, axes=3)
    engine = Engine(trained, slots=2)

    def request(seed):
        prompt = tiny.document(f"{media} U2", trained.layout, seed)
        return Request(prompt, tiny.reader(trained.layout), 3, logprobs=0)

    one, same, other = (together(engine, [request(seed)])[0] for seed in (0, 0, 1))
    engine.close()
    assert (one.cached, other.cached) == (0, 0) and same.cached > 0
    assert one._replace(cached=0) == same._replace(cached=0) and one.logprobs != other.logprobs


def test_the_key_covers_the_medium_s_place_shape_and_values():
    """Of prompts with the same tokens: other values, another shape or another place are another key."""
    layout = make(media=True).layout
    audio = tiny.document("S7 U2", layout)

    def keys(document, change=lambda values: values):
        read = tiny.reader(layout)
        return [c.key for c in prefix.chunks(document, lambda m: [(change(v), i) for v, i in read(m)], layout)]

    first, sound = audio.media[0]
    shape = dataclasses.replace(sound, shape=(8,))  # as many patches
    assert first and keys(audio) == keys(audio)
    assert keys(audio)[0] != keys(audio, lambda v: np.nextafter(v, 9))[0]
    for other in ((first, shape), (first - 1, sound)):
        assert keys(audio)[0] != keys(dataclasses.replace(audio, media=(other,)))[0]
    assert keys(audio)[0] != keys(audio, lambda v: v.astype(np.float64))[0]


def test_the_least_recently_used_is_forgotten(trained):
    engine = Engine(trained, slots=1)
    prompts = [ask(trained, text) for text in ("one of these", "other of those", "a third letter")]
    size = []
    for prompt in prompts:
        together(engine, [Request(prompt, None, 1)])
        size.append(engine.prefixes.bytes)
    engine.close()
    kept = Engine(trained, slots=1, prefix_bytes=size[1])  # two of them
    cached = [together(kept, [Request(prompts[i], None, 1)])[0].cached for i in (0, 1, 0, 2, 0, 1)]
    kept.close()
    assert kept.prefixes.bytes <= size[1]
    assert cached[2] and cached[4] and not any(cached[i] for i in (0, 1, 3, 5))


@pytest.mark.parametrize("length", (1, 7, 20))
def test_a_cache_that_was_used_is_as_new(trained, monkeypatch, length):
    """Also what padding wrote behind the prompt; slots that do not divide into chunks."""
    longest, begun, read = trained.layout.context + decode.BUCKET, [], prefix.read_chunk
    assert longest % prefix.CHUNK

    def noted(model, params, batch, cache):
        begun.append(jax.tree.map(np.array, cache))
        return read(model, params, batch, cache)

    def filled(document, old=None):
        begun.clear()
        *_, (_, cache, _) = prefix.filled(trained, document, None, longest, prefix.Prefixes(0), old)
        return cache, begun[0]

    monkeypatch.setattr(prefix, "read_chunk", noted)
    used, new = filled(prompts.plain(list(range(3, 3 + length))))
    assert any(x.any() for x in used.k)
    again = filled(prompts.plain([5]), used)[1]
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_chunks_end_where_blocks_end():
    trained = make()
    document = tiny.document("U7 I U2 A3 I U1", trained.layout)
    ends = prefix.cuts(document, trained.layout)
    assert all(document.ar[end] for end in ends[:-1]) and ends[-1] == len(document)
    behind = [first + 4 for first, _ in document.media]
    assert set(behind) < set(ends) and len(ends) > 4


# ---- ends


def test_a_cancelled_request_frees_its_row(running, trained):
    """While it runs, and while it waits; the others' answers stay what they are."""
    endless = Request(ask(trained, "a"), None, 12, DRAWN)
    plain = together(running, [dataclasses.replace(endless, seed=1)])[0]
    first = Asked(running, endless, hold=True)
    assert first.told.wait(60)
    others = [Asked(running, dataclasses.replace(endless, seed=seed)) for seed in (1, 2, 3, 4)]
    others[3].ticket.cancel()
    first.ticket.cancel()
    first.go.set()
    assert first.said().finish == "cancelled" and len(first.said().tokens) < 12
    assert others[3].said() == Said("", (), (), "cancelled", 0)
    assert others[0].said()._replace(cached=0) == plain
    assert len([asked.said() for asked in others]) == 4 and running.waiting == 0


def test_a_deadline_counts_the_queue(running, trained, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engine_lib.time, "monotonic", lambda: now[0])
    held = Asked(running, Request(ask(trained, "a"), None, 12, DRAWN, seconds=5), hold=True)
    assert held.told.wait(60)
    patient, hasty = (Asked(running, Request(ask(trained, "a"), None, 2, DRAWN, 3, seconds=s)) for s in (None, 1))
    now[0] = 6.0
    held.go.set()
    assert [asked.said().finish for asked in (held, hasty)] == ["timeout"] * 2 and not hasty.said().tokens
    assert patient.said().finish == "length"


def test_users_take_turns(trained):
    engine, order = Engine(trained, slots=1), []
    held = Asked(engine, Request(ask(trained, "a"), None, 1), hold=True)
    assert held.told.wait(60)
    asked = [Asked(engine, Request(ask(trained, "a"), None, 1, user=user)) for user in "aaabc"]
    for name, one in zip(("a1", "a2", "a3", "b1", "c1"), asked, strict=True):
        one.tell = lambda delta, name=name, one=one, tell=one.tell: (order.append(name), tell(delta))
        one.ticket.tell = one.tell
    held.go.set()
    for one in asked:
        one.said()
    engine.close()
    assert order == ["a1", "b1", "c1", "a2", "a3"]


def test_prompts_of_one_user_take_a_share_of_the_others_time(trained, monkeypatch):
    """A chunk takes 1 s by this test's clock, a step 0.5 s; one user's row goes on, the other one sends prompts."""
    now, seen = [0.0], []
    monkeypatch.setattr(engine_lib.time, "monotonic", lambda: now[0])
    read, step = prefix.read_chunk, slots_lib.advance

    def slow(of, letter, seconds):
        def call(*given):
            now[0] += seconds
            seen.append(letter)
            return of(*given)

        return call

    monkeypatch.setattr(prefix, "read_chunk", slow(read, "c", 1.0))
    monkeypatch.setattr(slots_lib, "advance", slow(step, "s", 0.5))
    monkeypatch.setattr(prefix, "CHUNK", 2)

    def order(users) -> str:
        engine = Engine(trained, slots=3, prefix_bytes=0)
        held = Asked(engine, Request(ask(trained, "a"), None, 22, DRAWN, user="a"), hold=True)
        assert held.told.wait(60)
        asked = [Asked(engine, Request(ask(trained, "bcdefg"), None, 1, user=user)) for user in users]
        seen.clear()
        held.go.set()
        assert {one.said().finish for one in (*asked, held)} == {"length"}
        engine.close()
        return "".join(seen).strip("s")

    chunks = len(prefix.cuts(ask(trained, "bcdefg"), trained.layout))
    assert chunks > 3
    assert order("b") == "cssssss" * (chunks - 1) + "c"  # a quarter of the time
    assert order("a") == "cs" * (chunks - 1) + "c"  # his own answers alone wait
    # While somebody else waits, too, prompts are read as fast as they can be; then the last one is paced, from its
    # second chunk on.
    assert order("bd").startswith("cs" * (chunks + 1) + "ss")


def test_a_prompt_known_to_its_end_is_not_read_again(trained, monkeypatch):
    """And other prompts that go on with it or end within it are their own."""
    engine, read, count = Engine(trained, slots=2), prefix.read_chunk, []
    monkeypatch.setattr(prefix, "read_chunk", lambda *given: (count.append(1), read(*given))[1])
    whole = prompts.plain(list(range(3, 12)))  # three chunks
    asked = [Request(p, None, 3, DRAWN, seed=5, logprobs=1)
             for p in (whole, whole, prompts.plain(whole.tokens[:6]), prompts.plain(whole.tokens[:6]))]  # fmt: skip
    found = [together(engine, [request])[0] for request in asked]
    engine.close()
    assert found[1] == found[0]._replace(cached=9) and found[3] == found[2]._replace(cached=6)
    assert len(count) == 3 and found[2].cached == 6 and engine.stats()["chunks_total"] == 3
    known = engine.prefixes._known
    assert engine.prefixes.bytes == sum(x.nbytes for x in jax.tree.leaves(list(known.values()))) and len(known) == 3


def test_beginnings_are_remembered_longer_than_ends(trained):
    """And what lies behind one that was forgotten is not read again."""
    engine = Engine(trained, slots=1)
    whole = prompts.plain(list(range(3, 12)))  # three chunks
    first = together(engine, [Request(whole, None, 1)])[0]
    keys = [chunk.key for chunk in prefix.chunks(whole, None, trained.layout)]
    assert list(engine.prefixes._known) == keys[::-1]
    engine.prefixes.bytes -= sum(x.nbytes for x in jax.tree.leaves(engine.prefixes._known.pop(keys[1])))
    again = together(engine, [Request(whole, None, 1)])[0]
    engine.close()
    assert again == first._replace(cached=6) and list(engine.prefixes._known) == keys[::-1]


def test_a_full_queue_says_when_to_come_again(running, trained):
    held = Asked(running, Request(ask(trained, "a"), None, 1), hold=True)
    assert held.told.wait(60)
    waiting = [Asked(running, Request(ask(trained, "a"), None, 1)) for _ in range(4)]
    with pytest.raises(Busy, match="4 requests wait already") as busy:
        running.submit(Request(ask(trained, "a"), None, 1), print)
    assert busy.value.seconds >= 1
    held.go.set()
    assert {asked.said().finish for asked in waiting} == {"length"}


def test_closing_ends_what_waits_and_lets_the_rest_go_on(trained):
    engine = Engine(trained, slots=1)
    runs = Asked(engine, Request(ask(trained, "a"), None, 9, DRAWN), hold=True)
    assert runs.told.wait(60)
    waits = Asked(engine, Request(ask(trained, "a"), None, 9))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine._closing is None:
        pass
    with pytest.raises(Busy, match="closing"):
        engine.submit(Request(ask(trained, "a")), print)
    runs.go.set()
    assert waits.said().finish == "cancelled" and len(runs.said().tokens) == 9
    closing.join(60)
    assert not closing.is_alive() and not engine._thread.is_alive()


def test_what_runs_longer_than_closing_takes_is_cut(trained):
    engine = Engine(trained, slots=1)
    runs = Asked(engine, Request(ask(trained, "a"), None, 9, DRAWN), hold=True)
    assert runs.told.wait(60)
    closing = threading.Thread(target=engine.close, args=(0,))
    closing.start()
    while engine._closing is None:
        pass
    runs.go.set()
    closing.join(60)
    assert runs.said().finish == "cancelled" and len(runs.said().tokens) < 9


def test_a_medium_that_turns_out_bad_ends_its_request_alone(running, trained):
    def bad(medium):
        raise BadMedium("a damaged picture")

    good = Asked(running, Request(ask(trained, "a"), None, 5, DRAWN))
    broken = Asked(running, Request(ask(trained, "a", [1]), bad, 5))
    assert broken.said().finish == "unreadable" and broken.deltas[-1].error == "a damaged picture"
    assert good.said().finish == "length"


def test_who_does_not_listen_is_cancelled(running, trained, caplog):
    def deaf(delta):
        raise RuntimeError("gone")

    running.submit(Request(ask(trained, "a"), None, 20, DRAWN), deaf)
    other = Asked(running, Request(ask(trained, "a"), None, 5, DRAWN))
    assert other.said().finish == "length" and "cancelled" in caplog.text


def test_a_failed_turn_is_not_the_end(running, trained, monkeypatch, caplog):
    choose, failed = slots_lib.choose, []

    def fails_once(*args):
        if not failed:
            failed.append(1)
            raise RuntimeError("no memory")
        return choose(*args)

    monkeypatch.setattr(slots_lib, "choose", fails_once)
    broken = Asked(running, Request(ask(trained, "a"), None, 5, DRAWN))
    assert broken.said().finish == "error" and "no memory" not in broken.deltas[-1].error
    assert together(running, [Request(ask(trained, "a"), None, 5, DRAWN)])[0].finish == "length"


@pytest.mark.parametrize("where", ("admit", "prompt"))
def test_a_request_that_fails_before_it_has_a_row_is_told(running, trained, monkeypatch, where):
    def fails(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(*((slots_lib, "admit", fails) if where == "admit" else (prefix, "filled", fails)))
        asked = Asked(running, Request(ask(trained, "ab"), None, 2))
        assert asked.said().finish == "error"
    assert together(running, [Request(ask(trained, "ab"), None, 2)])[0].finish == "length"


# ---- what is told


def test_no_tokens_are_soon_told(running, trained):
    """max_tokens=0 of a prompt that is only scored."""
    assert together(running, [Request(ask(trained, "ab"), None, 0)])[0] == Said("", (), (), "length", 0)


def test_the_greedy_token_s_logprob_is_the_best_one_s(running, trained):
    asked = Asked(running, Request(ask(trained, "ab"), None, 6, logprobs=1))
    asked.said()
    for delta in asked.deltas:
        assert not delta.tokens or delta.top == (((delta.tokens[0], delta.logprobs[0]),),)


def test_the_end_token_is_told_with_its_logprob(trained):
    """Beside the answer's tokens, not among them: lm-evaluation-harness counts on one more than the prompt's."""
    prompt = ask(trained, "ab")
    first = decode.generate(trained, [prompt], None, 1, logprobs=2)[0]
    ends = make(end=first.tokens[0])
    engine = Engine(ends, slots=1)
    asked = Asked(engine, Request(prompt, None, 4, logprobs=2))
    assert asked.said()[:4] == ("", (), (), "stop")
    ((token, logprob, top),) = asked.deltas[-1].end
    engine.close()
    assert (token, top[0]) == (first.tokens[0], (token, logprob)) and len(top) == 2
    np.testing.assert_allclose(logprob, first.logprobs[0], atol=1e-5)


def test_stop_strings_that_reach_across_deltas(running, trained):
    """What may yet begin one is held back; the text joined is generate's."""
    for seed in range(4):
        request = Request(ask(trained, "ab"), None, 12, DRAWN, seed)
        whole = together(running, [request])[0].text
        for stop in (whole[3:5], whole[-2:], whole[2:4] + "z", "zz"):
            found = together(running, [dataclasses.replace(request, stop=(stop,))])[0]
            plain = decode.generate(trained, [request.prompt], None, 12, DRAWN, [seed], [stop])[0]
            assert found[:2] == (plain.text, plain.tokens) and found.finish == plain.finish and stop not in found.text


@pytest.mark.parametrize("text, stop, held", [
    ("abc", (), 0), ("abc", ("cd",), 1), ("abc", ("bcd", "x"), 2), ("abc", ("ab",), 0),
    ("ab\ufffd", (), 1), ("ab\ufffd\ufffd", ("b\ufffd\ufffdx",), 3), ("", ("a",), 0),
])  # fmt: skip
def test_what_is_held_back(text, stop, held):
    assert engine_lib._unsure(text, stop) == held


def test_grammars_beside_free_answers(trained):
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    trained = dataclasses.replace(make(context=24, size=0), tokenizer=tokenizer_lib.Tokenizer(letters, ("x",)))
    engine = Engine(trained, slots=3)
    free = Request(ask(trained, "ab"), None, 6, DRAWN, 5, logprobs=0)
    held = [dataclasses.replace(free, grammar=constrain.choices(["cab", "dad"]), seed=seed) for seed in (1, 2)]
    plain = together(engine, [free])[0]
    mixed = together(engine, [free, *held])
    with pytest.raises(config.InputError, match="no text that this tokenizer writes"):
        engine.submit(dataclasses.replace(free, grammar=constrain.regex("Q+")), print)
    engine.close()
    assert mixed[0] == plain._replace(cached=mixed[0].cached)
    for request, answer in zip(held, mixed[1:], strict=True):
        alone = decode.generate(trained, [request.prompt], None, 6, DRAWN, [request.seed], grammar=request.grammar)[0]
        assert answer.text in ("cab", "dad") and (answer.text, answer.finish) == (alone.text, alone.finish)


def test_a_grammar_that_fails_ends_its_own_answer(trained, monkeypatch):
    """In the middle of it, and the others go on. One that only the empty text matches ends before its first token."""
    letters = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0).inner
    trained = dataclasses.replace(make(context=24, size=0), tokenizer=tokenizer_lib.Tokenizer(letters))
    engine, real, masks = Engine(trained, slots=3), constrain.Matcher._compute, []
    free = Request(ask(trained, "ab"), None, 6, DRAWN, 5)
    held = dataclasses.replace(free, grammar=constrain.regex("a{5}"))
    plain = together(engine, [free])[0]

    def fails(matcher):
        masks.append(matcher.grammar)
        if masks[-1] == held.grammar and masks.count(held.grammar) == 3:
            raise config.InputError("too many states")
        return real(matcher)

    monkeypatch.setattr(constrain.Matcher, "_compute", fails)
    empty = dataclasses.replace(free, grammar=constrain.regex("a{0}"))
    other, asked, nothing = (Asked(engine, request) for request in (free, held, empty))
    assert other.said() == plain._replace(cached=other.said().cached)
    assert asked.said().finish == "error" and len(asked.said().tokens) == 1
    assert nothing.said()[:2] == ("", ()) and nothing.said().finish == "stop"
    alone = decode.generate(trained, [empty.prompt], None, 6, DRAWN, [5], grammar=empty.grammar)[0]
    assert (alone.tokens, alone.finish) == ((), "stop")
    engine.close()


@pytest.mark.parametrize("change, named", [
    ({"max_new_tokens": -1}, "max_new_tokens=-1"), ({"logprobs": 21}, "from 0 to 20"),
    ({"sampling": sample.Sampling(guidance_scale=2.0)}, "guidance_scale"),
    ({"sampling": sample.Sampling(logit_bias=((99, 1.0),))}, "the token 99"),
])
def test_bad_requests_are_refused_at_the_door(running, trained, change, named):
    with pytest.raises(config.InputError, match=named):
        running.submit(dataclasses.replace(Request(ask(trained, "a")), **change), print)


def test_a_prompt_over_the_context(running, trained):
    with pytest.raises(config.InputError, match=f"context is {trained.layout.context}"):
        running.submit(Request(ask(trained, "a" * 40)), print)


def test_stats_add_up(trained):
    engine = Engine(trained, slots=2)
    answers = together(engine, [Request(ask(trained, "ab"), None, n, DRAWN, n) for n in (1, 2, 5)])
    stats = engine.stats()
    engine.close()
    assert stats["tokens_total"] == sum(len(answer.tokens) for answer in answers)
    assert stats["prompt_tokens_total"] == 3 * len(ask(trained, "ab")) and stats["running"] == 0
    assert sum(n for name, n in stats.items() if name.startswith("finish_")) == 3


def test_warm_of_a_model_that_reads_a_source():
    """Its steps have a memory, whatever the text."""
    trained = make(end=tiny.SPECIAL["<end>"], **tiny.FUSIONS["encoder_decoder"])
    engine = Engine(trained, slots=2)
    assert len(list(engine.warm())) > 3
    request = Request(ask(trained, "ab"), None, 5, DRAWN, 3)
    found = together(engine, [request])[0]
    engine.close()
    assert found.tokens == decode.generate(trained, [request.prompt], None, 5, DRAWN, [3])[0].tokens


@pytest.mark.parametrize("name", tiny.fusions("concat", "cross_attention"))
def test_warm_compiles_what_texts_need(name):
    trained = make(end=tiny.SPECIAL["<end>"], **tiny.FUSIONS[name])
    engine = Engine(trained, slots=2)
    list(engine.warm())
    programs = (prefix._read, prefix._put, slots_lib._chosen, slots_lib.advance, slots_lib._pasted, slots_lib._seated,
                slots_lib._cleared, slots_lib._repaged, slots_lib._reseated)  # fmt: skip
    made = [f._cache_size() for f in programs]
    for n in (1, 3, 9):
        for sampling in (sample.Sampling(), DRAWN):
            together(engine, [Request(prompts.plain([5] * n), None, 12, sampling)] * 2)
    engine.close()
    assert made == [f._cache_size() for f in programs]


def test_idle_rows_stay_finite(trained):
    """Rows that nobody has go on; what they hold must not become NaN, which 0 times something is, too."""
    state = slots_lib.empty(trained.model, 2, 2, 8)
    table = np.array([[0], [attention.NOBODY]], np.int32)
    for _ in range(20):
        state = slots_lib.advance(trained.model, trained.params, state, jnp.array([3, -1]), table)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.hidden, state.cache)))
    assert not state.cache.k[0][1].any()  # a row without pages writes nowhere
