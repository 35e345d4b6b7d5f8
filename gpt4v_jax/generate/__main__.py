"""python -m gpt4v_jax.generate --workdir runs/digits_world --image scene.png --prompt "what digit is the red one?" """

import dataclasses
from pathlib import Path

from absl import flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config
from gpt4v_jax.data import chat, mixture, sources
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.training import workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_PROMPT = flags.DEFINE_string("prompt", None, "the question, or the text to go on with")
_FILES = {
    name: flags.DEFINE_multi_string(name, [], f"a {what} file; may be given several times", allow_override=True)
    for name, what in (("image", "picture"), ("video", "clip"), ("audio", "sound"))
}
_RECORD = flags.DEFINE_string(
    "record", None, 'SPLIT:NUMBER, such as "test:0", or of a mixture "fsdd/test:0": that record\'s media and, without '
    "--prompt, its first question"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "at most so many tokens")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among the k most probable tokens; 0 is all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among the most probable tokens with this mass")
_SAMPLES = flags.DEFINE_integer("samples", 1, "answers; sample i uses seed + i")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first sample")
_STOP = flags.DEFINE_multi_string("stop", [], "a text before which the answer ends; may be given several times")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; otherwise the best", allow_override=True)


def main() -> None:
    sampling = sample.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    config.at_least(1, samples=_SAMPLES.value)
    config.at_least(0, seed=_SEED.value)
    folder = Path(_WORKDIR.value)
    run = workdir.load_config(folder)
    layout = batch_lib.layout(run.model, run.data)
    for name, flag in _FILES.items():
        if flag.value and not layout.reads(name):
            raise config.InputError(f"the model in --workdir={folder} reads no {name}: leave --{name} out")
    # A bad file is said at once.
    files = [(name, _read(layout, name, path)) for name, flag in _FILES.items() for path in flag.value]
    trained = workdir.restore(folder, _STEP.value)
    question, truth = _PROMPT.value, None
    if _RECORD.value and question is None and not files:
        prompt, read, question, truth = _first_question(trained, *_record(trained, _RECORD.value))
    elif question is None:
        raise config.InputError("--prompt is missing: what shall the model answer, or go on with?")
    else:
        if _RECORD.value:
            files += _media_of(*_record(trained, _RECORD.value))
        media, read = decode.attach(trained.layout, files)
        prompt = decode.prompt(trained, question, media)
    prompts = [prompt] * _SAMPLES.value
    seeds = range(_SEED.value, _SEED.value + _SAMPLES.value)
    answers = decode.generate(trained, prompts, read, _MAX_NEW_TOKENS.value, sampling, seeds, _STOP.value)
    if truth is not None:
        print(f"question: {question}\ntruth:    {truth}")
    goes_on = not trained.chats and not trained.run.model.source
    for answer in answers:
        print(question + answer.text if goes_on else f"answer:   {answer.text}")


def _read(layout: batch_lib.Layout, modality: str, path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
        decode.attach(layout, [(modality, data)])
    except OSError as error:
        raise config.InputError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except BadMedium as error:
        raise BadMedium(f"{path}: {error}") from error
    return data


def _record(trained: workdir.Trained, name: str) -> tuple[config.Config, str, int]:
    """"test:0", or "fsdd/test:0" -> (the run on that data set, the split, the record's number)."""
    source, number = name.rpartition(":")[::2]
    data_set, _, split = source.rpartition("/")
    run = mixture.one(trained.run, data_set)
    count = len(sources.open_split(run.data, split))
    if not (number.isascii() and number.isdigit()) or int(number) >= count:
        raise config.InputError(f"--record={name} must be {source}:0 to {source}:{count - 1}")
    return run, split, int(number)


def _media_of(run: config.Config, split: str, number: int) -> list[tuple[str, bytes]]:
    try:
        return sources.media_of(sources.open_split(run.data, split)[number])
    except BadMedium as error:
        raise BadMedium(f"{getattr(error, 'where', f'record {number} of {run.data.name}')}: {error}") from error


def _first_question(trained: workdir.Trained, run: config.Config, split: str, number: int):
    """-> (the first question of a record as evaluation asks it, what reads its media, its text, the true answer)."""
    data = dataclasses.replace(run.data, limit=number + 1)
    source = sources.from_records(sources.open_split(data, split), data, trained.tokenizer, trained.layout, seed=None)
    asked = sources.Questions(source) if isinstance(source, sources.Conversations) else None
    for i, (r, turn) in enumerate(asked.items if asked else ()):
        if source.records[r].number == number:
            prompt = chat.document(asked.pieces(0, i, answered=False), asked.special, trained.layout)
            return prompt, asked.read, turn.question, turn.answer
    raise config.InputError(f"record {number} of {run.data.name} holds no question; use --prompt")


if __name__ == "__main__":
    command.run(main, required=("workdir",))
