"""python -m gpt4v_jax.generate --workdir runs/digits_world --image scene.png --prompt "what digit is the red one?" """

from pathlib import Path

from absl import flags

from gpt4v_jax import command, config
from gpt4v_jax.data import sources, transforms
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.training import workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a trained run", allow_override=True)
_PROMPT = flags.DEFINE_string("prompt", None, "the question, or the text to go on with")
_IMAGE = flags.DEFINE_multi_string("image", [], "a picture file; may be given several times")
_RECORD = flags.DEFINE_string(
    "record", None, 'SPLIT:NUMBER, such as "test:0": that record\'s picture and, without --prompt, its first question'
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
    size = workdir.load_config(folder).model.image.size
    if (_IMAGE.value or _RECORD.value) and not size:
        raise config.InputError(f"the model in --workdir={folder} reads no pictures: leave --image and --record out")
    pictures = [transforms.load_picture(path, size) for path in _IMAGE.value]  # a bad file is said at once
    trained = workdir.restore(folder, _STEP.value)
    question, truth = _PROMPT.value, None
    if _RECORD.value:
        picture, asked, answer = _record(trained, _RECORD.value)
        pictures.append(picture)
        if question is None:
            question, truth = asked, answer
    if question is None:
        raise config.InputError("--prompt is missing: what shall the model answer, or go on with?")
    prompts = [decode.prompt(trained, question, range(len(pictures)))] * _SAMPLES.value
    seeds = range(_SEED.value, _SEED.value + _SAMPLES.value)
    answers = decode.generate(trained, prompts, pictures, _MAX_NEW_TOKENS.value, sampling, seeds, _STOP.value)
    if truth is not None:
        print(f"question: {question}\ntruth:    {truth}")
    for answer in answers:
        goes_on = not trained.layout.size and not trained.run.model.source
        print(question + answer.text if goes_on else f"answer:   {answer.text}")


def _record(trained: workdir.Trained, name: str):
    """"test:0" -> (picture, its first question, the answer)."""
    split, _, number = name.rpartition(":")
    records = sources.open_split(trained.run.data, split)
    if not number.isdigit() or int(number) >= len(records):
        raise config.InputError(f"--record={name} must be {split}:0 to {split}:{len(records) - 1}")
    record = records[int(number)]
    _, question, answer = sources.questions(record)[0]
    return transforms.decode_picture(record["image"], trained.layout.size), question, answer


if __name__ == "__main__":
    command.run(main, required=("workdir",))
