import dataclasses
import json

import pytest

from gpt4v_jax.config import InputError
from gpt4v_jax.data import files
from gpt4v_jax.data.files import BadRecord, File, Turn
from gpt4v_jax.data.transforms import BadMedium


@pytest.fixture
def folder(tmp_path):
    """A media folder, and outside of it a file that no record may reach."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("a.png", "b.png", "c.mp4", "d.wav"):
        (home / name).write_bytes(name.encode())
    (home / "empty.png").write_bytes(b"")
    (home / "link.png").symlink_to(tmp_path / "secret.png")
    (home / "good_link.png").symlink_to(home / "a.png")
    (home / "loop.png").symlink_to(home / "loop.png")
    (home / "sub.png").mkdir()
    return home


def llava(folder, *records, where="train.json"):
    (folder / where).write_text(json.dumps(records))
    return files.open_split(f"llava:{folder / where}", "train")


def jsonl(folder, *lines):
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    (folder / "train.jsonl").write_bytes(data)
    return files.open_split(f"jsonl:{folder / 'train.jsonl'}", "train")


def talk(*values, **fields):
    """A LLaVA record: human, gpt, human, ..."""
    who = ("human", "gpt")
    return fields | {"conversations": [{"from": who[k % 2], "value": value} for k, value in enumerate(values)]}


def names(turn):
    """A turn's parts, media as their files' names."""
    return [part if isinstance(part, str) else part.path.name for part in turn.parts]


def bad(records, i, *words):
    with pytest.raises(BadRecord) as error:
        records[i]
    assert isinstance(error.value, BadMedium)
    for word in words:
        assert word in str(error.value)
    return error.value.where


def test_llava(folder):
    record = talk("<image>\nWhat is it?", "A cat.", "And\n<image>\r\nlike <video>?", "No: <image>.", id="x7",
                  image=["a.png", "b.png"], video="c.mp4")  # fmt: skip
    found = llava(folder, record)[0]
    assert found["where"] == f"{folder / 'train.json'}: record 0, id x7"
    first, second = found["turns"]
    a = File("image", (folder / "a.png").resolve())
    assert first == Turn("answer", (a, "What is it?"), "A cat.")
    assert names(second) == ["And", "b.png", "like ", "c.mp4", "?"] and second.answer == "No: <image>."
    assert [part.modality for part in second.parts if isinstance(part, File)] == ["image", "video"]
    assert a.read() == b"a.png"
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.answer = "A dog."


def test_llava_system_and_kind(folder):
    record = talk("hello", "hi", kind="chat")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    found = llava(folder, record)[0]
    assert found["system"] == "Be brief.\n" and found["turns"] == [Turn("chat", ("hello",), "hi")]


def test_llava_media_elsewhere(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/train.json").write_text(json.dumps([talk("<audio>?", "one", audio="d.wav")]))
    records = files.open_split(f"llava:{tmp_path}/notes/train.json@{folder}", "train")
    assert names(records[0]["turns"][0]) == ["d.wav", "?"]
    bad(files.open_split(f"llava:{tmp_path}/notes/train.json", "train"), 0, "'d.wav'", "No such file")


@pytest.mark.parametrize("change, words", [
    ({"image": ["a.png"]}, ["2 <image>", "1 under 'image'"]),
    ({"image": ["a.png", "b.png", "a.png"]}, ["2 <image>", "3 under 'image'"]),
    ({"video": "c.mp4"}, ["0 <video>", "1 under 'video'"]),
    ({"conversations": None}, ["conversations"]),
    ({"conversations": []}, ["conversations"]),
    ({"conversations": [7]}, ["message 0"]),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "robot", "value": "y"}]}, ["message 1", "'robot'"]),
    ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, ["alternate", "number 0"]),
    ({"conversations": [{"from": "system", "value": "x"}]}, ["no answer"]),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]}, ["alternate", "number 1"]),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": 5}]}, ["message 1=5"]),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}, ["message 1 is empty"]),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "\ud800"}]}, ["not UTF-8"]),
    (talk("one", "two", "three"), ["no answer at the end"]),
    (talk("\n", "two", image=None), ["question of turn 0 is empty"]),
    ({"kind": 3}, ["kind=3"]),
])  # fmt: skip
def test_llava_bad_records(change, words, folder):
    good = talk("<image><image> which?", "the first", id=4, image=["a.png", "b.png"])
    records = llava(folder, good, good | change, "no object", good)
    assert len(records) == 4 and records[0]["turns"] == records[3]["turns"]
    assert bad(records, 1, *words) == f"{folder / 'train.json'}: record 1, id 4"
    assert bad(records, 2, "no JSON object") == f"{folder / 'train.json'}: record 2"


@pytest.mark.parametrize("name, shown", [
    ("caf\u00e9 7", "caf\u00e9 7"), ("a\n\x1b[31mskipped x:1", r"'a\n\x1b[31mskipped x:1'"), ("\udce9", r"'\udce9'"),
])  # fmt: skip
def test_an_id_writes_no_lines_of_its_own(name, shown, folder):
    records = llava(folder, talk("x", " ", id=name))
    assert bad(records, 0, "message 1 is empty") == f"{folder / 'train.json'}: record 0, id {shown}"


@pytest.mark.parametrize("name, word", [
    ("none.png", "No such file"), ("empty.png", "0 bytes"), ("../secret.png", "leads out"), ("link.png", "leads out"),
    ("x/../../secret.png", "leads out"), ("loop.png", ""), ("sub.png", "no file"), ("a\0.png", "null"), ("", "no path"),
    (3, "no path"), ({"a": 1}, "no path"), ("n" * 5000, "too long"), ("ABSOLUTE", "leads out"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["llava", "jsonl", "folder"])
def test_media_that_cannot_be_used(form, name, word, folder):
    if name == "ABSOLUTE":  # even where it lies inside
        name = str(folder / "a.png")
    if form == "llava":
        records = llava(folder, talk("<image>?", "x", image=name))
    elif form == "jsonl":
        records = jsonl(folder, {"prefix": "?", "suffix": "x", "image": [name]})
    else:
        if not isinstance(name, str) or not name.endswith(".png"):
            pytest.skip("no name of a picture")
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        records = files.open_split(f"folder:{folder}", "train")
    bad(records, 0, word, *([repr(name)] if isinstance(name, str) and name else []))


def test_links_within_the_folder_are_followed(folder):
    assert llava(folder, talk("<image>?", "x", image="good_link.png"))[0]["turns"][0].parts[0].read() == b"a.png"


def test_a_linked_media_folder_is_itself(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    (folder / "t.json").write_text(json.dumps([talk("<image>?", "x", image="a.png")]))
    assert files.open_split(f"llava:{tmp_path}/alias/t.json", "train")[0]["turns"]


def test_a_file_that_goes_away(folder):
    file = llava(folder, talk("<image>?", "x", image="a.png"))[0]["turns"][0].parts[0]
    (folder / "a.png").unlink()
    with pytest.raises(BadMedium, match="a.png cannot be read: No such file"):
        file.read()


def test_llava_bytes_that_are_no_utf8_spoil_one_record(folder):
    text = json.dumps([talk("caf\u00e9", "x"), talk("t\u00e9", "x")], ensure_ascii=False)
    (folder / "t.json").write_bytes(b"\xef\xbb\xbf" + text.encode().replace("t\u00e9".encode(), b"t\xe9"))
    records = files.open_split(f"llava:{folder}/t.json", "train")
    assert records[0]["turns"][0].parts == ("caf\u00e9",)
    bad(records, 1, "message 0", "not UTF-8")


@pytest.mark.parametrize("text, words", [
    ("[]", "has no record"), ('{"a": 1}', "not a JSON list"), ("[1,", "no JSON"), ("", "no JSON"),
    ("[" * 100_000, "no JSON"),
])  # fmt: skip
def test_llava_files_that_are_none(text, words, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        files.open_split(f"llava:{tmp_path}/t.json", "train")
    assert not isinstance(error.value, BadMedium) and str(tmp_path / "t.json") in str(error.value)


def test_jsonl(folder):
    records = jsonl(
        folder,
        b"\xef\xbb\xbf" + b'{"prefix": "what?", "suffix": "cat", "image": "a.png"}\r',
        b"  \r",
        {"prefix": "first <image>\nthen?", "suffix": "\u732b", "image": ["a.png", "b.png"], "kind": "compare"},
        {"suffix": "one", "audio": "d.wav", "video": "c.mp4"},
        {"prefix": "no media\u2028", "suffix": "x"},
    )
    assert len(records) == 4
    where = [records[i]["where"] for i in range(4)]
    assert where == [f"{folder / 'train.jsonl'}:{line}" for line in (1, 3, 4, 5)]
    turns = [turn for i in (3, 2, 1, 0) for turn in records[i]["turns"]][::-1]
    assert [names(turn) for turn in turns] == [
        ["a.png", "what?"], ["a.png", "first ", "b.png", "then?"], ["c.mp4", "d.wav"], ["no media\u2028"],
    ]  # fmt: skip
    assert [(turn.kind, turn.answer) for turn in turns] == [
        ("answer", "cat"), ("compare", "\u732b"), ("answer", "one"), ("answer", "x"),
    ]  # fmt: skip


@pytest.mark.parametrize("line, words", [
    (b"{", ["no JSON"]), (b"[1]", ["no JSON object"]), (b'"x"', ["no JSON object"]), (b"[" * 100_000, ["no JSON"]),
    (b'{"prefix": "x"}', ["suffix is missing"]), (b'{"prefix": "x", "suffix": ""}', ["suffix is empty"]),
    (b'{"prefix": "x", "suffix": 4}', ["suffix=4"]), (b'{"prefix": 4, "suffix": "x"}', ["prefix=4"]),
    (b'{"suffix": "x"}', ["question", "empty"]), (b'{"prefix": "x", "suffix": "\xe9"}', ["not UTF-8", "0xe9"]),
    (b'{"prefix": "\\ud800", "suffix": "x"}', ["prefix is not UTF-8"]),
    (b'{"prefix": "<image> <image>", "suffix": "x", "image": "a.png"}', ["2 <image>", "1 under 'image'"]),
    (b'{"prefix": "what?", "suffix": "a", "images": ["a.png"]}', ["'images' is not known", "write 'image'"]),
    (b'{"prefix": "what?", "suffix": "a", "Audio": "a.wav"}', ["'Audio' is not known", "write 'audio'"]),
    (b'{"prefix": "what?", "suffix": "a", "image ": "a.png"}', ["'image ' is not known", "write 'image'"]),
    (b'{"prefix": "what?", "suffix": "a", "image_path": "a.png"}', ["'image_path' is not known", "write 'image'"]),
    (b'{"prefix": "what?", "suffix": "a", "picture": "a.png"}', ["'picture' is not known", "write 'image'"]),
])  # fmt: skip
def test_jsonl_bad_lines(line, words, folder):
    good = {"prefix": "x", "suffix": "y"}
    records = jsonl(folder, good, line, good)
    assert len(records) == 3 and records[2]["turns"] == [Turn("answer", ("x",), "y")]
    assert bad(records, 1, *words) == f"{folder / 'train.jsonl'}:2"


def test_other_fields_are_of_no_concern(folder):
    records = jsonl(folder, {"prefix": "x", "suffix": "y", "image_id": 3, "video_fps": 2, "source": "z"})
    assert records[0]["turns"] == [Turn("answer", ("x",), "y")]


def test_jsonl_is_not_held_in_memory(folder):
    records = jsonl(folder, {"prefix": "x", "suffix": "y"})
    (folder / "train.jsonl").write_text('{"prefix": "x", "suffix": "z"}\n')
    assert records[0]["turns"][0].answer == "z"
    (folder / "train.jsonl").unlink()
    bad(records, 0, "No such file")


def test_jsonl_without_a_line(folder):
    with pytest.raises(InputError, match="no record"):
        jsonl(folder, b" ")


def test_folder(tmp_path):
    for name in ("b.JPG", "a/z.wav", "a/c.mp4", ".hidden.png", "a/.dir/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
        (tmp_path / name).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf" + f" caption of {name}\r\n".encode())
    records = files.open_split(f"folder:{tmp_path}", "train")
    assert [records[i]["where"] for i in range(len(records))] == [
        str(tmp_path / name) for name in ("a/c.mp4", "a/z.wav", "b.JPG")
    ]
    turns = [records[i]["turns"][0] for i in range(3)]
    assert [names(turn) for turn in turns] == [
        ["c.mp4", "describe the clip."], ["z.wav", "what is said?"], ["b.JPG", "describe the picture."],
    ]  # fmt: skip
    assert [(turn.kind, turn.answer, turn.parts[0].modality) for turn in turns] == [
        ("caption", "caption of a/c.mp4", "video"), ("caption", "caption of a/z.wav", "audio"),
        ("caption", "caption of b.JPG", "image"),
    ]  # fmt: skip


@pytest.mark.parametrize("metadata", files.METADATA)
def test_folder_with_metadata(metadata, folder, tmp_path):
    lines = [{"file_name": ".//b.png", "text": "two"}, {"file_name": "a.png"}, 3, {"file_name": "x.doc", "text": "x"},
             {"file_name": "d.wav", "text": "words"}]  # fmt: skip
    (folder / metadata).write_text("\n".join(map(json.dumps, lines)))
    (folder / "c.txt").write_text("a clip")
    (folder / "good_link.txt").write_bytes(b"\xe9")
    (folder / "link.txt").write_text("")
    (folder / "loop.txt").symlink_to(tmp_path / "secret.png")
    records = files.open_split(f"folder:{folder}", "train")
    assert names(records[0]["turns"][0]) == ["b.png", "describe the picture."]
    assert records[0]["turns"][0].answer == "two" and records[4]["turns"][0].answer == "words"
    assert bad(records, 1, "text is missing") == f"{folder / metadata}:2"
    bad(records, 2, "no JSON object")
    bad(records, 3, "'x.doc'")
    rest = {}  # what no line names
    for i in range(5, len(records)):
        try:
            rest[records[i]["where"].removeprefix(f"{folder}/")] = records[i]["turns"][0].answer
        except BadRecord as error:
            rest[error.where.removeprefix(f"{folder}/")] = str(error)
    assert rest.pop("c.mp4") == "a clip"
    assert "good_link.txt is not UTF-8" in rest.pop("good_link.png")
    assert "link.txt' is empty" in rest.pop("link.png")
    assert "loop.txt' leads out" in rest.pop("loop.png")
    assert "no empty.txt, and no line names it" in rest.pop("empty.png")
    assert not rest  # the folder sub.png is no medium


def test_folder_of_nothing(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(InputError, match="no record.*.png"):
        files.open_split(f"folder:{tmp_path}", "train")


def test_names_and_splits(tmp_path):
    assert all(map(files.named, ("llava:a.json", "jsonl:a.jsonl", "folder:a")))
    assert not any(map(files.named, ("mnist", "tfds:mnist", "llava", "folders:x", "digits_world/small")))
    for split in ("test", "train"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prefix": split, "suffix": "y", "image": "a.png"}))
        (tmp_path / f"{split}_media").mkdir()
        (tmp_path / f"{split}_media/a.png").write_text(split)
    name = f"jsonl:{tmp_path}/{{split}}.jsonl@{tmp_path}/{{split}}_media"
    assert files.splits(name) == ["train", "test"]
    assert files.splits(f"jsonl:{tmp_path}/test.jsonl") == ["train"] and files.splits(f"folder:{tmp_path}/none") == []
    turn = files.open_split(name, "test")[0]["turns"][0]
    assert turn.parts[0].read() == b"test" and turn.parts[1] == "test"
    for split, word in (("validation", "validation.jsonl is no file"), ("vaildation", "did you mean 'validation'")):
        with pytest.raises(InputError, match=word):
            files.open_split(name, split)
    with pytest.raises(InputError, match="{split}"):
        files.open_split(f"jsonl:{tmp_path}/test.jsonl", "test")
    with pytest.raises(InputError, match="none is no folder"):
        files.open_split(f"jsonl:{tmp_path}/test.jsonl@{tmp_path}/none", "train")
    with pytest.raises(InputError, match="test.jsonl is no folder"):
        files.open_split(f"folder:{tmp_path}/test.jsonl", "train")
    for name in ("folder:", "llava:"):
        with pytest.raises(InputError, match="no path"):
            files.open_split(name, "train")
