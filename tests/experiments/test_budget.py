"""Every kind of budget is met within 2 %, or it is said how near one can come; counts are those of what is read."""

import dataclasses

import pytest

from experiments import budget, variants
from gpt4v_jax import config, sharding, train
from gpt4v_jax.data import pipeline


@pytest.fixture
def asked(digits_world):
    """-> asked(variants, common) -> their configs, of configs/tiny.py."""

    def make(overrides, **common):
        return variants.configs("configs/tiny.py", overrides, {"data.cache": digits_world.cache, "data.threads": 0,
                                                               "steps": 300, **common}, {})  # fmt: skip

    return make


VARIANTS = {
    "small": {},
    "wide": {"model.backbone.width": 32},
    "deep": {"model.backbone.depth": 5},
    "patch_6": {"model.image.patch": 6},
    "turns": {"data.turns": 5, "batch": 5},
}


@pytest.mark.parametrize("match", ["flops", "text_tokens", "images", "steps", "params", "none"])
def test_every_match(asked, match):
    overrides = VARIANTS if match != "params" else {
        "small": {"model.backbone.width": 256, "model.backbone.depth": 1},
        "deep": {"model.backbone.width": 256, "model.backbone.depth": 2, "model.backbone.activation": "swiglu"},
        "coarse": {"model.backbone": {"heads": 16, "width": 96, "depth": 2}, "model.axes": 3},
    }  # fmt: skip
    given = asked(overrides)
    solved = budget.solve(given, match, "small", dict.fromkeys(given, False))
    first = solved["small"]
    assert (first.run,) == (first.asked,) == given["small"] and first.off == 0
    for name, one in solved.items():
        if match == "none":
            assert one.run == one.asked
            continue
        value = getattr(one.budget, match)
        assert value == pytest.approx(getattr(first.budget, match), rel=0.02), name
        assert one.off == value / getattr(first.budget, match) - 1
        differs = {key.rpartition(".")[2] for key in config.differences(one.asked, one.run)}
        assert differs <= ({"steps"} if match != "params" else {"width", "head_dim", "hidden"}), name
        heads = one.run.model.backbone.heads
        assert heads == one.asked.model.backbone.heads and one.run.model.backbone.width % heads == 0
        assert (one.run.model.backbone.hidden == 4 * one.run.model.backbone.width) == (name != "coarse")
    if match == "params":
        assert solved["deep"].run.model.backbone.width < 256


def test_counts_are_those_of_the_batches(asked):
    """Of rows in the first epoch exactly; a picture is counted once however many patches it has."""
    [run] = asked({"a": {"model.image.patch": 6, "steps": 3}})["a"]
    found = budget.budget(run)
    stream = train.open_stream(run, None, sharding.make_mesh(config.Mesh()), resumes=False)
    text = images = 0
    for batch in pipeline.batches(stream.source, stream.plan, stream.layout, run.batch, 0, run.steps):
        text += int(((batch.document > 0) & (batch.slot < 0)).sum())
        images += int((batch.image.at >= 0).sum())
    assert (found.text_tokens, found.images) == (text, images)
    assert found.positions == 3 * run.batch * run.model.context
    rows = budget.read(run)
    epoch = len(rows.text) - 1
    assert rows.before(2 * epoch + 1) == (2 * rows.text[-1] + rows.text[1], 2 * rows.images[-1] + rows.images[1])


def test_what_cannot_be_met(asked):
    given = asked({"small": {}, "wide": {"model.backbone.width": 32}, "vast": {"model.backbone.width": 640}}, steps=4)
    with pytest.raises(config.InputError) as error:
        budget.solve(given, "flops", "small", dict.fromkeys(given, False))
    said = str(error.value)
    assert "cannot be met within 2%" in said
    for name, (run,) in list(given.items())[1:]:
        steps = {"wide": 2, "vast": 1}[name]
        off = budget.budget(dataclasses.replace(run, steps=steps)).flops / budget.budget(*given["small"]).flops - 1
        assert f"{name}: steps={steps:,} is the nearest, and its flops are {off:+.1%} of small's" in said, said
    kept = budget.solve(given, "flops", "small", {"small": False, "wide": True, "vast": True})
    assert kept["vast"].own and (kept["vast"].run,) == given["vast"] and kept["vast"].off > 1
    with pytest.raises(config.InputError, match="this size reads no data"):
        budget.solve(given, "images", "small", dict.fromkeys(given, False), data=False)
    found = budget.budget(*given["small"], data=False)
    assert (found.text_tokens, found.images) == (None, None) and found.flops > 0


