"""The command `plan`: totals of presets and of runs, which count is which, and bad input."""

import re
import sys
from pathlib import Path

import pytest
from absl import flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config, plan
from gpt4v_jax.model import flops, presets

RUN = """
from gpt4v_jax import config as config_lib
def get_config():
    config = config_lib.default()
    config.steps, config.batch = 30, 4
    config.model.vocab, config.model.context = {vocab}, 64
    config.model.backbone.update(depth=2, width=64, heads=2)
    config.model.image.update(size=16, patch=8)
    config.data.image.per_row = 3
    config.data.tokenizer = {tokenizer!r}
    return config
"""


@pytest.fixture
def ran(capsys, monkeypatch):
    """-> a function that runs the command in this process -> (exit status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plan", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "80")
        status = 0
        try:
            command.run(plan.main)
        except SystemExit as ended:
            status = ended.code
        finally:
            for name in [name for name in flags.FLAGS if name.startswith("config.")]:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
            flags.FLAGS["config"].value = flags.FLAGS["preset"].value = None
        return status, *capsys.readouterr()

    return run


def written(folder: Path, vocab: int = 300, tokenizer: str = "bpe") -> Path:
    path = folder / "run.py"
    path.write_text(RUN.format(vocab=vocab, tokenizer=tokenizer))
    return path


def rows(out: str) -> dict[str, list[str]]:
    """-> {module: the cells of its line in the table}."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.startswith("  ")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 1}


def test_preset(ran):
    status, out, _ = ran("--preset", "gpt2")
    assert status == 0
    table = rows(out)
    assert out.splitlines()[0].strip() == "gpt2: a row of 1,024 positions"
    assert table["text/embed"] == [f"{50257 * 768:,}"] and table["text/position"] == [f"{1024 * 768:,}"]
    T, d, L = 1024, 768, 12
    full, causal = (2 * T * 4 * L * d**2 + L * 4 * pairs * d for pairs in (T * T, T * (T + 1) // 2))
    work = [f"{x / 1e9:,.2f}" for x in (full, causal, 2 * full, 2 * causal)]
    assert table["backbone/attention"] == [f"{L * (4 * d * d + 4 * d):,}", *work]
    assert table["head (tied: text/embed)"] == ["79.05", "79.05", "158.09", "158.09"]
    assert table["all"] == ["124,439,808", "291.65", "272.34", "583.30", "544.68"]
    assert f"{4 * 124_439_808:,} bytes in float32, {2 * 124_439_808:,} bytes in bfloat16" in out
    assert "GFLOP" in out and "2 x multiply-accumulates" in out and "full: every query meets every key" in out


@pytest.mark.parametrize("name, title, total", [
    ("clip-image-b/32", "a picture of 224 x 224 pixels", ["87,849,216", "8.82", "8.82", "17.64", "17.64"]),
    ("clip-b/32", "a picture of 224 x 224 pixels and a text of 77 positions", ["151,277,313"]),
    ("t5-small", "a row of 512 positions beside a source of 512", ["60,506,624"]),
])  # fmt: skip
def test_presets_of_other_kinds(name, title, total, ran):
    status, out, _ = ran("--preset", name)
    assert status == 0 and out.splitlines()[0].strip() == f"{name}: {title}"
    assert rows(out)["all"][: len(total)] == total


@pytest.mark.parametrize("name", ["t5-small", "bert-base-uncased", "clip-image-b/32", "siglip-b/16-224"])
def test_parts_add_up(name):
    ours = presets.named(name)
    layout = batch_lib.layout(ours, config.Data()) if isinstance(ours, config.Model) else None
    parts = plan.costs(ours, layout)
    whole = plan.total(parts)
    assert whole.full == sum(flops.parts(ours, layout).values())
    assert whole.causal == sum(flops.parts(ours, layout, causal=True).values())
    known = {name for part in parts for name in part.split("/")}
    assert known <= set(plan.ORDER)  # every part has its place in the table


def test_order_of_the_table():
    model = presets.named("t5-small")
    parts = list(plan.costs(model, batch_lib.layout(model, config.Data())))
    assert parts[0] == "text/embed" and parts[-1] == "head"
    assert parts.index("source/mlp") < parts.index("backbone/relative") < parts.index("backbone/cross")


def test_run(ran, tmp_path):
    status, out, _ = ran(f"--config={written(tmp_path)}")
    assert status == 0 and "vocabulary" not in out
    assert out.splitlines()[0].strip() == "digits_world: a row of 64 positions, with 3 images of 4 patches"
    table, T, d, V = rows(out), 64, 64, 300
    assert table["text/embed"] == [f"{V * d:,}"]
    patches, blocks = 192 * d + d + 4 * d, 24 * d**2 + 5 * d  # with bias and positions; with norms
    assert table["all"][0] == f"{V * d + patches + blocks:,}"
    matrices = 2 * 3 * 4 * 192 * d + 2 * T * 24 * d**2 + 2 * T * d * V
    full, causal = (matrices + 2 * 4 * pairs * d for pairs in (T * T, T * (T + 1) // 2))
    assert table["all"][1:3] == [f"{x / 1e6:,.2f}" for x in (full, causal)]
    step = f"4 rows = 256 positions: {12 * full / 1e6:,.2f} MFLOP full, {12 * causal / 1e6:,.2f} causal"
    assert re.search(rf"a step +{re.escape(step)}", out)
    assert f"30 steps: {360 * full / 1e9:,.2f} GFLOP full, {360 * causal / 1e9:,.2f} causal" in out


def test_an_override(ran, tmp_path):
    outs = [ran(f"--config={written(tmp_path)}", *more)[1] for more in ([], ["--config.model.backbone.depth=4"])]
    small, large = (int(rows(out)["backbone/mlp"][0].replace(",", "")) for out in outs)
    assert large == 2 * small == 4 * 8 * 64**2


@pytest.mark.parametrize("more, lora, moving", [
    (["--config.lora.rank=4"], 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256)), 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256))),
    (["--config.lora.rank=4", "--config.lora.also=^text/", r"--config.lora.pattern=query/kernel$"],
     2 * 4 * (64 + 64), 2 * 4 * (64 + 64) + 300 * 64),
    (["--config.optim.frozen=^(?!text/)"], 0, 300 * 64),
], ids=str)  # fmt: skip
def test_what_is_trained(more, lora, moving, ran, tmp_path):
    _, plain, _ = ran(f"--config={written(tmp_path)}")
    _, out, _ = ran(f"--config={written(tmp_path)}", *more)
    total = int(rows(plain)["all"][0].replace(",", "")) + lora
    assert rows(out)["all"][0] == f"{total:,}" and rows(out).get("lora", ["0"]) == [f"{lora:,}"]
    assert f"trained     {moving:,} of {total:,} parameters" in out and "trained  " not in plain


