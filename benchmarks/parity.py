"""Our layers against Hugging Face's, family by family: the table of docs/results/parity.md.

    python -m benchmarks.parity --out docs/results        # needs torch and transformers: the extra "test", Python 3.11

The references are those of benchmarks/references.py, batches are padded. tests/interop/test_parity.py checks the same
comparisons.
"""

import dataclasses
import json
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.references import CASES, VOCAB, reference
from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.interop import hf
from gpt4v_jax.model.image import ImageTower
from gpt4v_jax.training import workdir

_OUT = flags.DEFINE_string("out", None, "a folder for parity.md; without it the table is only printed")

NEW = 16  # tokens that are generated
LENGTHS = (21, 13, 6)  # of the rows of a padded batch; windows are 8
SOURCES = (17, 9, 4)


# ---- inputs, and both sides of a comparison


def _padded(lengths, first=3, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """-> (tokens, mask), padded on the right."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(seed).integers(first, VOCAB - 1, mask.shape)
    return np.where(mask, tokens, 0).astype(np.int32), mask


def _batch(tokens, mask, causal=True, source=None, token_type=None) -> batch_lib.Batch:
    zeros = np.zeros_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[:, None], (*tokens.shape, 1))
    if source is not None:
        at = np.broadcast_to(np.arange(source[0].shape[1], dtype=np.int32)[:, None], (*source[0].shape, 1))
        none = np.zeros(source[0].shape, np.int32)
        source = batch_lib.Source(source[0], at, source[1].astype(np.int32), none, none - 1)
    return batch_lib.Batch(
        tokens=tokens, slot=zeros - 1, position=positions, document=mask.astype(np.int32),
        ar=np.full(tokens.shape, causal), target=zeros, weight=zeros.astype(np.float32), source=source,
        token_type=token_type,
    )  # fmt: skip


def _module(imported: hf.Imported, context: int):
    module, _ = hf.module_of(imported.config)
    return module.clone(layout=dataclasses.replace(module.layout, context=context))


def _logits(module, params, batch):
    hidden, _, _ = module.apply({"params": params}, batch)
    return module.apply({"params": params}, hidden, method="logits")


def _difference(ours, theirs) -> dict[str, float]:
    """ours, theirs [rows, values] -> the two measures of a comparison."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    gap = np.abs(ours - theirs).max() / theirs.std()
    return {"difference": float(gap), "argmax": float((ours.argmax(-1) == theirs.argmax(-1)).mean())}


def _text(imported, model, kind: str) -> dict[str, Any]:
    import torch

    causal = kind != "masked"
    tokens, mask = _padded(LENGTHS)
    given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    token_type = source = None
    if kind == "masked":
        token_type = np.random.default_rng(1).integers(0, 3, tokens.shape).astype(np.int32)
        given["token_type_ids"] = torch.tensor(token_type).long()
    if kind == "seq2seq":
        source = _padded(SOURCES, seed=2)
        given = {"input_ids": torch.tensor(source[0]).long(), "attention_mask": torch.tensor(source[1]).long(),
                 "decoder_input_ids": torch.tensor(tokens).long()}  # fmt: skip
    with torch.no_grad():
        theirs = model(**given).logits.numpy()
    module = _module(imported, tokens.shape[1])
    forward = jax.jit(lambda params, batch: _logits(module, params, batch))
    ours = forward(imported.params, _batch(tokens, mask, causal, source, token_type))
    return _difference(np.asarray(ours)[mask], theirs[mask])


def _generation(imported, model, kind: str) -> dict[str, Any]:
    """NEW greedy tokens of a padded batch, cached: against the reference's, and against our own uncached forward."""
    import torch

    tokens, mask = _padded(LENGTHS)
    source = _padded(SOURCES, seed=2) if kind == "seq2seq" else None
    with torch.no_grad():
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        if source is None:  # the reference wants its padding on the left
            left = np.stack([np.roll(row, np.sum(~m)) for row, m in zip(tokens, mask, strict=True)])
            seen = torch.tensor(mask[:, ::-1].copy()).long()
            given = {"input_ids": torch.tensor(left).long(), "attention_mask": seen}
            theirs = model.generate(**given, **options).numpy()[:, -NEW:]
        else:
            start = model.config.decoder_start_token_id
            tokens, mask = np.full((len(SOURCES), 1), start, np.int32), np.ones((len(SOURCES), 1), bool)
            given = {"input_ids": torch.tensor(source[0]).long(), "attention_mask": torch.tensor(source[1]).long()}
            theirs = model.generate(**given, **options, decoder_start_token_id=start).numpy()[:, 1 : 1 + NEW]

    rows, width = tokens.shape
    module = _module(imported, width)
    batch = _batch(tokens, mask, source=source)
    logits, cache = decode.prefill(module, imported.params, batch, slots=width + NEW)
    keys = jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32))
    past = sample.history(list(tokens), NEW)
    told, last, _, _ = decode.decode(module, imported.params, logits, cache, past, keys, jnp.zeros(rows, bool), {})
    drawn = np.asarray(told.tokens)[:, :NEW]
    # Uncached: prompt and answer as one row; its logits must be those of the cached steps, the first and the last.
    lengths = mask.sum(1)
    whole, seen = np.zeros((rows, width + NEW), np.int32), np.zeros((rows, width + NEW), bool)
    for i, n in enumerate(lengths):
        whole[i, : n + NEW] = np.concatenate([tokens[i, :n], drawn[i]])
        seen[i, : n + NEW] = True
    full = _module(imported, width + NEW)
    forward = jax.jit(lambda params, batch: _logits(full, params, batch))
    again = np.asarray(forward(imported.params, _batch(whole, seen, source=source)))
    first, end = (again[np.arange(rows), lengths - 1 + shift] for shift in (0, NEW))
    uncached = np.stack([again[np.arange(rows), lengths - 1 + i].argmax(-1) for i in range(NEW)], axis=1)
    gap = max(np.abs(np.asarray(a) - b).max() for a, b in ((logits, first), (last, end))) / again[seen].std()
    return {
        "cached": float(gap), "greedy": int((drawn == theirs).all(0).sum()),
        "cached_equals_uncached": bool((drawn == uncached).all()),
    }  # fmt: skip


