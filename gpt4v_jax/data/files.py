"""Data sets of files, by name: "llava:PATH.json", "jsonl:PATH.jsonl", "folder:DIR"; docs/data.md has the formats.

A split is opened by its index alone: a record is read, and its media are looked up, when it is asked for. So one bad
record is a BadRecord of its own, which a run counts and goes on. What a record names must lie in the media folder.
"""

import array
import contextlib
import dataclasses
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from gpt4v_jax import batch as batch_lib
from gpt4v_jax.config import InputError, nearest
from gpt4v_jax.data.transforms import BadMedium

SPLITS = ("train", "validation", "test")  # what stands for {split}
MARKER = re.compile(r"[\r\n]*<(image|video|audio)>[\r\n]*")
METADATA = ("metadata.jsonl", "captions.jsonl")  # of a folder
SUFFIXES = {
    "image": (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"),
    "audio": (".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"),
}
MEANT = {m: m for m in batch_lib.MEDIA} | {"picture": "image", "photo": "image", "clip": "video", "sound": "audio"}
SLIP = re.compile(rf"({'|'.join(MEANT)})s?(_?(file|path|filename))?s?")  # "image_id" is none
QUESTIONS = {"image": "describe the picture.", "video": "describe the clip.", "audio": "what is said?"}


class BadRecord(BadMedium):
    """A record that cannot be used. The message says why, `where` which: "PATH:LINE" or "PATH: record 17, id abc"."""

    def __init__(self, why: str, where: str):
        super().__init__(why)
        self.where = where


@dataclasses.dataclass(frozen=True)
class File:
    """A picture, clip or sound on disk, not yet read."""

    modality: str  # image | video | audio
    path: Path

    def read(self) -> bytes:
        """Raises BadMedium where the file is gone by now, or not readable."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BadMedium(f"{self.path} cannot be read: {error.strerror}") from error
        except MemoryError as error:
            raise BadMedium(f"{self.path} cannot be read: it is larger than the memory") from error


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, texts and media in their order, and its answer."""

    kind: str
    parts: tuple[str | File, ...]
    answer: str


def named(name: str) -> bool:
    """Whether a data set's name is that of files."""
    return name.partition(":")[0] in FORMS and ":" in name


def splits(name: str) -> list[str]:
    """-> those of SPLITS whose file, or folder, exists. A name without {split} has "train" alone."""
    return [split for split in (SPLITS if "{split}" in name else SPLITS[:1]) if _place(name, split)[1].exists()]


def open_split(name: str, split: str):
    """-> the records: len(), [i] -> {"where": ..., "turns": [Turn, ...]}, of some with "system"; raises BadRecord.

    Raises InputError where the file is missing, no JSON at all, or has no record."""
    if split not in SPLITS or (split != "train" and "{split}" not in name):
        known = SPLITS if "{split}" in name else SPLITS[:1]
        why = "" if "{split}" in name else ": write {split} into the path where it says train, validation or test"
        raise InputError(f"split {split!r} of {name} is none of: {', '.join(known)}{nearest(split, known)}{why}")
    form, path, media = _place(name, split)
    for needed, isdir in ((path, form == "folder"), (media, True)):
        if not (needed.is_dir() if isdir else needed.is_file()):
            raise InputError(f"{name}: {needed} is no {'folder' if isdir else 'file'}: correct the path")
    try:
        records = FORMS[form](path, media)
    except OSError as error:
        raise InputError(f"{name}: {error.filename} cannot be read: {error.strerror}") from error
    if not len(records):
        found = f"; files of {', '.join(sum(SUFFIXES.values(), ()))} are looked for" if form == "folder" else ""
        raise InputError(f"{name}: {path} has no record{found}")
    return records


def _place(name: str, split: str) -> tuple[str, Path, Path]:
    """-> (the form, the file or folder of the split, the folder of its media)."""
    form, _, rest = name.partition(":")
    if not rest:
        raise InputError(f"{name!r} has no path: write it after the colon")
    rest = rest.replace("{split}", split)
    if form == "folder":
        return form, Path(rest), Path(rest)
    before, at, after = rest.rpartition("@")
    path = Path(before if at else rest)
    return form, path, Path(after) if at else path.parent


@contextlib.contextmanager
def _at(where: str):
    """What is wrong with a medium or a text in this block is wrong with the record."""
    try:
        yield
    except BadRecord:
        raise
    except BadMedium as error:
        raise BadRecord(str(error), where) from error


class Lines:
    """A JSONL file by the offsets of its lines that are not blank. [i] -> (where, the line's dict)."""

    def __init__(self, path: Path):
        self._path, self._offsets, self._numbers = path, array.array("q"), array.array("q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    self._offsets.append(offset)
                    self._numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> tuple[str, dict]:
        where = f"{self._path}:{self._numbers[i]}"
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[i])
                line = file.readline()
            record = json.loads(line.decode("utf-8-sig"))
        except OSError as error:
            raise BadRecord(f"cannot be read: {error.strerror}", where) from error
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8: byte {line[error.start]:#04x}", where) from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"no JSON: {error}", where) from error
        if not isinstance(record, dict):
            raise BadRecord(f"{_short(record)} is no JSON object", where)
        return where, record


class Jsonl:
    """Lines of {"prefix", "suffix", "image"/"video"/"audio"}: one turn each."""

    def __init__(self, path: Path, media: Path):
        self._lines, self._media = Lines(path), media

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> dict:
        where, record = self._lines[i]
        with _at(where):
            media = _media(record, self._media)
            text, answer = _text("prefix", record.get("prefix", "")), _text("suffix", record.get("suffix"))
            missing = {m: max(len(files) - text.count(f"<{m}>"), 0) for m, files in media.items()}
            text = "".join(f"<{m}>" * count for m, count in missing.items()) + text
            return {"where": where, "turns": _turns(_kind(record), [(text, answer)], media)}


class Llava:
    """A JSON list of LLaVA's conversations, loaded whole."""

    def __init__(self, path: Path, media: Path):
        self._path, self._media = path, media
        try:
            # A byte that is not UTF-8 becomes half of a surrogate pair, which is refused in the record that has it.
            self._records = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is no JSON ({error}): llava: reads a JSON list, jsonl: lines") from error
        if not isinstance(self._records, list):
            raise InputError(f"{path} holds {_short(self._records)}, not a JSON list of conversations")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        where, record = f"{self._path}: record {i}", self._records[i]
        if isinstance(record, dict) and "id" in record:
            name = str(record["id"])
            where += f", id {name if name.isprintable() else _short(name)}"
        with _at(where):
            if not isinstance(record, dict):
                raise BadMedium(f"{_short(record)} is no JSON object")
            media = _media(record, self._media)
            system, asked = _asked(record.get("conversations"))
            return {"where": where, "system": system, "turns": _turns(_kind(record), asked, media)}


def _asked(messages) -> tuple[str, list[tuple[str, str]]]:
    """A record's conversations -> (the system message, with a line's end; or none; (question, answer) of each turn)."""
    if not isinstance(messages, list) or not messages:
        raise BadMedium(f"conversations={_short(messages)} is no list of messages, or empty")
    said = []
    for k, message in enumerate(messages):
        who = message.get("from") if isinstance(message, dict) else message
        if who not in ("system", "human", "gpt"):
            raise BadMedium(f"message {k} is from {_short(who)}, not human, gpt or system")
        said.append((who, _text(f"message {k}", message.get("value"), empty=who == "human")))
    system = said.pop(0)[1] + "\n" if said[0][0] == "system" else ""
    for k, (who, _) in enumerate(said):
        if who != ("human", "gpt")[k % 2]:
            raise BadMedium(f"turns do not alternate, human then gpt: number {k} is from {who}")
    if len(said) % 2 or not said:
        raise BadMedium("no answer at the end: the last message is not from gpt")
    texts = [text for _, text in said]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


class Folder:
    """Media files, each with its caption."""

    def __init__(self, path: Path, media: Path):
        self._path = path
        self._lines = [Lines(path / name) for name in METADATA if (path / name).is_file()]
        described = set()
        for i in range(sum(map(len, self._lines))):
            with contextlib.suppress(BadRecord):
                described.add(posixpath.normpath(str(self._line(i)[1].get("file_name"))))
        # A medium that no line names is a record, too: without a caption it is a bad one, not a forgotten one.
        found = (file.relative_to(path).as_posix() for file in path.rglob("*")
                 if _modality(file.name) and not file.is_dir())
        hidden = re.compile(r"(^|/)\.")
        self._files = sorted(name for name in found if name not in described and not hidden.search(name))

    def _line(self, i: int) -> tuple[str, dict]:
        for lines in self._lines:
            if i < len(lines):
                return lines[i]
            i -= len(lines)
        raise IndexError(i)

    def __len__(self) -> int:
        return sum(map(len, self._lines)) + len(self._files)

    def __getitem__(self, i: int) -> dict:
        described = sum(map(len, self._lines))
        if i < described:
            where, line = self._line(i)
            with _at(where):
                name, text = _text("file_name", line.get("file_name")), _text("text", line.get("text"))
                return self._record(where, name, text)
        name = self._files[i - described]
        where = str(self._path / name)
        with _at(where):
            beside = Path(name).with_suffix(".txt")
            if not (self._path / beside).is_file():
                raise BadMedium(f"no caption: there is no {beside}" + (", and no line names it" if self._lines else ""))
            text = File("text", _inside("caption", self._path, str(beside))).read()
            try:
                return self._record(where, name, _text(str(beside), text.decode("utf-8-sig").strip()))
            except UnicodeDecodeError as error:
                raise BadMedium(f"{beside} is not UTF-8: byte {text[error.start]:#04x}") from error

    def _record(self, where: str, name: str, caption: str) -> dict:
        modality = _modality(name)
        if not modality:
            raise BadMedium(f"file_name={name!r} does not end as a picture, clip or sound does")
        file = File(modality, _inside(modality, self._path, name))
        return {"where": where, "turns": [Turn("caption", (file, QUESTIONS[modality]), caption)]}


def _modality(name: str) -> str:
    """-> image, video or audio, by the suffix; "" for others."""
    return next((m for m, suffixes in SUFFIXES.items() if name.lower().endswith(suffixes)), "")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _text(name: str, value, empty: bool = False) -> str:
    """`value`, if it is text that can be used. JSON may hold half of a surrogate pair, which is no character."""
    if not isinstance(value, str):
        raise BadMedium(f"{name} is missing" if value is None else f"{name}={_short(value)} is no text")
    if not value.strip() and not (empty or name == "prefix"):
        raise BadMedium(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadMedium(f"{name} is not UTF-8: it holds {value[error.start]!r}") from error
    return value


def _kind(record: dict) -> str:
    return _text("kind", record.get("kind", "answer"))


def _media(record: dict, folder: Path) -> dict[str, list[File]]:
    """-> the files that a record names, by modality."""
    out = {}
    for key in record:  # a medium that a slip of the pen leaves out would be trained without
        slip = SLIP.fullmatch(key.strip().lower())
        if slip and key not in batch_lib.MEDIA:
            meant = MEANT[slip[1]]
            raise BadMedium(f"the field {key!r} is not known: write {meant!r}, with a list where there are several")
    for modality in batch_lib.MEDIA:
        given = record.get(modality)
        names = given if isinstance(given, list) else [] if given is None else [given]
        out[modality] = [File(modality, _inside(modality, folder, name)) for name in names]
    return out


def _inside(modality: str, folder: Path, name) -> Path:
    """-> the file's path, which must lie in the folder even when links are followed, and hold something."""
    if not isinstance(name, str) or not name:
        raise BadMedium(f"{modality}={_short(name)} is no path")
    try:
        home, path = folder.resolve(), (folder / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(home):
            raise BadMedium(f"{modality}={name!r} leads out of the media folder {folder}")
        size = path.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:  # no file; a character that no path has; links in a circle
        why = getattr(error, "strerror", None) or error
        raise BadMedium(f"{modality}={name!r} is not in the media folder {folder}: {why}") from error
    if not path.is_file():
        raise BadMedium(f"{modality}={name!r} is no file")
    if not size:
        raise BadMedium(f"{modality}={name!r} is empty: 0 bytes")
    return path


def _turns(kind: str, asked: list[tuple[str, str]], media: dict[str, list[File]]) -> list[Turn]:
    """(question with markers, answer) of each turn, and the media for the markers, in order -> Turns."""
    for modality, files in media.items():
        count = sum(question.count(f"<{modality}>") for question, _ in asked)
        if count != len(files):
            raise BadMedium(f"{count} <{modality}> in the text, and {len(files)} under {modality!r}")
    left = {modality: iter(files) for modality, files in media.items()}
    turns = [Turn(kind, tuple(_parts(question, left)), answer) for question, answer in asked]
    for k, turn in enumerate(turns):
        if not any(isinstance(part, File) or part.strip() for part in turn.parts):
            raise BadMedium(f"the question of turn {k} is empty")
    return turns


def _parts(text: str, left: dict[str, Iterator[File]]) -> Iterator[str | File]:
    for k, piece in enumerate(MARKER.split(text)):  # text, modality, text, modality, ..., text
        if k % 2:
            yield next(left[piece])
        elif piece:
            yield piece


FORMS = {"llava": Llava, "jsonl": Jsonl, "folder": Folder}
