"""What a model costs before it runs: python -m gpt4v_jax.plan --config configs/digits_world.py

Or a published size: python -m gpt4v_jax.plan --preset gpt2. Parameters and FLOPs by module, in both counts of attention
(gpt4v_jax/model/flops.py says what is counted), and bytes of the parameters. Nothing is trained, and no data is read.
"""

import dataclasses
from typing import Any

import flax
import jax
import rich.box
import rich.console
import rich.table
from absl import flags
from ml_collections import config_flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config
from gpt4v_jax.data import objectives
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.interop import hf
from gpt4v_jax.interop import parts as parts_lib
from gpt4v_jax.model import flops, presets
from gpt4v_jax.training import lora, optim

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a run's config file, such as configs/digits_world.py", allow_override=True
)
_PRESET = flags.DEFINE_string("preset", None, "a published size, such as gpt2: a row of model/presets.py")

ORDER = (  # of the names in a part's path: as they are met on the way through a model
    "text", "image", "video", "audio", "front", "embed", "position", "time", "source_position", "token_type",
    "class_token", "mask_token", "source", "backbone", "encoder", "relative", "attention", "cross", "mlp", "scales",
    "norms", "pool", "connector", "head_hidden", "projection", "head", "head_bias", "scale", "bias", "lora",
)  # fmt: skip
UNITS = ((1e16, "PFLOP", 1e15), (1e13, "TFLOP", 1e12), (1e9, "GFLOP", 1e9), (0, "MFLOP", 1e6))  # from, name, size
COUNTS = """\
FLOPs are those of matrix products and attention, 2 x multiply-accumulates; the backward pass is taken as 2 x forward.
full: every query meets every key of its row; causal: only those that the mask of one document, and windows, show it."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One part of a model: parameters, and FLOPs of one row's forward pass in both counts of attention."""

    parameters: int = 0
    full: int = 0
    causal: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def costs(ours, layout: batch_lib.Layout | None = None) -> dict[str, Cost]:
    """-> {part: its cost} of a config.Model with its layout, a config.Image or config.Towers."""
    parameters = flops.parameters(hf.abstract_params(ours), flops.part)
    full, causal = (flops.parts(ours, layout, count) for count in (False, True))
    names = sorted(parameters.keys() | full.keys(), key=_place)
    return {name: Cost(parameters.get(name, 0), full.get(name, 0), causal.get(name, 0)) for name in names}