@pytest.mark.parametrize("match", ["flops", "text_tokens", "images", "steps"])
def test_stages_share_a_budget(asked, match):
    """Whatever is matched is that of all stages; the last one's steps are solved for what is left."""
    align = {"steps": 100, "data.turns": 0}
    given = asked({"plain": {}, "staged": {"before": ({"steps": 50, "batch": 2}, align), "data.turns": 1}})
    solved = budget.solve(given, match, "plain", dict.fromkeys(given, False))
    one, target = solved["staged"], getattr(solved["plain"].budget, match)
    each = [budget.budget(run) for run in (*one.before, dataclasses.replace(one.run, init_from=config.InitFrom()))]
    assert one.before == given["staged"][:2] and list(one.spent) == each[:2] and one.run.steps != 300
    assert getattr(one.budget, match) == sum(getattr(b, match) for b in each) == pytest.approx(target, rel=0.02)
    assert one.budget.flops == sum(b.flops for b in each) and one.budget.params == each[-1].params
    assert one.off == getattr(one.budget, match) / target - 1


def test_stages_that_take_too_much(asked):
    given = asked({"plain": {}, "staged": {"before": {"steps": 310}}})
    fixed = dict.fromkeys(given, False)
    with pytest.raises(config.InputError, match="staged: its stages before the last take 103% of the flops of plain"):
        budget.solve(given, "flops", "plain", fixed)
    with pytest.raises(config.InputError, match="match='params' changes the model"):
        budget.solve(given, "params", "plain", fixed)
    kept = budget.solve(given, "flops", "plain", fixed | {"staged": True})["staged"]
    assert kept.own and kept.run == given["staged"][1] and kept.off == pytest.approx(310 / 300)


def test_width_keeps_what_was_said_of_heads_and_hidden(asked):
    [run] = asked({"a": {"model.backbone": {"head_dim": 10, "hidden": 48}}})["a"]
    wide = budget.with_width(run, 24).model.backbone
    assert (wide.width, wide.head_dim, wide.hidden) == (24, 10, 48)
    wide = budget.with_width(*asked({"a": {}})["a"], 24).model.backbone
    assert (wide.width, wide.head_dim, wide.hidden) == (24, 12, 96)


def test_text_that_an_encoder_reads_counts(asked):
    """The same documents have the same text, wherever it stands; of media neither patches nor anchors count."""
    given = asked({kind: {"model.fusion.kind": kind} for kind in ("concat", "cross_attention", "encoder_decoder")})
    text = {name: budget.read(runs[-1] if isinstance(runs, tuple) else runs).text[-1] for name, runs in given.items()}
    assert len(set(text.values())) == 1, text


def test_lora_counts_as_parameters_and_what_is_trained_is_told(asked):
    given = asked({"whole": {}, "lora": {"lora.rank": 2}, "frozen": {"optim.frozen": "^backbone/"}})
    whole, lora, frozen = (budget.budget(*runs) for runs in given.values())
    assert whole.trained == whole.params == frozen.params > frozen.trained > 0
    block = given["whole"][0].model.backbone
    matrices = [(block.width, block.heads * block.head_dim)] * 4 + [(block.width, block.hidden)] * 2
    assert lora.params - whole.params == lora.trained == block.depth * sum(2 * (a + b) for a, b in matrices)


def test_pairs_are_read_as_documents_of_their_own(asked):
    """What a row plan holds depends on the objective, too."""
    given = asked({"answers": {"model.embed": 8}, "pairs": {"model.embed": 8, "objective.contrastive": 1.0}})
    answers, pairs = (budget.read(*runs) for runs in given.values())
    assert pairs.images[-1] > answers.images[-1] and pairs.text[-1] > answers.text[-1]


def test_a_hidden_size_of_its_own_is_not_solved_for(asked):
    coarse = {"model.backbone": {"heads": 16, "width": 96, "depth": 2, "hidden": 200}, "model.axes": 3}
    given = asked({"small": {"model.backbone": {"width": 256, "depth": 1}}, "coarse": coarse})
    with pytest.raises(config.InputError, match="coarse: model.backbone.width=.* is the nearest"):
        budget.solve(given, "params", "small", dict.fromkeys(given, False))
