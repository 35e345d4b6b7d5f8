"""Weights in and out.

    python -m gpt4v_jax.interop inspect DIR                      what a Hugging Face folder (or hub name) holds
    python -m gpt4v_jax.interop import DIR --workdir W           a language model -> a workdir, for generate
    python -m gpt4v_jax.interop import FILE.bin --tokenizer TOK.bin --workdir W       the same from a llama2.c file
    python -m gpt4v_jax.interop export W --out DIR --family llama                     a workdir -> such a folder
    python -m gpt4v_jax.interop export W --part image --out DIR --family siglip_vision_model    its image encoder
    python -m gpt4v_jax.interop merge W --out W2                 a run with LoRA -> a workdir without it

An encoder alone, or a language model in a larger one, is named in a config: init_from (docs/interop.md).
"""

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags

from gpt4v_jax import command, config, sharding
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.interop import families, hf, llama2c, table
from gpt4v_jax.interop import folder as folder_lib
from gpt4v_jax.model import flops
from gpt4v_jax.training import checkpoint, lock, workdir
from gpt4v_jax.training.step import State

_WORKDIR = flags.DEFINE_string("workdir", None, "import: the folder that the model goes to", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "export, merge: the folder to write; it must not be there", allow_override=True)
_FAMILY = flags.DEFINE_string("family", None, "export: the model_type to write, where it was not imported as one")
_PART = flags.DEFINE_enum("part", "model", ["model", "image"], "export: the whole model, or its image encoder alone")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "import: a tokenizer.json, or a llama2.c tokenizer, from elsewhere")
_DTYPE = flags.DEFINE_string("dtype", None, "of the parameters: float32 | bfloat16 | float16 | keep; import: float32, "
                             "export: keep")  # fmt: skip
_SHARD_MB = flags.DEFINE_integer("shard_mb", hf.SHARD_BYTES >> 20, "export: files of at most so many MiB")


def inspect(name: str) -> None:
    folder = folder_lib.Folder(folder_lib.local(name))
    where = str(folder.path / "config.json")
    family = families.family_of(folder.config, where)
    ours = hf.tied_as_in(folder, family, families.read_config(folder.config, where))
    params = hf.abstract_params(ours)
    names, unread = hf.located(folder, family, table.tensors_of(family, ours, params))
    counts = flops.parameters(params)
    print(f"{folder.path}: {family.model_type}, {len(names)} tensors in {len(set(folder.files.values()))} files")
    print(f"parameters {sum(counts.values()):,} ({', '.join(f'{module} {n:,}' for module, n in counts.items())})")
    for weight in unread:
        print(f"not read: {weight}, our model has no place for it")
    print(f"as config.{type(ours).__name__}:\n{json.dumps(dataclasses.asdict(ours), indent=2)}")


def import_(name: str) -> None:
    """A language model -> a workdir with a checkpoint of step 0."""
    folder = Path(needed("workdir", _WORKDIR.value))
    if (folder / "config.json").exists() or checkpoint.exists(folder):
        raise config.InputError(f"--workdir={folder} holds a run already, or a part of one: name another folder")
    dtype = _DTYPE.value or "float32"
    try:
        devices = jax.devices("cpu")  # from file to file: no accelerator is needed
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        devices = jax.devices()
    mesh = sharding.make_mesh(config.Mesh(), devices[:1])
    if Path(name).suffix == ".bin":
        imported, tokenizer = llama2c.load(Path(name), Path(needed("tokenizer", _TOKENIZER.value)), dtype, mesh)
    else:
        source = folder_lib.local(name)
        kind = families.family_of(folder_lib.Folder(source).config, f"{source}/config.json").kind
        if kind is not config.Model:
            raise config.InputError(
                f"{name} is an encoder (config.{kind.__name__}), not a language model: name it in a config's "
                f"init_from.image={name!r}"
            )
        path = Path(_TOKENIZER.value) if _TOKENIZER.value else source / "tokenizer.json"
        if not path.is_file():
            raise config.InputError(f"{path} is missing: give a tokenizer.json with --tokenizer")
        tokenizer = tokenizer_lib.load(path)
        imported = hf.load(source, dtype, mesh)
    if tokenizer.vocab > imported.config.vocab:
        print(f"note: the tokenizer has {tokenizer.vocab} tokens, the model {imported.config.vocab}: is it its own?")
    start = _tokens(tokenizer, imported.theirs, "decoder_start_token_id", "forced_bos_token_id")
    end = _tokens(tokenizer, imported.theirs, "eos_token_id")
    data = config.Data(name="", start=start, end=end or config.Data().end)
    run = config.Config(model=imported.config, data=data)
    _write(folder, run, tokenizer, State(0, imported.params, {}), imported.theirs)
    counts = flops.parameters(imported.params)
    print(f"{name}: {imported.family.model_type}, {sum(counts.values()):,} parameters -> {folder}")


