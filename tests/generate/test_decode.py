"""Prefill and cached decode against the full forward pass, and `generate` in every way that it can end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.data import chat, packing
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.eval import common
from gpt4v_jax.generate import beam, constrain, decode, sample
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.interop import hf
from gpt4v_jax.model import attention
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import step as step_lib
from gpt4v_jax.training.workdir import Trained
from tests import tiny
from tests.interop import tiny as theirs

LETTERS = "abcdefghijklmnoprstuvwxy "  # all but q and z: as many as the tiny vocabulary has room for
FREE = sample.Sampling(temperature=1.0)
ROOM = 8  # tokens of the longest answer and <end>

forward = jax.jit(step_lib.forward, static_argnums=0)
step = jax.jit(decode.step, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, batch, cache):
    """-> (logits of every position of the batch, cache)."""
    hidden, cache, _ = model.apply({"params": params}, batch, cache)
    return model.apply({"params": params}, hidden, method="logits"), cache


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of letters: one token each, after the special ones."""

    special: dict

    def encode(self, text):
        return [len(tiny.SPECIAL) + LETTERS.index(letter) for letter in text]

    prompt = encode

    @property
    def ends(self):
        return (self.special["<end>"],)

    def decode(self, ids):
        return "".join(LETTERS[i - len(tiny.SPECIAL)] for i in ids if i >= len(tiny.SPECIAL))


def make(end: int = -1, **model) -> Trained:
    """A random model. `end`: the token that is <end>; -1 is one that is never drawn."""
    module, params = tiny.make_model(tiny.make_config(**model))
    run = config.Config(model=module.config, data=tiny.DATA, eval=config.Eval(batch=4))
    tokenizer = Letters(tiny.SPECIAL | {"<end>": end})
    return Trained(run, module.layout, tokenizer, None, module, params, 0)


def fill(trained, *documents, **layout):
    layout = dataclasses.replace(trained.layout, **layout)
    return packing.stack([packing.fill([document], tiny.reader(layout), layout) for document in documents])


def full_logits(trained, document):
    """-> [n, V] of one document alone."""
    return np.asarray(forward(trained.model, trained.params, fill(trained, document))[0, : len(document)])


def ask(trained, text: str, pictures=()):
    """-> the prompt; pictures: the keys of those that come before the question."""
    return prompts_lib.prompt(trained, text, [chat.Medium("image", key, (4, 4)) for key in pictures])


def cut(batch, start: int, stop: int, picture: bool):
    """Some positions of a batch with one picture; it need not lie in them."""
    names = ("tokens", "slot", "position", "document", "ar", "target", "weight")
    row = {name: getattr(batch, name)[:, start:stop] for name in names}
    at = np.where((batch.image.at >= start) & (batch.image.at < stop), batch.image.at - start, -1)
    return dataclasses.replace(batch, image=batch.image.replace(at=at) if picture else None, **row)


MODELS = {
    "concat": {},
    "prefix_lm": {"kind": "prefix_lm"},
    "learned": {"position": "learned"},
    "grouped": {"kind": "prefix_lm", "heads": 4, "kv_heads": 2, "qk_norm": True, "tied": False},
    "encoder": {"encoder": True},
}


def cached_decode_equals_the_full_forward(trained, text):
    document = tiny.document(text, trained.layout)
    whole, answer = full_logits(trained, document), int(text[-1])
    start = len(document) - answer - 1  # of the last answer's tokens and <end>
    prompt = chat.document(tiny.pieces(text)[:-1], tiny.SPECIAL, trained.layout)
    np.testing.assert_array_equal(prompt.tokens, document.tokens[:start])
    batch = fill(trained, prompt)
    logits, cache = decode.prefill(trained.model, trained.params, batch, trained.layout.context + ROOM)
    found = [logits[0]]
    for token in document.tokens[start:]:
        logits, cache = step(trained.model, trained.params, jnp.array([token]), cache)
        found.append(logits[0])
    assert np.ptp(whole) > 1, "the logits say something"
    np.testing.assert_allclose(found, whole[start - 1 :], atol=1e-5, rtol=1e-5)
    return float(np.abs(np.array(found) - whole[start - 1 :]).max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["I U3 A7", "I U2 A2 U3 A4", "I U1 A2 I U2 A3", "U4 A3 I U2 A3", "U2 A5"])
