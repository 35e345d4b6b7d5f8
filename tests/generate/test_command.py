"""python -m gpt4v_jax.generate: its answers, and bad input."""

import ast
import importlib
import re

import pytest
from absl.testing import flagsaver

from gpt4v_jax import command
from gpt4v_jax.data import sources
from gpt4v_jax.data.transforms import BadMedium
from gpt4v_jax.generate import decode
from gpt4v_jax.model.layers import Turned
from gpt4v_jax.training import workdir
from tests.test_evaluate import folder  # noqa: F401

generate = importlib.import_module("gpt4v_jax.generate.__main__")


def say(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    """-> (exit status, stdout, stderr) of the command."""
    monkeypatch.setattr("sys.argv", ["generate", *map(str, args)])
    with flagsaver.flagsaver():
        try:
            command.run(generate.main, required=("workdir",))
            status = 0
        except SystemExit as ended:
            status = ended.code
    return status, *capsys.readouterr()


def test_a_record_is_asked_its_question(folder, capsys, monkeypatch):  # noqa: F811
    status, out, _ = say(capsys, monkeypatch, f"--workdir={folder}", "--record=test:3", "--max_new_tokens=4")
    record = sources.open_split(workdir.load_config(folder).data, "test")[3]
    _, question, answer = sources.questions(record)[0]
    assert status == 0 and out.startswith(f"question: {question}\ntruth:    {answer}\nanswer:   ")


def test_a_picture_file_is_the_record_s_picture(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The same picture as a file, and samples: sample i of one run is the first of a run with seed + i."""
    record = sources.open_split(workdir.load_config(folder).data, "test")[3]
    (tmp_path / "scene.png").write_bytes(record["image"])
    question = sources.questions(record)[0][1]
    both = [f"--workdir={folder}", f"--prompt={question}", "--temperature=1", "--max_new_tokens=6"]
    three = ["--num_return_sequences=3", "--seed=5"]
    _, out, _ = say(capsys, monkeypatch, *both, f"--image={tmp_path / 'scene.png'}", *three)
    _, same, _ = say(capsys, monkeypatch, *both, "--record=test:3", *three)
    _, last, _ = say(capsys, monkeypatch, *both, "--record=test:3", "--seed=7")
    answers = [text.strip() for text in out.split("answer:")[1:]]
    assert out == same and len(answers) == 3 and last.split("answer:")[1].strip() == answers[2]
    assert len(set(answers)) == 3


def test_flags_reach_the_sampling(folder, capsys, monkeypatch):  # noqa: F811
    """Each changes what is said of one question; the table of log-probabilities names the greedy token twice."""
    asked = [f"--workdir={folder}", "--prompt=where is the red digit?", "--max_new_tokens=8", "--record=test:3"]
    plain = say(capsys, monkeypatch, *asked)[1]

    def table(*more):
        """-> (a token's text, what is said of it beside it) of each token."""
        lines = say(capsys, monkeypatch, *asked, "--logprobs=2", *more)[1].splitlines()[3:]
        return [(ast.literal_eval(line.split(" -")[0].strip()), line.split("   of ")) for line in lines]

    tokens = table()
    assert len(tokens) > 2 and all(best.startswith(this[2:]) for _, (this, best) in tokens)
    word = tokens[0][0]
    assert word not in [text for text, _ in table(f"--bad_words={word}")]
    for flag in ("--no_repeat_ngram_size=1", "--guidance_scale=20", "--negative_prompt=what digit is it?"):
        more = ["--guidance_scale=-30"] if "negative" in flag else []
        status, out, _ = say(capsys, monkeypatch, *asked, flag, *more)
        assert status == 0 and out != plain, flag


def test_ways_heed_grammars_and_guidance(folder, capsys, monkeypatch):  # noqa: F811
    asked = [f"--workdir={folder}", "--prompt=where is the red digit?", "--max_new_tokens=8", "--record=test:3"]
    for way in ("--num_beams=2", "--prompt_lookup_num_tokens=2"):
        plain = say(capsys, monkeypatch, *asked, way)[1]
        status, out, _ = say(capsys, monkeypatch, *asked, way, "--guidance_scale=-30", "--negative_prompt=what is it?")
        assert status == 0 and out.splitlines()[-1] != plain.splitlines()[-1], way
    status, out, _ = say(capsys, monkeypatch, *asked, "--num_beams=2", "--regex=(dig){2}")
    assert status == 0 and "answer:   digdig" in out


def test_weights_of_8_bits(folder, capsys, monkeypatch):  # noqa: F811
    plain, seen = decode.generate, []

    def spy(trained, *args, **more):
        seen.append(trained.params["text"]["embed"]["table"])
        return plain(trained, *args, **more)

    monkeypatch.setattr(decode, "generate", spy)
    for more in ([], ["--weights=int8"], ["--weights=w8a8"]):
        asked = [f"--workdir={folder}", "--record=test:3", "--max_new_tokens=1", *more]
        assert say(capsys, monkeypatch, *asked)[0] == 0
    assert all(isinstance(table, Turned) for table in seen)
    assert [(str(table.values.dtype), table.digits) for table in seen] == [("float32", 2), ("int8", 2), ("int8", 1)]


def test_a_chat(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Each question is asked with all that was said; what goes wrong is said and changes nothing."""
    record = sources.open_split(workdir.load_config(folder).data, "test")[3]
    (tmp_path / "scene.png").write_bytes(record["image"])
    first, second = "what digit is the red one?", "where is the red digit?"
    lines = [f"/image {tmp_path / 'scene.png'}", first, f"/image {tmp_path / 'none.png'}", "/audio x.wav", "/jump",
             "x" * 900, "", second, "/new", second, "/exit", "never read"]  # fmt: skip
    asked = []

    def heard(trained, prompts, *args, **kwargs):
        asked.append(trained.tokenizer.decode(prompts[0].tokens))
        assert len(prompts[0].media) == (len(asked) < 4)
        return generated(trained, prompts, *args, **kwargs)

    generated, rest = generate.decode.generate, iter(lines)
    monkeypatch.setattr(generate.decode, "generate", heard)
    monkeypatch.setattr("builtins.input", lambda prompt: next(rest))
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", "--chat", "--max_new_tokens=4")
    said = out.splitlines()[1:]
    assert status == 0 and not err and next(rest) == "never read" and len(said) == 7
    answers = [said[i].removesuffix(" [length]") for i in (0, 5, 6)]
    errors = ("none.png: No such file", "reads no audio", "/jump is none of /image", "shorten it")
    assert all(line.startswith("error: ") and text in line for line, text in zip(said[1:5], errors, strict=True))
    assert [text.replace(" ", "") for text in asked if "xxx" not in text] == [
        text.replace(" ", "") for text in (first, first + answers[0] + second, second)
    ]


def test_a_record_whose_picture_is_damaged_is_named(folder, capsys, monkeypatch):  # noqa: F811
    def damaged(record):
        raise BadMedium("is no picture")

    name = workdir.load_config(folder).data.name
    monkeypatch.setattr(sources, "media_of", damaged)
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", "--record=test:3", "--prompt=x")
    assert (status, out) == (2, "") and err == f"error: record 3 of {name}: is no picture\n"


@pytest.mark.parametrize("args, message", [
    ([], "--prompt is missing"),
    (["--prompt=x", "--image={dir}/text.png"], "text.png"),
    (["--prompt=x", "--image={dir}/absent.png"], "absent.png"),
    (["--prompt=x", "--audio={dir}/text.png"], "reads no audio: leave --audio out"),
    (["--record=test:99999"], "--record=test:99999 must be test:0 to test:31"),
    (["--record=test:²"], "--record=test:² must be test:0 to test:31"),
    (["--record=tset:0"], "did you mean 'test'"),
    (["--prompt=x", "--num_return_sequences=0"], "num_return_sequences=0 must be 1 or more"),
    (["--prompt=x", "--seed=-1"], "seed=-1 must be 0 or more"),
    (["--prompt=x", "--temperature=-1"], "temperature=-1.0 must be from 0"),
    (["--prompt=" + "where is the red digit? " * 60], "context"),
    (["--prompt=x", "--step=3"], "has no step 3"),
    (["--prompt=x", "--regex=("], "regex='(' cannot be used"),
    (["--prompt=x", "--regex=a", "--choice=b"], "do not go together"),
    (["--prompt=x", "--num_beams=2", "--logprobs=1"], "--logprobs does not go with --num_beams"),
    (["--prompt=x", "--num_beams=2", "--stop_strings="], "a stop string is empty"),
    (["--prompt=x", "--prompt_lookup_num_tokens=2", "--stop_strings="], "a stop string is empty"),
    (["--prompt=x", "--prompt_lookup_num_tokens=2", "--choice=x"], "--choice does not go with speculative decoding"),
    (["--prompt=x", "--json_schema={dir}/none.json"], "none.json is no file with JSON"),
    (["--prompt=x", "--num_beams=0"], "num_beams=0 must be 1"),
    (["--prompt=x", "--top_p=0.5"], "--top_p says what is drawn, and nothing is"),
    (["--prompt=x", "--regex="], "regex='' matches nothing"),
    (["--prompt=x", "--num_return_sequences=2"], "greedy answers are one and the same"),
    (["--prompt=x", "--prompt_lookup_num_tokens=2", "--assistant_model=x"], "does not go with --assistant_model"),
    (["--prompt=x", "--prompt_lookup_num_tokens=0"], "prompt_lookup_num_tokens=0 must be 1"),
    (["--prompt=x", "--chat"], "--prompt does not go with --chat"),
    (["--prompt=x", "--negative_prompt=x"], "of --guidance_scale, which is off: set it"),
    (["--prompt=x", "--negative_prompt=x", "--guidance_scale=1"], "of --guidance_scale, which is off"),
    (["--prompt=x", "--num_beams=2", "--prompt_lookup_num_tokens=2"], "does not go with --num_beams"),
])  # fmt: skip
def test_bad_input(args, message, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "text.png").write_text("no picture")
    args = [arg.format(dir=tmp_path) for arg in args]
    status, out, err = say(capsys, monkeypatch, f"--workdir={folder}", *args)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not out


def test_beams_grammars_and_speculation(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Greedy by speculation is greedy; as many beams as asked for; what a grammar says holds, or the room was too
    small, which is said."""
    asked = [f"--workdir={folder}", "--prompt=where is the red digit?", "--max_new_tokens=8"]

    def answers(*flags):
        return [text.strip() for text in say(capsys, monkeypatch, *asked, *flags)[1].split("answer:")[1:]]

    (greedy,) = answers()
    status, out, _ = say(capsys, monkeypatch, *asked, "--prompt_lookup_num_tokens=3")
    assert status == 0 and "passes of the model" in out and out.split("answer:")[1].strip() == greedy
    assert answers(f"--assistant_model={folder}", "--num_assistant_tokens=3") == [greedy]
    three = ["--num_beams=3", "--num_return_sequences=2", "--early_stopping=True"]
    best = answers(*three)
    drawn = answers(*three, "--temperature=3", "--seed=5")
    assert len(best) == len(drawn) == 2 and answers(*three, "--temperature=3", "--seed=5") == drawn != best
    assert answers(*three, "--temperature=3", "--seed=6") != drawn
    # What the penalty changes stays the same; before a stop string the answer ends.
    law, n = ["--repetition_penalty=1.7", "--no_repeat_ngram_size=2"], len(greedy.removesuffix("[length]").strip())
    assert answers(*law, "--prompt_lookup_num_tokens=3") == answers(*law) != [greedy]
    stop = f"--stop_strings={greedy[n // 2 : n]}"
    assert answers(stop) == answers(stop, "--prompt_lookup_num_tokens=3") == [greedy[: n // 2].strip()]
    stop = f"--stop_strings={best[0].removesuffix('[length]').strip()[-2:]}"
    assert answers(*three, stop) != best
    assert answers("--choice=top", "--choice=left")[0] in ("top", "left")
    assert answers("--choice=undecided", "--max_new_tokens=1")[0].endswith(" [length]")
    assert re.fullmatch("[0-9]{2}", answers("--regex=[0-9]{2}")[0])
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    assert answers(f"--json_schema={tmp_path / 'schema.json'}")[0] in ("true", "false")
