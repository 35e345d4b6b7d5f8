"""What is taken from a document to be learnt: shares, targets, and that the mask law hides what is to be said."""

import dataclasses
import string

import jax
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat, files, mixture, objectives, packing, pipeline, sources
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.data.objectives import Task
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import objectives as losses
from gpt4v_jax.training import step as step_lib
from tests import tiny
from tests.data.test_media import png

ALL = config.OBJECTIVES
DATA = config.Data(name="pictures", objectives=tuple(f"{kind}={kind}" for kind in ALL), image=config.Budget(3))
TOKENIZER = tokenizer_lib.train("byte", [], 0, extra=objectives.special_tokens(DATA, config.Objective(), 48))
WORDS = set(TOKENIZER.words().tolist())
BLOCK = config.Backbone(depth=1, width=16, heads=2, hidden=32)
MODEL = config.Model(
    vocab=TOKENIZER.vocab, context=48, init_std=0.3, image=config.Image(size=4, patch=2),
    backbone=dataclasses.replace(BLOCK, pattern=("cross",)), source=BLOCK,
)  # fmt: skip
LAYOUT = batch_lib.layout(MODEL, DATA)
FORWARD = jax.jit(step_lib.forward, static_argnums=0)
TEXT = (string.ascii_lowercase + " ") * 40


def task(kind, seed=3, **changes) -> Task:
    return Task(kind, config.Objective(**changes), TOKENIZER, seed, 48)


def text_document(n=1000, seed=0) -> chat.Document:
    ids = np.random.default_rng(seed).choice(sorted(WORDS), n + 1).astype(np.int32)
    ones = np.ones(n, bool)
    return chat.Document(ids[:-1], ids[1:], ones.astype(np.float32), ones, trained=ones)