def _pictures(c: config.Image, model, rows: int):
    """-> (our patches and indices, their pixel_values, by the constants that they normalise with)."""
    import torch
    from transformers import image_utils

    from gpt4v_jax.data import transforms

    pictures = np.random.default_rng(3).integers(0, 256, (rows, c.size, c.size, 3), np.uint8)
    patches = np.stack([transforms.patchify(picture, c.patch) for picture in pictures])
    index = np.zeros((*patches.shape[:2], 3), np.int32)
    index[..., 1:] = np.indices((c.grid, c.grid)).reshape(2, -1).T
    kind = {"clip": "OPENAI_CLIP", "dino": "IMAGENET_DEFAULT"}.get(model.config.model_type[:4], "IMAGENET_STANDARD")
    mean, std = (np.array(getattr(image_utils, f"{kind}_{name}")) for name in ("MEAN", "STD"))
    pixels = (pictures / 255 - mean) / std
    return patches, index, torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)


def _image(imported, model, kind: str) -> dict[str, Any]:
    import torch

    patches, index, pixels = _pictures(imported.config, model, 3)
    with torch.no_grad():
        out = model(pixel_values=pixels)
    c, module = imported.config, hf.module_of(imported.config)[0]
    ours = jax.jit(module.apply)({"params": imported.params}, patches, index)
    if c.classes:
        theirs = out.image_embeds if hasattr(out, "image_embeds") else out.logits
    elif c.pool == "map":
        theirs = out.pooler_output
    else:
        theirs = out.last_hidden_state
    if c.pool == "class" and not c.classes:
        theirs = out.pooler_output
    parts = [_difference(np.asarray(ours).reshape(-1, ours.shape[-1]), theirs.numpy().reshape(-1, theirs.shape[-1]))]
    if hasattr(out, "last_hidden_state") and (c.pool != "none" or c.classes):  # what a language model would read
        tower = ImageTower(dataclasses.replace(c, pool="none", classes=0))
        ours = jax.jit(tower.apply)({"params": imported.params}, patches, index)
        theirs = out.last_hidden_state.numpy()
        parts.append(_difference(*(np.asarray(x).reshape(-1, theirs.shape[-1]) for x in (ours, theirs))))
    return {"difference": max(p["difference"] for p in parts), "argmax": min(p["argmax"] for p in parts)}