def test_cached_decode_equals_the_full_forward(name, text):
    cached_decode_equals_the_full_forward(make(**MODELS[name]), text)


# Make test has each kind in one of these two tests, `resampler` in the one between them; make soak has all in both.
@pytest.mark.parametrize("name", tiny.fusions("pooled", "q_former", "experts"))
def test_every_fusion_decodes_as_the_full_forward(name, shown):
    axes = 3 if list(tiny.FUSIONS).index(name) % 2 else 1
    trained = make(media=True, axes=axes, context=32, **tiny.FUSIONS[name])
    texts = ("I U2 A2 U3 A4", "V S5 U1 A4", "U1 S1 S7 A1 I U1 A1")
    off = max(cached_decode_equals_the_full_forward(trained, text) for text in texts)
    shown(f"{name}: cached against full, |logit difference|", f"{off:.1e}", "1e-05")


@pytest.mark.parametrize("kind", ["concat", "prefix_lm"])
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("text", ["V S5 U1 A4", "I U1 A2 V A3", "U1 S1 S7 A1 I U1 A1"])
def test_cached_decode_after_clips_and_sounds(text, axes, kind):
    """Over three axes what follows a medium stands behind its largest index, however many positions it has."""
    cached_decode_equals_the_full_forward(make(kind=kind, media=True, axes=axes), text)


@pytest.mark.parametrize("name", ["concat", "prefix_lm"])
def test_prefill_in_chunks_that_end_where_blocks_end(name):
    """A chunk that ends inside a block is another model: the rest of the block would be unseen."""
    trained = make(**MODELS[name])
    document = tiny.document("U3 A2 I U3 A3", trained.layout)
    (first, medium), = document.media
    patches = trained.layout.count("image", medium.shape)
    batch, whole, n = fill(trained, document), full_logits(trained, document), len(document)

    def chunked(*ends):
        cache = attention.empty_cache(trained.model.config.decoder, 1, n)
        found = []
        for start, stop in zip((0, *ends), (*ends, n), strict=True):
            part = cut(batch, start, stop, picture=start <= first < stop)
            logits, cache = extend(trained.model, trained.params, part, cache)
            found.append(logits[0])
        return np.concatenate(found)

    block = 5 if name == "prefix_lm" else 0  # the first question; in a causal stream it is no block
    np.testing.assert_allclose(chunked(first, first + patches, n - 2), whole, atol=1e-5, rtol=1e-5)
    if block:
        np.testing.assert_allclose(chunked(block, n - 2), whole, atol=1e-5, rtol=1e-5)
        assert np.abs(chunked(block - 2) - whole).max() > 0.1


@pytest.mark.parametrize("name", [
    name for name in tiny.fusions("cross_attention", "resampler")
    if isinstance(name, str) or not name.values[0].startswith(("q_former", "encoder_decoder"))  # they read it at once
])  # fmt: skip
def test_a_picture_in_a_later_chunk(name):
    """The cache's memory grows by it, or its vectors go into the stream behind what is there."""
    trained = make(**tiny.FUSIONS[name])
    document = tiny.document("I U2 A2 U1 I A3", trained.layout)
    (_, _), (second, _) = document.media
    batch, whole, n = fill(trained, document), full_logits(trained, document), len(document)
    cache, found = attention.empty_cache(trained.model.config.decoder, 1, n, trained.layout.axes), []
    for start, stop in ((0, second), (second, n - 2), (n - 2, n)):
        part = cut(batch, start, stop, picture=stop < n)
        logits, cache = extend(trained.model, trained.params, part, cache)
        found.append(logits[0])
    np.testing.assert_allclose(np.concatenate(found), whole, atol=1e-5, rtol=1e-5)