def total(parts: dict[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


def _place(part: str) -> list[int]:
    """Where a part stands in the table; names that ORDER does not know come last."""
    return [ORDER.index(name) if name in ORDER else len(ORDER) for name in part.split("/")]


# ---- what is printed


def unit(flop: float) -> tuple[str, float]:
    """-> (name, size) of the unit that a number of FLOPs is printed in."""
    return next((name, size) for start, name, size in UNITS if flop >= start)


def table(title: str, parts: dict[str, Cost]) -> rich.table.Table:
    """One row a part; FLOPs of one forward and one backward pass, in both counts of attention."""
    whole = total(parts)
    name, size = unit(whole.full)
    style = {"title_justify": "left", "box": rich.box.SIMPLE_HEAD, "padding": (0, 0, 0, 1)}
    out = rich.table.Table(title=title, **style)
    out.add_column("module", no_wrap=True)
    for column in ("parameters", *(f"{way}\n{count}\n{name}" for way in ("forward", "backward")
                                   for count in ("full", "causal"))):  # fmt: skip
        out.add_column(column, justify="right", no_wrap=True)

    def row(label: str, cost: Cost, last: bool = False):
        work = [f"{x / size:,.2f}" if x else "" for x in (cost.full, cost.causal, 2 * cost.full, 2 * cost.causal)]
        out.add_row(label, f"{cost.parameters:,}" if cost.parameters else "", *work, end_section=last)

    for i, (part, cost) in enumerate(parts.items()):
        tied = part == "head" and not cost.parameters
        row("head (tied: text/embed)" if tied else part, cost, last=i == len(parts) - 1)
    row("all", whole)
    return out


def bytes_of(parameters: int) -> str:
    sizes = [f"{parameters * width:,} bytes in {dtype}" for dtype, width in (("float32", 4), ("bfloat16", 2))]
    return f"parameters  {parameters:,}: " + ", ".join(sizes)


def subject(ours, layout: batch_lib.Layout | None = None) -> str:
    """What one forward pass of the table is of."""
    if isinstance(ours, config.Model):
        source = f" beside a source of {layout.source:,}" if layout.source else ""
        media = "".join(
            f", with {items} {m}s of {patches // items} patches"
            for m in layout.media for items, patches in [layout.budget(m)]
        )  # fmt: skip
        return f"a row of {layout.context:,} positions{source}{media.replace('audios', 'sounds')}"
    image = ours.image if isinstance(ours, config.Towers) else ours
    text = f" and a text of {ours.text.context} positions" if isinstance(ours, config.Towers) else ""
    return f"a picture of {image.size} x {image.size} pixels{text}"


def step_line(run: config.Config, whole: Cost) -> str:
    """The work of a step and of the run: forward and backward, that is 3 x forward."""

    def both(rows: int) -> str:
        work = [3 * rows * count for count in (whole.full, whole.causal)]
        name, size = unit(work[0])
        return f"{work[0] / size:,.2f} {name} full, {work[1] / size:,.2f} causal"

    positions = run.batch * run.model.context
    return (
        f"a step      {run.batch:,} rows = {positions:,} positions: {both(run.batch)}, forward and backward\n"
        f"the run     {run.steps:,} steps: {both(run.batch * run.steps)}"
    )


# ---- the command


def with_vocabulary(run: config.Config) -> tuple[config.Config, list[str]]:
    """-> (the run with a vocabulary, what is to be said about where it comes from)."""
    data, vocab = run.data, run.model.vocab
    if vocab:
        return run, []
    if data.tokenizer not in ("bpe", "wordpiece", "char"):  # the others need no corpus
        extra = objectives.special_tokens(data, run.objective, run.model.context)
        made = tokenizer_lib.train(data.tokenizer, (), data.vocab, data.end, extra=extra)
        vocab, source = made.vocab, f"of {data.tokenizer}"
    elif data.tokenizer != "char":
        vocab, source = data.vocab, "data.vocab, an upper bound: the run trains its tokenizer"
    else:
        vocab, source = data.vocab, f"data.vocab, a stand-in: the run makes its {data.tokenizer!r} tokenizer itself"
    padded = parts_lib.vocab(run)
    if padded > vocab:
        vocab, source = padded, f"of init_from.backbone={run.init_from.backbone}"
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=vocab))
    return run, [f"vocabulary  {vocab:,}: {source}"]


def abstract_params(model: config.Model, lora_: config.LoRA) -> Any:
    """-> the tree of a run's parameters, LoRA's among them, as shapes and dtypes; nothing is computed."""
    params = flax.traverse_util.unflatten_dict(hf.abstract_params(model), sep="/")
    return jax.eval_shape(lambda params: lora.added(params, lora_, 0), params)


def plan_run(run: config.Config) -> list[Any]:
    """-> what the command prints of a run's model and work: a table, and lines."""
    run, vocabulary = with_vocabulary(run)
    layout = batch_lib.layout(run.model, run.data)
    costs_of, params = costs(run.model, layout), abstract_params(run.model, run.lora)
    if run.lora.rank:
        costs_of["lora"] = Cost(flops.parameters(params)["lora"])
    whole, moving = total(costs_of), optim.moving(run.optim, run.lora, params)
    trained = [f"trained     {moving:,} of {whole.parameters:,} parameters"] if moving < whole.parameters else []
    title = f"{', '.join(run.data.mixture) or run.data.name}: {subject(run.model, layout)}"
    lines = [bytes_of(whole.parameters), *trained, step_line(run, whole), *vocabulary, COUNTS]
    return [table(title, costs_of), *lines]


def plan_preset(name: str) -> list[Any]:
    ours = presets.named(name)
    layout = batch_lib.layout(ours, config.Data()) if isinstance(ours, config.Model) else None
    parts = costs(ours, layout)
    return [table(f"{name}: {subject(ours, layout)}", parts), bytes_of(total(parts).parameters), COUNTS]


def main() -> None:
    if (_CONFIG.value is None) == (_PRESET.value is None):
        raise config.InputError("give either --config, a run's config file, or --preset, the name of a published size")
    blocks = plan_run(config.from_flag(_CONFIG.value)) if _PRESET.value is None else plan_preset(_PRESET.value)
    console = rich.console.Console(highlight=False)
    for block in blocks:
        console.print(block, soft_wrap=isinstance(block, str))


if __name__ == "__main__":
    command.run(main)