def _towers(imported, model, kind: str) -> dict[str, Any]:
    """Both towers' unit vectors and the scores of all pairs. CLIP's texts are padded, SigLIP reads its padding."""
    import torch

    c = imported.config
    patches, index, pixels = _pictures(c.image, model, 3)
    tokens, mask = _padded(LENGTHS)
    given = {"input_ids": torch.tensor(tokens).long(), "pixel_values": pixels}
    if c.text.causal:
        tokens[np.arange(3), mask.sum(1) - 1] = VOCAB - 1  # CLIP's vector is that of its end token
        given |= {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    else:
        mask = np.ones_like(mask)
    with torch.no_grad():
        out = model(**given)
    module = hf.module_of(c)[0]
    image, text, scores = jax.jit(module.apply)(
        {"params": imported.params}, patches, index, _batch(tokens, mask, c.text.causal)
    )
    pairs = ((image, out.image_embeds), (text, out.text_embeds), (scores, out.logits_per_text))
    parts = [_difference(a, b.numpy()) for a, b in pairs]
    return {"difference": max(p["difference"] for p in parts), "argmax": min(p["argmax"] for p in parts)}


SIDES: dict[str, Callable] = {
    "decoder": _text, "masked": _text, "seq2seq": _text, "image": _image, "towers": _towers
}  # fmt: skip


def compare(name: str, folder: Path, seed: int = 0) -> dict[str, Any]:
    """One family in `folder`: reference -> our parameters -> outputs of both -> exported -> the reference again."""
    import torch

    case, model = CASES[name], reference(name, seed)
    model.save_pretrained(folder / "reference")
    imported = hf.load(folder / "reference")
    result = SIDES[case.kind](imported, model, case.kind)
    if case.kind in ("decoder", "seq2seq"):
        result |= _generation(imported, model, case.kind)
    hf.save(imported, folder / "exported")
    again, info = type(model).from_pretrained(folder / "exported", output_loading_info=True, **case.arguments)
    result["missing"], result["unexpected"] = len(info["missing_keys"]), len(info["unexpected_keys"])
    left, right = model.state_dict(), again.state_dict()
    unread = imported.family.unread or "$^"
    differing = [k for k in left if not re.search(unread, k) and not torch.equal(left[k], right[k])]
    result["tensors"], result["differing"] = len(left), len(differing)
    result["parameters"] = sum(x.size for x in jax.tree.leaves(imported.params))
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| family | max abs difference / std | argmax | cached - uncached / std | greedy tokens equal | missing, "
             "unexpected | tensors, differing after the round trip |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in results.items():
        cached = f"{r['cached']:.1e}" if "cached" in r else "-"
        greedy = f"{r['greedy']} of {NEW}" if "greedy" in r else "-"
        lines.append(
            f"| {name} | {r['difference']:.1e} | {r['argmax']:.0%} | {cached} | {greedy} | {r['missing']}, "
            f"{r['unexpected']} | {r['tensors']}, {r['differing']} |"
        )
    return "\n".join(lines)


# ---- planted bugs: each must be seen


def _with(section: str, **values) -> Callable[[hf.Imported], hf.Imported]:
    """A bug in the config's section "backbone", "image" ...; "" is the config itself."""

    def plant(imported: hf.Imported) -> hf.Imported:
        def changed(c, names):
            return dataclasses.replace(c, **(
                {names[0]: changed(getattr(c, names[0]), names[1:])} if names else values
            ))  # fmt: skip

        return dataclasses.replace(imported, config=changed(imported.config, section.split(".") if section else []))

    return plant


def _moved(path: str, move: Callable) -> Callable[[hf.Imported], hf.Imported]:
    """A bug in one parameter."""

    def plant(imported: hf.Imported) -> hf.Imported:
        flat = flax.traverse_util.flatten_dict(imported.params, sep="/")
        flat[path] = move(flat, flat[path])
        return dataclasses.replace(imported, params=flax.traverse_util.unflatten_dict(flat, sep="/"))

    return plant


def _transposed(flat, x):
    return x.reshape(x.shape[0], -1).T.reshape(x.shape)


_QUERY = "backbone/block_0/attention/query/kernel"
PLANTED = {  # what is wrong -> (the case that must see it, the bug)
    "rope theta 10,000 for 700": ("llama", _with("backbone", rope_theta=10_000.0)),
    "rope scaling left out": ("llama, llama3 rope", _with("backbone", rope_scaling=config.RopeScaling())),
    "eps 1e-6 for 1e-5": ("llama", _with("backbone", norm_eps=1e-6)),
    "exact GELU for tanh": ("gpt2", _with("backbone", activation="gelu")),
    "tanh GELU for exact": ("bert", _with("backbone", activation="gelu_tanh")),
    "exact GELU for quick": ("clip", _with("image.encoder", activation="gelu")),
    "a query matrix transposed": ("qwen3, square", _moved(_QUERY, _transposed)),
    "keys for queries": ("llama, tied, biases", _moved(_QUERY, lambda flat, x: flat[_QUERY.replace("query", "key")])),
    "window 9 for 8": ("mistral", _with("backbone", window=9)),
    "all layers local": ("gemma2", _with("backbone", pattern=("local",))),
    "scale w for 1 + w": ("gemma", _with("backbone", norm="rms")),
    "embeddings not scaled": ("gemma", _with("", embed_scale=1.0)),
    "no cap on attention": ("gemma2", _with("backbone", attention_cap=0.0)),
    "local theta for all": ("gemma3_text", _with("backbone", local_theta=0.0)),
    "relative positions up to 30 for 15": ("t5", _with("source", bucket_distance=30)),
    "attention scaled": ("t5", _with("backbone", attention_scale=0.0)),
    "position offset 1 for 2": ("bart", _with("", position_offset=1, context=65)),
    "a norm's scale off by 0.1 %": ("bert", _moved("backbone/block_1/mlp_norm/scale", lambda flat, x: x * 1.001)),
    "layer scale 1": ("dinov2", _moved("encoder/block_0/mlp_scale/value", lambda flat, x: x * 0 + 1)),
    "pixel mean of ViT for CLIP": ("clip", _with("image", mean=(0.5, 0.5, 0.5))),
}


def planted(name: str, folder: Path) -> tuple[str, float, float]:
    """-> (the case that looks for a planted bug, its difference without and with the bug)."""
    case, plant = PLANTED[name]
    model = reference(case)
    model.save_pretrained(folder / "reference")
    imported = hf.load(folder / "reference")
    side, kind = SIDES[CASES[case].kind], CASES[case].kind
    return case, side(imported, model, kind)["difference"], side(plant(imported), model, kind)["difference"]


PAGE = """# Our layers beside Hugging Face's

Made by `python -m benchmarks.parity --out docs/results` at commit {commit}, Python {python}, jax {jax}, torch {torch},
transformers {transformers}, on a CPU, float32. The references are tiny models with random weights (initializer_range
0.2, so that every operation matters; biases, norms and eps away from their defaults), in padded batches. The same
comparisons are tests (tests/interop/test_parity.py), with a bound of 1e-4 on the first column.

{table}

- Largest difference of all families: {worst:.1e}.
- "Max abs difference / std" is over all logits or features of positions that are no padding; for towers over both
  vectors and the scores of all pairs.
- "Cached - uncached": logits after the prompt and after the last of {new} greedy tokens, by prefill and cached steps
  against one forward pass over the whole row.
- The round trip is reference -> import -> export -> the reference's `from_pretrained`; "differing" counts tensors that
  are not bit-equal.

## Can it fail?

Each row is a bug, planted in our side, and the case that must see it.

| planted | case | difference without | with the bug |
|---|---|---|---|
{planted}
"""


def main() -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    results, bugs = {}, []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(name, Path(folder))
        print(name, json.dumps(results[name]), flush=True)
    for name in PLANTED:
        with tempfile.TemporaryDirectory() as folder:
            case, good, bad = planted(name, Path(folder))
        bugs.append(f"| {name} | {case} | {good:.1e} | {bad:.1e} |")
        print(bugs[-1], flush=True)
    print(table(results))
    if _OUT.value:
        page = PAGE.format(
            commit=workdir.environment()["commit"], python=platform.python_version(), jax=jax.__version__,
            torch=torch.__version__, transformers=transformers.__version__, table=table(results), new=NEW,
            worst=max(r["difference"] for r in results.values()), planted="\n".join(bugs),
        )  # fmt: skip
        (Path(_OUT.value) / "parity.md").write_text(page)


if __name__ == "__main__":
    command.run(main)