def test_decoding_ends_where_the_longest_answer_does():
    trained = make()
    prompts = [ask(trained, "ab"), ask(trained, "abc")]
    logits, cache, _ = decode.begin(trained, prompts, None, 16)
    past = sample.history([p.tokens for p in prompts], 16)
    keys, done, most = decode.keys_of((), 2), jnp.zeros(2, bool), jnp.array([3, 5])
    *_, past = decode.decode(trained.model, trained.params, logits, cache, past, keys, done, {}, limit=most)
    assert (past.length - past.prompt).tolist() == [5, 5]
    assert [len(a.tokens) for a in decode.generate(trained, prompts, max_new_tokens=18)] == [18, 18]


@pytest.mark.parametrize("name", tiny.fusions("concat", "prefix_lm", "cross_attention", "encoder_decoder"))
def test_a_batch_of_prompts_equals_each_alone(name, shown):
    trained = make(**tiny.FUSIONS[name])
    read = tiny.reader(trained.layout)
    prompts = [ask(trained, text, keys) for text, keys in (("hello you", [1]), ("ab", [0, 1]), ("x", []), ("to", [0]))]
    assert len({len(p) + len(p.source) for p in prompts}) == 4
    together = decode.generate(trained, prompts, read, 5, FREE, range(4))
    alone = [decode.generate(trained, [p], read, 5, FREE, [seed])[0] for seed, p in enumerate(prompts)]
    assert together == alone and len({answer.tokens for answer in alone}) == 4
    logits, _ = decode.prefill(trained.model, trained.params, fill(trained, *prompts), 32)
    single = [decode.prefill(trained.model, trained.params, fill(trained, prompt), 32)[0][0] for prompt in prompts]
    np.testing.assert_allclose(logits, single, atol=1e-5)
    shown(f"{name}: prompts in a batch against each alone, |logit difference|",
          f"{np.abs(logits - np.array(single)).max():.1e}", "1e-05")  # fmt: skip


def test_greedy_is_the_argmax_of_the_full_forward():
    trained = make(tied=False)  # with a tied head a random model repeats itself, and its argmax shows no error
    prompt = ask(trained, "abc", [0])
    answer = decode.generate(trained, [prompt], tiny.reader(trained.layout), max_new_tokens=6)[0]
    assert len(set(answer.tokens)) > 3
    tokens = prompt.tokens
    for token in answer.tokens:
        ar = np.append(prompt.ar, np.ones(len(tokens) - len(prompt), bool))
        document = chat.shifted(tokens.astype(np.int32), np.zeros(len(tokens), bool), ar, prompt.media)
        assert full_logits(trained, document)[-1].argmax() == token
        tokens = np.append(tokens, token)
    assert answer.text == trained.tokenizer.decode(answer.tokens)


def test_media_stand_where_the_prompt_says():
    trained = make()
    pictures = [chat.Medium("image", key, (4, 4)) for key in (0, 1)]
    size, id = trained.layout.count("image", (4, 4)), trained.tokenizer.special["<image>"]

    def laid(text):
        """-> the keys of the pictures and the words, in their order."""
        document = prompts_lib.prompt(trained, text, pictures)
        at, out = dict(document.media), []
        for t, token in enumerate(document.tokens):
            out += [at[t].key] if t in at else [] if token == id else [trained.tokenizer.decode([token])]
        assert (document.tokens == id).sum() == 2 * size
        return "".join(map(str, out))

    assert laid("ab") == "01ab" and laid("a<image>b\n<image>") == "a0b1" and laid("<image>a<image>b") == "0a1b"
    (medium,) = pictures[:1]
    assert prompts_lib._parts("a<audio>b", [medium]) == [medium, "a<audio>b"], "no sound is given: plain text"
    with pytest.raises(config.InputError, match="1 <image> in the prompt, and 2 files"):
        laid("a<image>b")


