"""Ask a trained model once, or talk with it.

python -m gpt4v_jax.generate --workdir runs/digits_world --image scene.png --prompt "what digit is the red one?"
python -m gpt4v_jax.generate --workdir runs/digits_world --chat
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from absl import flags

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import command, config
from gpt4v_jax.data import chat, mixture, sources
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import beam, constrain, decode, prompts, sample, speculative, weights
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
_CHAT = flags.DEFINE_bool("chat", False, "talk: /image FILE, /video FILE, /audio FILE show one with the next question, "
                          "/new begins anew, /exit or Ctrl-D ends")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, f"at most so many tokens; {decode.NEW_TOKENS} without "
                                       "max_length", allow_override=True)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "at most so many positions, the prompt's included")
_SEQUENCES = flags.DEFINE_integer("num_return_sequences", 1, "answers; answer i uses seed + i")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first answer")
_STOP = flags.DEFINE_multi_string("stop_strings", [], "a text before which the answer ends; may be given several times")
_BAD_WORDS = flags.DEFINE_multi_string("bad_words", [], "a text, blanks count, that does not come about; may be "
                                       "given several times")  # fmt: skip
_LOGPROBS = flags.DEFINE_integer("logprobs", None, "print each token's log-probability beside so many of the best ones")
_NEGATIVE = flags.DEFINE_string("negative_prompt", None, "the second prompt of guidance_scale; otherwise the first one "
                                "without its media, or its last token")  # fmt: skip
_DO_SAMPLE = flags.DEFINE_bool("do_sample", None, "draw, at temperature 1 if none is set; --nodo_sample is greedy")
_BEAMS = flags.DEFINE_integer("num_beams", 1, "beam search with so many beams; with a temperature "
                              "they are drawn")  # fmt: skip
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "of beams: above 0 long answers are favoured")
_EARLY = flags.DEFINE_enum("early_stopping", "False", ("False", "True", "never"), "of beams: True ends with the first "
                           "num_beams that are finished")  # fmt: skip
_LOOKUP = flags.DEFINE_integer("prompt_lookup_num_tokens", None, "speculative decoding: propose so many tokens that "
                               "stand in the text already")  # fmt: skip
_ASSISTANT = flags.DEFINE_string("assistant_model", None, "speculative decoding: the workdir of a smaller model of the "
                                 "same vocabulary, which proposes")  # fmt: skip
_ASSISTANT_TOKENS = flags.DEFINE_integer("num_assistant_tokens", 5, "so many tokens at a time")
_REGEX = flags.DEFINE_string("regex", None, "the answer matches this regular expression")
_CHOICES = flags.DEFINE_multi_string("choice", [], "the answer is one of these; may be given several times")
_SCHEMA = flags.DEFINE_string("json_schema", None, "the answer is JSON of the schema in this file")
_SAMPLING = {
    name: (flags.DEFINE_integer if isinstance(sample.OFF[name], int) else flags.DEFINE_float)(name, None, meaning)
    for name, meaning in {
        "temperature": "0, the default, is greedy; 1 draws by the model's own probabilities",
        "top_k": "draw among the k most probable tokens",
        "top_p": "draw among the most probable tokens with this mass",
        "min_p": "draw among tokens at least so many times as probable as the best",
        "typical_p": "draw among the tokens nearest to the entropy with this mass",
        "epsilon_cutoff": "draw among tokens at least so probable",
        "eta_cutoff": "draw among tokens with min(eta, sqrt(eta) exp(-entropy)) at least",
        "repetition_penalty": "above 1: what was said is less probable",
        "presence_penalty": "taken from the logits of what the answer has said",
        "frequency_penalty": "the same, as often as it was said",
        "no_repeat_ngram_size": "no so many tokens come twice",
        "min_new_tokens": "the answer has so many tokens at least",
        "guidance_scale": "above 1: away from what a second prompt would have",
    }.items()
}  # fmt: skip
_WEIGHTS = flags.DEFINE_enum("weights", "float32", weights.KINDS, "int8: a quarter of the memory; one answer "
                             "is faster, and differs a little; w8a8: eight are faster, too, and differ "
                             "more")  # fmt: skip
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; otherwise the best", allow_override=True)


def main() -> None:
    given = {name: flag.value for name, flag in _SAMPLING.items() if flag.value is not None}
    drawn = sample.Sampling(**given, do_sample=_DO_SAMPLE.value).temperature > 0  # bad values are said at once
    cuts = [name for name in sample.CUTS if name in given]
    if cuts and not drawn:
        raise config.InputError(f"--{cuts[0]} says what is drawn, and nothing is: set --temperature, or --do_sample")
    _check_ways()
    config.at_least(1, num_return_sequences=_SEQUENCES.value)
    config.at_least(0, seed=_SEED.value, logprobs=_LOGPROBS.value or 0)
    folder = Path(_WORKDIR.value)
    run = workdir.load_config(folder)
    layout = batch_lib.layout(run.model, run.data)
    for name, flag in _FILES.items():
        if flag.value and not layout.reads(name):
            raise config.InputError(f"the model in --workdir={folder} reads no {name}: leave --{name} out")
    files = [(name, _read(layout, name, path)) for name, flag in _FILES.items() for path in flag.value]
    trained = weights.turned(workdir.restore(folder, _STEP.value), _WEIGHTS.value)
    words = tuple(tuple(trained.tokenizer.encode(word)) for word in _BAD_WORDS.value)
    sampling = sample.Sampling(**given, do_sample=_DO_SAMPLE.value, bad_words_ids=words)
    _grammar()  # so is a bad one
    if _CHAT.value and not trained.chats:
        raise config.InputError(f"--workdir={folder} was trained on plain text and knows no turns: leave --chat out")
    (_chat if _CHAT.value else _ask)(trained, sampling, files)


def _ask(trained: workdir.Trained, sampling: sample.Sampling, files: list[tuple[str, bytes]]) -> None:
    """One question, its answers."""
    question, truth, second = _PROMPT.value, None, ()
    if _RECORD.value and question is None and not files:
        prompt, read, question, truth = _first_question(trained, *_record(trained, _RECORD.value))
    elif question is None:
        raise config.InputError("--prompt is missing: what shall the model answer, or go on with?")
    else:
        if _RECORD.value:
            files += _media_of(*_record(trained, _RECORD.value))
        media, read = prompts.attach(trained.layout, files)
        prompt = prompts.prompt(trained, question, media)
    if sampling.guidance_scale != 1:
        second = [_second(trained, prompt, question)]
    if _BEAMS.value != 1:
        answers = beam.generate(
            trained, [prompt], read, _MAX_NEW_TOKENS.value, _BEAMS.value, sampling, [_SEED.value], _STOP.value,
            max_length=_MAX_LENGTH.value, length_penalty=_LENGTH_PENALTY.value, num_return_sequences=_SEQUENCES.value,
            early_stopping="never" if _EARLY.value == "never" else _EARLY.value == "True", negative=second,
            grammar=_grammar(),
        )  # fmt: skip
    elif _speculates():
        answers = _speculate(trained, prompt, read, sampling, files, second)
    else:
        answers = _generate(trained, prompt, read, sampling, _SEED.value, negative=second, logprobs=_LOGPROBS.value,
                            num_return_sequences=_SEQUENCES.value)  # fmt: skip
    if truth is not None:
        print(f"question: {question}\ntruth:    {truth}")
    for answer in answers:
        goes_on = not trained.chats and not prompt.source and answer.finish in ("stop", "length")
        print(question + answer.text if goes_on else f"answer:   {_shown(answer)}")
        for token, logprob, best in zip(answer.tokens, answer.logprobs, answer.top, strict=False):
            others = ", ".join(f"{_name(trained, other)} {value:.3f}" for other, value in best)
            print(f"  {_name(trained, token)} {logprob:.3f}" + (f"   of {others}" if others else ""))


def _shown(answer: decode.Answer) -> str:
    """-> its text, and why it ends where no end token or stop string says so."""
    return answer.text if answer.finish == "stop" else f"{answer.text} [{answer.finish}]"


def _speculates() -> bool:
    return _LOOKUP.value is not None or _ASSISTANT.value is not None


def _check_ways() -> None:
    """Raises InputError for a flag that the chosen way of decoding would not heed."""
    grammars, guided = (_REGEX, _CHOICES, _SCHEMA), (_NEGATIVE, _SAMPLING["guidance_scale"])
    for way, chosen, others in (
        ("--chat", _CHAT.value, (_PROMPT, _RECORD, _LOGPROBS, _SEQUENCES, _BEAMS, _LOOKUP, _ASSISTANT, *guided)),
        ("--num_beams", _BEAMS.value != 1, (_LOGPROBS, _LOOKUP, _ASSISTANT)),
        ("--assistant_model", _ASSISTANT.value is not None, (_LOOKUP,)),
        ("speculative decoding", _speculates(), (_LOGPROBS, _SEQUENCES, *grammars)),
    ):
        for flag in others if chosen else ():
            if flag.present:
                raise config.InputError(f"--{flag.name} does not go with {way}: leave one of them out")
    for flag, needed, there in (
        (_NEGATIVE, "--guidance_scale", guided[1].value not in (None, 1)),
        (_LENGTH_PENALTY, "--num_beams", _BEAMS.value != 1), (_EARLY, "--num_beams", _BEAMS.value != 1),
        (_ASSISTANT_TOKENS, "--assistant_model", _ASSISTANT.present),
    ):  # fmt: skip
        if flag.present and not there:
            raise config.InputError(f"--{flag.name} says something of {needed}, which is off: set it, or leave "
                                     f"--{flag.name} out")  # fmt: skip


def _generate(trained: workdir.Trained, prompt: chat.Document, read, sampling: sample.Sampling, seed: int, **more):
    return decode.generate(trained, [prompt], read, _MAX_NEW_TOKENS.value, sampling, [seed], _STOP.value,
                           max_length=_MAX_LENGTH.value, grammar=_grammar(), **more)  # fmt: skip


def _grammar() -> constrain.Grammar | None:
    kinds = ((constrain.regex, _REGEX), (constrain.choices, _CHOICES), (_schema, _SCHEMA))
    given = [(make, flag.value) for make, flag in kinds if flag.present]
    if len(given) > 1:
        raise config.InputError("--regex, --choice and --json_schema do not go together: give one of them")
    return given[0][0](given[0][1]) if given else None


def _schema(path: str) -> constrain.Grammar:
    try:
        return constrain.json_schema(json.loads(Path(path).read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise config.InputError(f"--json_schema={path} is no file with JSON: {error}") from error


def _speculate(trained: workdir.Trained, prompt: chat.Document, read, sampling: sample.Sampling, files, second):
    """Says, too, how much of what was proposed was accepted."""
    draft, more = speculative.Lookup(_LOOKUP.value if _LOOKUP.value is not None else 1), {}
    if _ASSISTANT.value is not None:
        draft = weights.turned(workdir.restore(Path(_ASSISTANT.value)))
        if prompt.media and files:  # it may lay media otherwise
            media, draft_read = prompts.attach(draft.layout, files)
            more = {"draft_prompts": [prompts.prompt(draft, _PROMPT.value, media)], "draft_read": draft_read}
    answers, counts = speculative.generate(
        trained, [prompt], read, _MAX_NEW_TOKENS.value, draft, _ASSISTANT_TOKENS.value, sampling, [_SEED.value],
        _STOP.value, max_length=_MAX_LENGTH.value, negative=second, **more,
    )  # fmt: skip
    accepted, drafted, rounds = (int(x[0]) for x in (counts.accepted, counts.drafted, counts.rounds))
    said = len(answers[0].tokens)
    print(f"{said} tokens, {rounds + 1} passes of the model; {accepted} of {drafted} proposals accepted")
    return answers


def _name(trained: workdir.Trained, token: int) -> str:
    return repr(trained.tokenizer.decode([token]) or trained.tokenizer.token(token))


def _second(trained: workdir.Trained, prompt: chat.Document, question: str) -> chat.Document:
    """-> what guidance leads away from."""
    if _NEGATIVE.value is not None:
        return prompts.prompt(trained, _NEGATIVE.value)
    if prompt.media:
        return prompts.prompt(trained, question)
    return prompts.plain(prompt.tokens[-1:])


def _chat(trained: workdir.Trained, sampling: sample.Sampling, files: list[tuple[str, bytes]]) -> None:
    """Reads a line, answers it, and so on. What goes wrong with a line is said, and the conversation goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lines can be edited, and found again
    turns, shown, new = [], list(files), list(files)  # files of the whole conversation, of the next question
    print(f"step {trained.step}; {', '.join(['text', *trained.layout.media])}. --help tells what lines may begin with.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        what, _, path = line.partition(" ")
        try:
            if what in ("/exit", "/quit"):
                return
            if what == "/new":
                turns, shown, new = [], [], []
            elif what[1:] in batch_lib.MEDIA and what[0] == "/":
                found = (what[1:], _read(trained.layout, what[1:], path.strip()))
                shown, new = [*shown, found], [*new, found]
            elif line.startswith("/"):
                raise config.InputError(f"{what} is none of /image, /video, /audio, /new, /exit")
            elif line:
                media, read = prompts.attach(trained.layout, shown)
                asked = [*turns, ("user", [*media[len(shown) - len(new) :], line])]
                prompt = prompts.conversation(trained, asked)
                answer = _generate(trained, prompt, read, sampling, _SEED.value + len(turns) // 2)[0]
                print(_shown(answer))
                turns, new = [*asked, ("assistant", [answer.text])], []
        except (config.InputError, BadMedium) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("stopped: ask again, or /exit")


def _read(layout: batch_lib.Layout, modality: str, path: str) -> bytes:
    if not layout.reads(modality):
        raise config.InputError(f"this model reads no {modality}: leave {path} out")
    try:
        data = Path(path).read_bytes()
        prompts.attach(layout, [(modality, data)])
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