@pytest.mark.parametrize("tokenizer, said", [("bpe", "an upper bound"), ("char", "a stand-in")])
def test_vocabulary_of_a_tokenizer_to_come(tokenizer, said, ran, tmp_path):
    status, out, _ = ran(f"--config={written(tmp_path, 0, tokenizer)}", "--config.data.vocab=500")
    assert status == 0 and rows(out)["text/embed"] == [f"{500 * 64:,}"]
    assert re.search(rf"vocabulary +500: data.vocab, {said}", out)


def test_a_table_fits_a_terminal(ran):
    """80 columns, and no number is cut."""
    for name in ("llama-2-13b", "clip-b/32"):
        _, out, _ = ran("--preset", name)
        table = [line for line in out.splitlines() if line.startswith("  ")]
        assert max(map(len, table)) <= 80 and "…" not in out


def test_help(ran):
    status, out, error = ran("--help")
    assert status == 0 and not error
    assert "python -m gpt4v_jax.plan --preset gpt2" in out and "--preset: a published" in out


@pytest.mark.parametrize("tokenizer, vocab", [("byte", 256 + 7), ("char", 500)])
def test_vocabulary_of_a_tokenizer_without_a_corpus(tokenizer, vocab, ran, tmp_path):
    _, out, _ = ran(f"--config={written(tmp_path, 0, tokenizer)}", "--config.data.vocab=500")
    assert rows(out)["text/embed"] == [f"{vocab * 64:,}"]


@pytest.mark.parametrize("args, message", [
    (["--preset=gpt2-xll"], "did you mean 'gpt2-xl'?"),
    (["--preset="], "preset='' is none of gpt2"),
    ([], "give either --config, a run's config file, or --preset"),
    (["--preset=gpt2", "--config={run}"], "give either --config"),
    (["--config={folder}/absent.py"], "absent.py"),
    (["--config={run}", "--config.model.backbone.widht=8"], "widht"),
    (["--config={run}", "--config.model.backbone.heads=0"], "heads=0 must be 1 or more"),
    (["--config={run}", "--config.model.fusion.kind=concta"], "did you mean 'concat'?"),
    (["--config={run}", "--config.lora.rank=65"], "lora.rank=65 is larger than the smaller side of backbone/block_0"),
    (["--config={run}", "--config.lora.rank=4", "--config.lora.pattern=mpl/"], "lora.pattern='mpl/' matches no matrix"),
    (["--preset=gpt2", "gpt2"], "unexpected argument 'gpt2'"),
])  # fmt: skip
def test_bad_input(args, message, ran, tmp_path):
    run = written(tmp_path)
    status, out, error = ran(*(arg.format(run=run, folder=tmp_path) for arg in args))
    assert status == 2 and not out
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