def test_the_picture_matters():
    trained = make()
    index = np.indices((1, 2, 2)).reshape(3, -1).T

    def read(medium):  # black, or white
        return [(np.full((4, 12), 255 * medium.key, np.uint8), index)]

    answers = decode.generate(trained, [ask(trained, "abc", [key]) for key in (0, 1)], read, 8)
    assert answers[0].tokens != answers[1].tokens


# ---- how an answer ends


@pytest.fixture(scope="module")
def drawn():
    """-> (40 tokens that a model draws when nothing stops it, in two blocks and a half; which they are)."""
    trained = make(context=64)
    prompt = ask(trained, "abc")
    return prompt, decode.generate(trained, [prompt], None, 40, FREE, seeds=[3])[0]


def test_max_new_tokens(drawn):
    prompt, long = drawn
    assert len(long.tokens) == 40 and long.finish == "length" and len(set(long.tokens)) > 5
    for n in (1, 15, 16, 17):
        answer = decode.generate(make(context=64), [prompt], None, n, FREE, seeds=[3])[0]
        assert (answer.tokens, answer.finish) == (long.tokens[:n], "length")


def test_end_token(drawn):
    prompt, long = drawn
    for at in (0, 15, 30):
        end = long.tokens[at]
        at = long.tokens.index(end)
        trained = make(end=end, context=64)
        answer = decode.generate(trained, [prompt], None, 40, FREE, seeds=[3])[0]
        assert (answer.tokens, answer.finish) == (long.tokens[:at], "stop")
        assert answer.text == trained.tokenizer.decode(long.tokens[:at])


def test_stop_strings(drawn):
    """Also one that begins in a block of tokens and ends in the next; the first of several in the text wins."""
    prompt, long = drawn
    for start in (2, decode.BLOCK - 1):
        stop = long.text[start : start + 3]
        other = long.text[start + 5 : start + 8]
        answer = decode.generate(make(context=64), [prompt], None, 40, FREE, seeds=[3], stop_strings=[other, stop])[0]
        at = min(map(long.text.index, (stop, other)))
        assert (answer.text, answer.finish) == (long.text[:at], "stop")
        said = make().tokenizer.decode(answer.tokens)
        assert any(said.endswith(s) and s not in said[:-1] for s in (stop, other)), "ends with what stops it"
    nothing = decode.generate(make(context=64), [prompt], None, 40, FREE, seeds=[3], stop_strings=["zzzzz"])[0]
    assert nothing == long


def test_a_row_ends_and_the_others_go_on(drawn):
    prompt, long = drawn
    end = long.tokens[20]
    trained = make(end=end, context=64)
    seeds = [3, 4, 5, 6]
    together = decode.generate(trained, [prompt] * 4, None, 40, FREE, seeds)
    assert together == [decode.generate(trained, [prompt], None, 40, FREE, [seed])[0] for seed in seeds]
    assert len({len(answer.tokens) for answer in together}) > 1


def test_a_full_context_ends_the_answer():
    trained = make(context=24)
    prompts = [ask(trained, "abc"), ask(trained, "abcdefghij", [0])]
    answers = decode.generate(trained, prompts, tiny.reader(trained.layout), max_new_tokens=500)
    assert [len(answer.tokens) + len(prompt) for answer, prompt in zip(answers, prompts, strict=True)] == [24, 24]
    assert [answer.finish for answer in answers] == ["length", "length"]


def test_seeds():
    trained = make()
    prompt, other = ask(trained, "abc"), ask(trained, "wholly else")
    a, b, c = decode.generate(trained, [prompt] * 3, None, 12, FREE, seeds=[1, 2, 1])
    assert a == c and a.tokens != b.tokens
    # Neither the neighbours nor the place in the batch matter.
    assert decode.generate(trained, [other, prompt], None, 12, FREE, seeds=[9, 2])[1] == b


# ---- conversations