def test_masked_shares():
    """Of 10,000 tokens 15 % are chosen, exactly; of those 80 % masked, 10 % another token, 10 % as they were."""
    document = text_document(10_000)
    made = task("masked")(document, 0, 0)
    chosen = made.weight > 0
    assert chosen.sum() == 1500 and set(made.weight) == {0, 1} and not made.ar.any()
    np.testing.assert_array_equal(made.target, document.tokens)
    np.testing.assert_array_equal(made.tokens[~chosen], document.tokens[~chosen])
    is_mask, same = made.tokens[chosen] == TOKENIZER.mask, (made.tokens == document.tokens)[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.03 and abs(same.mean() - 0.1) < 0.025
    other = made.tokens[chosen][~is_mask & ~same]
    assert set(other.tolist()) <= WORDS and len(set(other.tolist())) > 50
    assert task("masked", masked=0.4)(document, 0, 0).weight.sum() == 4000


def test_the_choice_is_one_of_seed_epoch_and_document():
    document, one = text_document(200), task("masked")
    drawn = {one(document, e, i).tokens.tobytes() for e in range(3) for i in range(3)}
    assert len(drawn) == 9 and task("masked", seed=4)(document, 0, 0).tokens.tobytes() not in drawn
    assert one(document, 1, 2).tokens.tobytes() == task("masked")(document, 1, 2).tokens.tobytes()
    fixed = [task("masked", seed=seed)(document, 0, 0).tokens for seed in (None, 0)]
    np.testing.assert_array_equal(*fixed)


def talk(text="U4 I A3 U2 A1", answers_only=True):
    pieces = tiny.pieces(text)
    pieces = [dataclasses.replace(p, ids=tuple(id + 20 for id in p.ids)) for p in pieces]  # words of this tokenizer
    return chat.document(pieces, TOKENIZER.special, LAYOUT, answers_only)


def test_of_a_conversation_answers_are_masked():
    """Never media, turn markers or <end>; one at least, where there is an answer; the user's text where all counts."""
    for answers_only in (True, False):
        document = talk(answers_only=answers_only)
        may = np.isin(document.tokens, sorted(WORDS))
        may[1:5] &= not answers_only  # <user> and four of the user
        may[15:17] &= not answers_only
        chosen = sum(task("masked", masked=0.5)(document, e, 0).weight for e in range(60)) > 0
        np.testing.assert_array_equal(chosen, may)
    assert task("masked", masked=0.01)(talk(), 0, 0).weight.sum() == 1
    assert not task("masked")(talk("U3 I"), 0, 0).weight.any()


def test_the_user_s_text_is_trained_where_no_query_sees_it():
    text = "U2 I U1 A2 U2 A1"
    for kind in ("concat", "prefix_lm"):
        layout = batch_lib.layout(tiny.make_config(kind, context=48), tiny.DATA)
        document = chat.document(tiny.pieces(text), tiny.SPECIAL, layout, answers_only=False)
        learnt = document.tokens >= len(tiny.SPECIAL)
        if kind == "prefix_lm":
            learnt[:9] = False  # the prompt up to <assistant> is one block
        learnt |= (document.tokens == tiny.SPECIAL["<end>"])
        np.testing.assert_array_equal(document.weight, [*learnt[1:], 0])
        packing.fill([document], tiny.reader(layout), layout)
        given = [dataclasses.replace(p, trained=False) for p in tiny.pieces(text)]
        assert not chat.document(given, tiny.SPECIAL, layout, answers_only=False).weight.any()


def test_prefix():
    document, cuts = text_document(12), set()
    for i in range(200):
        made = task("prefix")(document, 0, i)
        cut = 12 - int(made.weight.sum()) + 1
        cuts.add(cut)
        np.testing.assert_array_equal(made.ar, [True] + [False] * (cut - 1) + [True] * (12 - cut))
        np.testing.assert_array_equal(made.weight, [0] * (cut - 1) + [1] * (13 - cut))
        np.testing.assert_array_equal((made.tokens, made.target), (document.tokens, document.target))
        packing.fill([made], None, LAYOUT)
    assert cuts == set(range(1, 12)), "every place, and something is left on both sides"


def test_span():
    """Source and stream together are the text; sentinels stand for each other; 15 % are taken, 3 tokens a span."""
    document, starts = text_document(48), set()
    sentinels = [TOKENIZER.id(f"<extra_id_{k}>") for k in range(2)]
    assert None not in sentinels and TOKENIZER.id("<extra_id_2>") is None
    for i in range(100):
        made = task("span")(document, 0, i)
        assert (len(made), len(made.source)) == task("span").lengths(48) == (7 + 2 + 1, 41 + 2)
        spans, at = {}, None
        for token in made.tokens[:-1].tolist():
            if token in sentinels:
                at = spans.setdefault(token, [])
            else:
                at.append(token)
        assert list(spans) == sentinels and made.tokens[-1] == TOKENIZER.special["<end>"]
        whole = [token for source in made.source for token in spans.get(source, [source])]
        np.testing.assert_array_equal(whole, document.tokens)
        np.testing.assert_array_equal(made.target[:-1], made.tokens[1:])
        np.testing.assert_array_equal(made.weight, [1] * 9 + [0])
        starts.add(made.source.index(sentinels[0]))
    assert len(starts) > 20


def test_what_an_objective_needs_is_said():
    plain = tokenizer_lib.train("byte", [], 0)
    for kind, token in (("masked", "<mask>"), ("span", "<extra_id_0>")):
        with pytest.raises(config.InputError, match=f"data.objective='{kind}' needs the token {token}"):
            Task(kind, config.Objective(), plain, 0, 48)
    with pytest.raises(config.InputError, match="is none of next_token, masked, span, prefix .did you mean 'masked'"):
        config.Data(objectives=("songci=maskd",))
    with pytest.raises(config.InputError, match="data.objectives='fsd' is none of fsdd, emoji .did you mean 'fsdd'"):
        mixture.entries(config.Data(mixture=("fsdd", "emoji"), objectives=("fsd=masked",)))
    one, both = (batch_lib.layout(dataclasses.replace(MODEL, **changes), DATA) for changes in (
        {"source": None, "backbone": BLOCK}, {"causal": False}))  # fmt: skip
    for kinds, layout, message in (
        (("span",), one, "needs an encoder"), (("prefix", "masked"), both, "'prefix' needs a causal stream"),
        (("masked",), LAYOUT, "model.source reads the text"),
    ):  # fmt: skip
        with pytest.raises(config.InputError, match=message):
            objectives.check(kinds, layout)
    narrow = dataclasses.replace(one, wide=False)
    assert narrow.reach == 3 and one.reach == 47
    with pytest.raises(config.InputError, match="a block of 12 positions, and a query sees 3 ahead"):
        packing.fill([task("masked")(text_document(12), 0, 0)], None, narrow)
    with pytest.raises(config.InputError, match="model.causal=False: such a model learns by .*'masked'"):
        packing.fill([text_document(12)], None, both)


def test_special_tokens_are_those_that_are_asked_for():
    assert objectives.special_tokens(config.Data(), config.Objective(), 512) == ()
    masked = objectives.special_tokens(config.Data(objective="masked"), config.Objective(), 512)
    for kind in ("char", "byte", "bpe", "wordpiece"):
        plain, made = (tokenizer_lib.train(kind, ["ab ba <mask>"], 300, extra=extra) for extra in ((), masked))
        assert plain.mask is None and made.mask == plain.vocab == made.vocab - 1
        assert made.encode("<mask>") == plain.encode("<mask>") and made.mask not in made.words()
        assert made.decode([made.mask]) == "" and plain.special == made.special
    spans = objectives.special_tokens(config.Data(objective="span", window=100), config.Objective(), 512)
    assert len(spans) == 1 + 5
    made = tokenizer_lib.train("char", ["ab"], 0, extra=spans)
    assert made.ends == (made.special["<end>"],) and made.id("<extra_id_4>") is not None


# ---- all of them in one run


def picture(text: str) -> dict:
    given = type("Given", (files.File,), {"read": lambda self: png(np.full((4, 4, 3), len(text), np.uint8))})
    return {"turns": [files.Turn("name", (given("image", ""), "what?"), text)]}


def records() -> dict:
    made = {kind: [{"text": TEXT}] for kind in ALL}
    return made | {"pictures": [picture("red" + "!" * i) for i in range(9)], "shown": [picture("ab")] * 3}


def mixed(data=DATA, layout=LAYOUT):
    data = dataclasses.replace(
        data, mixture=(*(f"{kind}: 0.2" for kind in ALL), "pictures: 2", "shown"), window=12,
        objectives=(*data.objectives, "shown=masked"),
    )  # fmt: skip
    return mixture.train_source(records(), data, TOKENIZER, layout, 0)


def test_a_row_holds_documents_of_every_objective():
    source = mixed()
    assert [part.task.kind for part in source.parts] == [*ALL, "next_token", "masked"]
    plan = packing.RowPlan(source.needs, LAYOUT, 0)
    kinds = [{source.parts[source.owner(i)].task.kind for i in row} for row in plan.epoch(0)]
    assert max(map(len, kinds)) >= 3 and set().union(*kinds) == set(ALL)
    for batch in pipeline.batches(source, plan, LAYOUT, 4, 0, 3):
        assert batch.weight.any(1).all()
    needs = source.needs(0)
    for i, need in enumerate(needs):
        document = source.document(0, i)
        assert (need[0], need[-1]) == (len(document), len(document.source))


def test_packed_equals_separate():
    """The losses of documents of every objective in one row are those of each in a row of its own."""
    source = mixed()
    model = GPT4V(MODEL, LAYOUT)
    params = jax.jit(lambda: step_lib.init_params(model, 0))()
    row = max(packing.RowPlan(source.needs, LAYOUT, 0).epoch(0),
              key=lambda row: len({source.parts[source.owner(i)].task.kind for i in row}))  # fmt: skip
    documents = [source.document(0, i) for i in row]
    rows = [documents, *([doc] for doc in documents)]
    batch = packing.stack([packing.fill(row, source.read, LAYOUT) for row in rows])
    scores = jax.jit(step_lib.token_scores, static_argnums=0)(model, params, batch)
    nats = np.asarray(scores.nats * batch.weight)
    for number, document in enumerate(documents, 1):
        alone, together = nats[number, : len(document)], nats[0][batch.document[0] == number]
        assert alone.any() == bool(document.weight.any())
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_trained_position_does_not_see_its_target():
    """By gradient: what a position outputs does not move with the input at its target's place, unless that is itself
    and was left as it is; and a masked document's positions see all of it."""
    source, model = mixed(), GPT4V(MODEL, LAYOUT)
    params = jax.jit(lambda: step_lib.init_params(model, 0))()
    for kind in ALL:
        made = next(part for part in source.parts if part.task.kind == kind).document(0, 1)
        batch = packing.stack([packing.fill([made], source.read, LAYOUT)])

        def outputs(tokens, batch=batch):
            return np.asarray(FORWARD(model, params, batch.replace(tokens=tokens)))[0]

        before, n = outputs(batch.tokens), len(made)
        for t in range(n):
            other = batch.tokens.copy()
            other[0, t] = 20 + (other[0, t] + 1) % 200
            moved = np.abs(outputs(other) - before).max(-1)[:n] > 0
            if kind == "masked":
                assert moved.all()
            else:
                assert not (moved[:t] & (made.weight[:t] > 0)).any()
                assert moved[t:].all()


def test_a_masked_document_is_one_to_a_causal_and_to_a_bidirectional_model():
    """Chunks of queries meet all keys of the row, too: it is longer than one chunk."""
    outputs = []
    for causal in (True, False):
        model = config.Model(vocab=TOKENIZER.vocab, context=90, causal=causal, init_std=0.3, backbone=BLOCK)
        data = dataclasses.replace(DATA, objectives=("masked=masked",))
        layout = batch_lib.layout(model, data if causal else config.Data())
        batch = packing.stack([packing.fill([task("masked")(text_document(80), 0, 0)], None, layout)])
        module = GPT4V(model, layout)
        outputs.append(FORWARD(module, jax.jit(lambda m=module: step_lib.init_params(m, 0))(), batch))
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_an_unshifted_target_gives_the_plain_cross_entropy():
    source = next(part for part in mixed().parts if part.task.kind == "masked")
    batch = packing.stack([packing.fill([source.document(0, i)], source.read, LAYOUT) for i in range(3)])
    logits = np.random.default_rng(0).normal(size=(3, 48, MODEL.vocab)).astype(np.float32)
    total, weight = losses.tokens(losses.of_logits(logits, batch.target), batch)["loss"]
    original = [text_of(source, i) for i in range(3)]
    log_p = jax.nn.log_softmax(logits)
    expected = -sum(log_p[b, t, original[b][t]] for b, t in np.argwhere(batch.weight > 0))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == (batch.weight > 0).sum() == 6


def text_of(source, i) -> list[int]:
    """The window's own tokens, which the source has them from."""
    start = source._offset(0) + 12 * i
    return TOKENIZER.encode(TEXT)[start : start + 12]


def test_evaluation_has_next_tokens():
    """Whatever a run learns by: losses of a text stay comparable."""
    for kind in ALL:
        data = dataclasses.replace(DATA, objective=kind)
        document = sources.from_records(records()[kind], data, TOKENIZER, LAYOUT, None).document(0, 0)
        assert document.weight.all() and document.ar.all() and not document.source
    with pytest.raises(config.InputError, match="'span' is for plain text, and pictures holds conversations"):
        sources.from_records(records()["pictures"], dataclasses.replace(DATA, objective="span"), TOKENIZER, LAYOUT, 0,
                             objective=config.Objective())  # fmt: skip
