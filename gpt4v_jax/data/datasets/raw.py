"""The raw files of a data set: found in the user's folder, else downloaded; each is verified before it is used.

A "file" is what holds the data: a plain file; FILE.gz, which stands for what it unpacks to; or a zip or a folder, which
stand for the files in them. Checksums are of that content, because the same content can be packed in many ways.
"""

import gzip
import hashlib
import importlib
import pathlib
import zipfile
import zlib
from collections.abc import Callable

from gpt4v_jax.config import InputError

Content = bytes | dict[str, bytes]


def manual_dir(dl_manager) -> str:
    """-> the user's folder of raw files, "" if there is none. TFDS's public `manual_dir` raises where there is no such
    folder; our own message is to name it."""
    return str(dl_manager._manual_dir or "")


def extra(name: str, module: str):
    """-> the module, of the packages that only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{name} is made with the package {module}, which is not there ({error}): "
                         f"pip install {module}") from error


def unpacked(path: pathlib.Path, folder: str = "") -> Content:
    """-> the bytes of a file; of a zip or a folder {name: bytes}, without the folders inside; of a zip only what is in
    its `folder`, if that is given."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    content = path.read_bytes()
    if content[:4] == b"PK\3\4":  # by what it is: a download's name has lost its suffix
        with zipfile.ZipFile(path) as packed:
            names = [pathlib.PurePosixPath(name) for name in packed.namelist() if not name.endswith("/")]
            return {name.name: packed.read(str(name)) for name in names if folder in ("", name.parent.name)}
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def digest(content: Content) -> str:
    """-> sha256 of bytes; of many files that of the list that `sha256sum *` prints in the folder (LC_ALL=C)."""
    if isinstance(content, dict):
        content = "".join(f"{digest(content[name])}  {name}\n" for name in sorted(content)).encode()
    return hashlib.sha256(content).hexdigest()


def read(name: str, folder: str, sha256: dict[str, str], manual: str, source: str,
         download: Callable[[str], str] | None = None) -> dict[str, Content]:
    """-> {file: content} of each file of `sha256` for the data set `name`.

    Each is looked for in the folder `manual` ("" means there is none) and in its subfolders `folder` and `name`, else
    fetched by `download(source + file)`, which returns a path; a source that ends in "#" is a zip that has the folder
    `file`. Where `download` is None, `source` is a sentence that says where the data come from and why that is no
    download.
    """
    looked_in = [pathlib.Path(manual) / sub for sub in ("", folder, name)] if manual else []
    where = ", ".join(map(str, looked_in)) or "no folder, since none was given"
    contents = {}
    for file, wanted in sha256.items():
        path = next((place / file for place in looked_in if (place / file).exists()), None)
        url, _, inner = (source + file).partition("#")
        remedy = f"Put {', '.join(sha256)} into a folder and set GPT4V_DATA_DIR or --config.data.dir to it"
        if path is None and download is None:
            raise InputError(f"{name}: looked for {file} in {where}; there is no download. {remedy}. {source}")
        try:
            path = path or pathlib.Path(download(url))
        except Exception as error:  # TFDS and requests raise many kinds: no network, 404, a proxy's refusal
            raise InputError(f"{name}: looked for {file} in {where}; then the download of {url} failed "
                             f"({type(error).__name__}). {remedy}") from error
        try:
            contents[file] = unpacked(path, inner)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} cannot be read ({error}). {name} needs {file}: {source}") from error
        found = digest(contents[file])
        if found != wanted:
            raise InputError(f"{path} is not the {file} of {name}: the sha256 of its content is {found}, wanted is "
                             f"{wanted}. Remove it and fetch it again: {source}")
    return contents