def test_conversation():
    """One user's turn is the prompt of a question; what is there of earlier answers is as in training."""
    trained = make(context=48)
    picture = chat.Medium("image", 0, (4, 4))
    one = prompts_lib.conversation(trained, [("user", [picture, "abc"])])
    np.testing.assert_array_equal(one.tokens, ask(trained, "abc", [0]).tokens)
    turns = [("system", ["xy"]), ("user", ["abc"]), ("assistant", ["de"]), ("user", ["f", picture])]
    found = prompts_lib.conversation(trained, turns)
    roles = (("user", "xyabc"), ("assistant", "de"), ("user", "f"))
    pieces = [chat.Piece(role, trained.tokenizer.encode(text)) for role, text in roles]
    pieces.append(chat.Piece("user", medium=picture))
    expected = chat.document(pieces, tiny.SPECIAL | {"<end>": -1}, trained.layout)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.ar, expected.ar)
    assert not found.weight.any() and found.media == expected.media


@pytest.mark.parametrize("turns, named", [
    ([], "the last turn must be the user's"), ([("user", ["a"]), ("assistant", ["b"])], "the last turn must be"),
    ([("assistant", ["b"]), ("user", ["a"])], "turn 1 is the assistant's, and no user's is before it"),
    ([("user", ["a"]), ("asistant", ["b"])], "role='asistant' .*did you mean 'assistant'"),
    ([("user", ["a"]), ("assistant", [chat.Medium("image", 0, (4, 4))]), ("user", ["a"])], "turn 2 .* has a medium"),
    ([("system", ["a"])], "the last turn must be"), ([("user", [])], "turn 1 is empty"),
])  # fmt: skip
def test_turns_that_are_no_conversation(turns, named):
    """An empty answer is one, for models give such ones."""
    found = prompts_lib.conversation(make(), [("user", ["a"]), ("assistant", [""]), ("user", ["b"])])
    assert (found.tokens == tiny.SPECIAL["<user>"]).sum() == 2
    with pytest.raises(config.InputError, match=named):
        prompts_lib.conversation(make(), turns)


# ---- what else is asked for


def test_logprobs():
    """Those of the model itself, whatever it was drawn by; a greedy token's is the same float as the best one's."""
    trained = make(context=64)
    prompt = ask(trained, "abc")
    drawn = decode.generate(trained, [prompt], None, 20, sample.Sampling(0.5, top_k=4), [3], logprobs=5)[0]
    greedy, plain = (decode.generate(trained, [prompt], None, 20, logprobs=n)[0] for n in (2, 0))
    assert greedy.logprobs == tuple(best[0][1] for best in greedy.top)
    assert greedy.tokens == tuple(best[0][0] for best in greedy.top)
    assert plain.logprobs == greedy.logprobs and plain.top == ((),) * 20
    document = prompts_lib.plain([*prompt.tokens, *drawn.tokens])
    nats = jax.nn.log_softmax(full_logits(trained, document))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(drawn.logprobs, nats[np.arange(20), list(drawn.tokens)], atol=1e-5)
    np.testing.assert_array_equal([[t for t, _ in best] for best in drawn.top], np.argsort(-nats, axis=1)[:, :5])
    assert decode.generate(trained, [prompt], None, 20)[0] == dataclasses.replace(greedy, logprobs=(), top=())


def test_output_scores_are_what_tokens_were_chosen_by():
    trained = make(context=64)
    rules = sample.Sampling(no_repeat_ngram_size=1, logit_bias=((9, 1.5),))  # else it repeats one letter
    answer = decode.generate(trained, [ask(trained, "abc")], None, 20, rules, output_scores=True)[0]
    assert answer.scores.shape == (20, tiny.VOCAB) and tuple(answer.scores.argmax(1)) == answer.tokens
    assert decode.generate(trained, [ask(trained, "abc")], None, 20)[0].tokens != answer.tokens


