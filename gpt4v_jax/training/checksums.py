"""A sha256 of every file of a folder, beside them, in the format of `sha256sum`.

Orbax restores flipped bits without a word, so a checkpoint carries checksums of its own. Anyone can look at them:
`cd checkpoints/400 && sha256sum -c checksums.sha256`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path

NAME = "checksums.sha256"


def write(folder: Path, last: str) -> None:
    """Writes the checksums of all files in `folder`; when this returns, all of it is on the disk, power cut or not.

    last: the file that the list ends with, so that a list that was cut short shows.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    names.sort(key=lambda name: name == last)
    digests = _in_threads(lambda name: _digest(folder / name, sync=True), names)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    _write_list(folder, dict(zip(names, digests, strict=True)))


def add(folder: Path, name: str, text: str) -> None:
    """Writes one more file, or one anew, into a folder with checksums: at any moment what is listed is whole."""
    listed = _read(folder)
    if listed.pop(name, None):
        _write_list(folder, listed)
    replace(folder / name, text)
    last = list(listed)[-1:]  # ends the list as before
    digests = {name: _digest(folder / name)} | {key: listed.pop(key) for key in last}
    _write_list(folder, listed | digests)


def damage(folder: Path, last: str, names: Iterable[str] | None = None) -> str:
    """-> "" when every listed file is what was written, else the first that is not, as "params/d/abc: is missing".

    names: look at these alone, such as a small file of a large folder. A file that is not listed is none of ours.
    """
    try:
        listed = _read(folder)
    except FileNotFoundError:
        return f"{NAME}: is missing"
    except OSError as error:
        return f"{NAME}: cannot be read ({error.strerror})"
    if last not in list(listed)[-1:]:
        return f"{NAME}: is not a whole list of checksums"
    names = list(listed if names is None else names)
    found = _in_threads(lambda name: _wrong(folder / name, listed.get(name)), names)
    return next((f"{name}: {wrong}" for name, wrong in zip(names, found, strict=True) if wrong), "")


def lists(folder: Path, name: str) -> bool:
    """Is the file one of those with a checksum? Not where there is no list, or a damaged one."""
    return (folder / NAME).is_file() and name in _read(folder)


def replace(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    sync(new)
    new.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_list(folder: Path, listed: dict[str, str]) -> None:
    replace(folder / NAME, "".join(f"{digest}  {name}\n" for name, digest in listed.items()))


def _read(folder: Path) -> dict[str, str]:
    """-> {name: digest}; empty for a text that `write` does not write: nothing is forgiven here, not even case."""
    text = (folder / NAME).read_bytes().decode(errors="surrogateescape")
    lines = [re.fullmatch(r"([0-9a-f]{64})  ([^\n]+)\n", line) for line in text.splitlines(keepends=True)]
    if None in lines:
        return {}
    return {line[2]: line[1] for line in lines}


def _wrong(path: Path, digest: str | None) -> str:
    try:
        same = _digest(path) == digest
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:  # no name of a file: a flipped bit made it
        return "is missing"
    return "" if same else "its content is not what was written (sha256 differs)"


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(work: Callable[[str], str], names: list[str]) -> list[str]:
    with futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(work, names))