def _write(folder: Path, run: config.Config, tokenizer, state: State, theirs: dict, data: dict | None = None) -> None:
    """A workdir with one checkpoint, which holds no optimizer's state."""
    workdir.create(folder)
    with lock.hold(folder):
        if theirs:
            workdir.write(folder / "hf_config.json", json.dumps(theirs, indent=2))
        workdir.describe(folder, run, tokenizer, data)
        with checkpoint.Checkpoints(folder) as checkpoints:
            checkpoints.check_room(state)
            checkpoints.save(state)


def _theirs(folder: Path) -> dict:
    """-> config.json of the folder that a workdir was imported from; {} where it was not."""
    path = folder / "hf_config.json"
    return folder_lib.read_json(path) if path.is_file() else {}


def merge(name: str) -> None:
    """A run with LoRA -> a workdir without, whose matrices hold what was learnt. The best checkpoint, and no other."""
    folder, out = Path(name), Path(needed("out", _OUT.value))
    rank = workdir.load_config(folder).lora.rank
    if not rank:
        raise config.InputError(f"{folder} was trained without LoRA (lora.rank=0): there is nothing to merge")
    if out.exists():
        raise config.InputError(f"--out={out} is there already: name another folder")
    trained = workdir.restore(folder)
    run = dataclasses.replace(trained.run, lora=config.LoRA())
    state = State(trained.step, trained.params, {})
    _write(out, run, trained.tokenizer, state, _theirs(folder), workdir.data_of(folder))
    print(f"{folder} at step {trained.step} -> {out}: LoRA of rank {rank} is in its matrices")


def _tokens(tokenizer: tokenizer_lib.Tokenizer, theirs: dict, *keys: str) -> tuple[str, ...]:
    """-> the tokens of the ids under `keys`, of generation_config.json before config.json."""
    ids = [theirs.get("generation", {}).get(key, theirs.get(key)) for key in keys]
    flat = [id for one in ids for id in (one if isinstance(one, list) else [one]) if isinstance(id, int)]
    return tuple(token for token in map(tokenizer.token, flat) if token is not None)


def export(name: str) -> None:
    out, folder = Path(needed("out", _OUT.value)), Path(name)
    run = workdir.load_config(folder)
    theirs = _theirs(folder)
    family = families.family_of({"model_type": _FAMILY.value or needed("family", theirs.get("model_type"))}, "--family")
    image = _PART.value == "image"
    table.write_config(family, run.model.image if image else run.model)  # what it cannot say, before anything is read
    trained = workdir.restore(folder)
    if image:
        params = {name: value for name, value in trained.params["image"].items() if name != "connector"}
        imported, tokenizer = hf.Imported(family, run.model.image, params, {}), ""
    else:
        ends = list(trained.tokenizer.ends)
        theirs = theirs or ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
        imported = hf.Imported(family, trained.run.model, trained.params, theirs)
        tokenizer = trained.tokenizer.to_json()
    hf.save(imported, out, tokenizer, dtype=_DTYPE.value or "keep", shard_bytes=_SHARD_MB.value << 20)
    print(f"{folder} at step {trained.step} -> {out}: {family.model_type}")


def needed(flag: str, value: str | None) -> str:
    if not value:
        raise config.InputError(f"--{flag} is missing: --help says what it is")
    return value


ACTIONS = {"import": import_, "export": export, "inspect": inspect, "merge": merge}


def main(action: str, name: str) -> None:
    config.one_of("the action", action, tuple(ACTIONS))
    if _DTYPE.value:
        config.one_of("dtype", _DTYPE.value, (*hf.DTYPES, "keep"))
    config.at_least(1, shard_mb=_SHARD_MB.value)
    ACTIONS[action](name)


if __name__ == "__main__":
    command.run(main, arguments=("the action (import, export, inspect or merge)", "the folder or file after it"))