def test_guidance():
    """Scale 0 is the second prompt's model. A picture may be in one prompt alone."""
    trained = make(context=48)
    with_picture, without = ask(trained, "abc", [0]), ask(trained, "abc")
    read = tiny.reader(trained.layout)

    def say(prompt, *negative, scale=1.0):
        rules = sample.Sampling(guidance_scale=scale)
        return decode.generate(trained, [prompt], read, 12, rules, negative=negative, output_scores=True)[0]

    first, second = say(with_picture).tokens, say(without).tokens
    assert say(with_picture, without, scale=0.0).tokens == second != first
    nats = [jax.nn.log_softmax(full_logits(trained, prompt)[-1]) for prompt in (with_picture, without)]
    scores = say(with_picture, without, scale=2.5).scores[0]
    np.testing.assert_allclose(scores, 2.5 * nats[0] - 1.5 * nats[1], atol=1e-4)


def test_logits_processors_come_last():
    """They read the history: here what follows the prompt is its tokens backwards."""
    trained = make(context=48)
    prompt = ask(trained, "abcdef")

    def backwards(past, logits):
        at = jnp.maximum(2 * past.prompt - past.length - 1, 0)
        return jnp.where(jnp.arange(tiny.VOCAB) == past.tokens[jnp.arange(len(at)), at][:, None], logits, -jnp.inf)

    answer = decode.generate(trained, [prompt], None, len(prompt), logits_processor=[backwards])[0]
    assert answer.tokens == tuple(prompt.tokens[::-1])


@pytest.mark.parametrize("end", [7, -1], ids=["end token", "none"])
def test_a_grammar(end):
    """Every drawn answer is one of the choices, each comes about; a row does not depend on its neighbours. Without an
    end token "ab" cannot say that it is one, for "abc" may follow."""
    trained = make(context=64, size=0)
    tokenizer = tokenizer_lib.train("char", ["".join(sorted(LETTERS))], 0)
    letter = tokenizer.token(end) if end >= 0 else "none"
    tokenizer = tokenizer_lib.Tokenizer(tokenizer.inner, (letter,))
    trained = dataclasses.replace(trained, tokenizer=tokenizer)
    words = [word for word in ("abc", "abd", "ab", "xy", "s") if letter not in word]
    prompts = [prompts_lib.prompt(trained, text) for text in ("ab", "stu", "a bc d")]
    grammar = constrain.choices(words)

    def say(prompts, seeds, **more):
        return decode.generate(trained, prompts, None, 8, sample.Sampling(3.0), seeds, grammar=grammar, **more)

    together = say(prompts, [1, 21, 41], num_return_sequences=12)
    assert {answer.text for answer in together} == set(words) - ({"ab"} if end < 0 else set())
    assert {answer.finish for answer in together} == {"stop"}
    assert together[12:14] == say(prompts[1:2], [21], num_return_sequences=2)
    assert all(trained.tokenizer.decode(answer.tokens) == answer.text for answer in together)


def test_a_row_that_may_say_nothing_more_ends():
    """After each token once none is left; the other laws, or a grammar, may leave none at once."""
    trained, prompt = make(context=64), prompts_lib.plain([8, 9])
    once = sample.Sampling(no_repeat_ngram_size=1)
    answer = decode.generate(trained, [prompt], None, 40, once, output_scores=True)[0]
    assert answer.finish == "forbidden" and sorted([8, 9, *answer.tokens]) == list(range(tiny.VOCAB))
    answers = beam.generate(trained, [prompt], None, 40, 2, once, num_return_sequences=2)
    assert [a.finish for a in answers] == ["forbidden"] * 2


def test_guided_answers_stay_in_the_context_of_the_longer_prompt():
    trained = make(context=24, position="learned")
    short, long = ask(trained, "a"), ask(trained, "a" * 16)
    rules = sample.Sampling(guidance_scale=2.0)
    answer = decode.generate(trained, [short], None, 40, rules, negative=[long], output_scores=True)[0]
    assert len(answer.tokens) == 24 - len(long) and np.isfinite(answer.scores).all()


OPTIONS = [
    {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 12},
    {"bad_words_ids": ((4,), (7, 2), (1, 6, 5))}, {"guidance_scale": 1.7},
    {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "bad_words_ids": ((3,),)},
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """-> (a small random llama as ours, as transformers')."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    imported, folder = theirs.imported("llama", eos_token_id=5), tmp_path_factory.mktemp("their") / "llama"
    imported = dataclasses.replace(imported, params=jax.tree.map(lambda x: 0.4 * x, imported.params))
    hf.save(imported, folder)
    module = GPT4V(imported.config, batch_lib.layout(imported.config, tiny.DATA))
    run = config.Config(model=module.config, data=tiny.DATA)
    trained = Trained(run, module.layout, Letters({"<end>": 5}), None, module, imported.params, 0)
    return trained, transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_greedy_answers_under_options_are_hugging_face_s(both, options):
    import torch

    trained, model = both
    found = []
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(6, 32, size=6)
        negative = [prompts_lib.plain(prompt[-1:])] if "guidance_scale" in options else []
        rules = sample.Sampling(**options)
        ours = decode.generate(trained, [prompts_lib.plain(prompt)], None, 20, rules, negative=negative)
        given = options | ({"bad_words_ids": [list(w) for w in rules.bad_words_ids]} if rules.bad_words_ids else {})
        there = model.generate(torch.tensor(prompt)[None], max_new_tokens=20, do_sample=False, pad_token_id=0, **given)
        expected = there[0, 6:].tolist()
        assert list(ours[0].tokens) == (expected[:-1] if expected[-1] == 5 else expected)
        found.append(ours[0].tokens)
    assert len(set(found)) > 4


@pytest.mark.parametrize("options", [
    {}, {"repetition_penalty": 1.5}, {"temperature": 0.6}, {"temperature": 2.0, "top_k": 9, "repetition_penalty": 1.5},
    {"top_p": 0.7}, {"min_p": 0.1, "min_new_tokens": 2},
], ids=",".join)  # fmt: skip
def test_output_scores_are_hugging_face_s(both, options):
    """Those of drawn tokens come behind temperature and cuts."""
    import torch

    trained, model = both
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(6, 32, size=6)
        law = sample.Sampling(do_sample=True, **options)
        ours = decode.generate(trained, [prompts_lib.plain(prompt)], None, 2, law, output_scores=True)[0].scores[0]
        there = model.generate(torch.tensor(prompt)[None], max_new_tokens=2, do_sample=True, pad_token_id=0,
                               return_dict_in_generate=True, output_scores=True, **{"top_k": 0} | options)  # fmt: skip
        np.testing.assert_allclose(ours, there.scores[0][0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 1, "min_new_tokens": 4}], ids=["plain", "laws"])
def test_beams_are_hugging_face_s(both, options):
    import torch

    trained, model = both
    prompts = [np.random.default_rng(seed).integers(6, 32, size=6) for seed in range(6)]
    ours = beam.generate(trained, [prompts_lib.plain(p) for p in prompts], None, 12, 3, sample.Sampling(**options),
                         length_penalty=0.5, num_return_sequences=2)  # fmt: skip
    there = model.generate(
        torch.tensor(np.array(prompts)), max_new_tokens=12, do_sample=False, pad_token_id=0, num_beams=3, **options,
        length_penalty=0.5, num_return_sequences=2, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    expected = [row[6:].tolist() for row in there.sequences]
    assert [list(a.tokens) for a in ours] == [row[: row.index(5)] if 5 in row else row for row in expected]
    np.testing.assert_allclose([a.sequences_score for a in ours], there.sequences_scores.numpy(), rtol=1e-4)
    assert {a.finish for a in ours} == {"stop", "length"}


# ---- bad input


@pytest.mark.parametrize("text", ["a" * 18, "a" * 40])
def test_a_prompt_longer_than_the_context(text):
    trained = make(context=24)
    prompt = ask(trained, text, [0])
    with pytest.raises(config.InputError, match=f"prompt has {len(text) + 6} positions.* context is 24"):
        decode.generate(trained, [ask(trained, "a"), prompt], tiny.reader(trained.layout))


def test_the_longest_prompt_that_fits():
    trained = make(context=24)
    answer = decode.generate(trained, [ask(trained, "a" * 17, [0])], tiny.reader(trained.layout))[0]
    assert len(answer.tokens) == 1


@pytest.mark.parametrize("values, named", [
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"stop_strings": ["a", ""]}, "stop string"),
    ({"sampling": sample.Sampling(guidance_scale=2.0)}, "guidance_scale=2.0 with 0 second prompts"),
])  # fmt: skip
def test_values_that_mean_nothing(values, named):
    trained = make()
    with pytest.raises(config.InputError, match=named):
        decode.generate(trained, [ask(trained, "a")], **values)


def test_an_empty_prompt_of_plain_text():
    trained = dataclasses.replace(make(size=0), tokenizer=Letters({}))
    with pytest.raises(config.InputError, match="prompt is empty"):
        ask(trained, "")
    assert ask(trained, "ab").tokens.tolist() == trained.tokenizer.encode("ab")


# ---- evaluation's short cut


@dataclasses.dataclass
class Asked:
    """Questions with answers, as a source."""

    trained: Trained
    questions: list[str]
    answers: list[tuple[int, ...]]

    def read(self, medium):
        return tiny.reader(self.trained.layout)(medium)

    def pieces(self, i):
        question = chat.Piece("user", self.trained.tokenizer.encode(self.questions[i]))
        picture = chat.Piece("user", medium=chat.Medium("image", i, (4, 4)))
        return [picture, question, chat.Piece("assistant", self.answers[i])]

    def document(self, epoch, i):
        return chat.document(self.pieces(i), self.trained.tokenizer.special, self.trained.layout)

    def needs(self, epoch):
        return np.array([chat.needs(self.pieces(i), self.trained.layout) for i in range(len(self.questions))])


@pytest.mark.parametrize("kind", ["concat", "prefix_lm"])
def test_one_forward_pass_scores_greedy_answers(kind):
    """common.score's `exact` is: greedy generation gives exactly the truth, then <end>."""
    words = ["a", "bc", "def", "ghij", "kl mn", "op", "p", "rst", "uvw", "xyx", "b a", "d"]
    def greedy(end):
        trained = make(end=end, kind=kind, tied=False)
        prompts = [ask(trained, word, [i]) for i, word in enumerate(words)]
        return trained, decode.generate(trained, prompts, tiny.reader(trained.layout), 8)

    free = [answer.tokens[:6] for answer in greedy(-1)[1]]
    ends = [token for tokens in free for token in set(tokens) - {tokens[0]} if token >= len(tiny.SPECIAL)]
    trained, found = greedy(max(sorted(set(ends)), key=ends.count))  # <end>: a token of many answers, not their first
    truths = [answer.tokens[:6] for answer in found]
    for i in range(0, len(truths), 3):  # wrong in one token, or by one token too many
        wrong = (*truths[i][:-1], 7 + (truths[i][-1] - 6) % 25) if i % 2 and truths[i] else (*truths[i], 7)
        truths[i] = wrong
    subject = common.Subject(trained.run, trained.layout, trained.tokenizer, sharding.make_mesh(config.Mesh()),
                             jax.jit(step_lib.make_eval_step(trained.model)), trained.params, None, "test")  # fmt: skip
    exact = common.score(subject, Asked(trained, words, truths))[2]
    expected = [answer.finish == "stop" and answer.tokens == truth
                for answer, truth in zip(found, truths, strict=True)]  # fmt: skip
    assert 2 <= sum(expected) < len(words) - 1, "some are right and some are wrong"
    assert exact.tolist() == expected


def test_an_encoder_that_reads_nothing():
    """Plain text under encoder_decoder has no source: what is written is what the full forward says."""
    trained = make(**tiny.FUSIONS["encoder_decoder"])
    prompt = prompts_lib.plain([8, 9])
    answer = decode.generate(trained, [prompt], None, 3)[0]
    document = prompts_lib.plain([8, 9, *answer.tokens])
    np.testing.assert_array_equal(full_logits(trained, document)[1:4].argmax(-1), answer.tokens)
