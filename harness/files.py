"""Files: written whole or not at all, and JSON that is checked against its types before anything is computed from it.

A file may be broken, edited by hand, or written by another program. `read_json` checks it once, by msgspec.
"""

import codecs
import contextlib
import hashlib
import json
import os
import pathlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=2**31)]
Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Real = Annotated[float, Meta(ge=-1e38, le=1e38)]  # finite, and within float32
Name = Annotated[str, Meta(min_length=1)]
Items = list[tuple[Name, Index, Name]]  # [path, label, class name]
Split = dict[Literal["train", "val", "test"], Items]  # of a dataset, as CoOp's split files have it
# What the first bytes of predict.py's files have
MARKS = {".csv": b"path,class,confidence", ".safetensors": rb'"mao":"{\"classnames\"', ".onnx": b"\x12\x03MAO"}


class Lists(msgspec.Struct):
    """lists.json: the split of images of the user's own, and the items of --new-test."""

    split: Split | None
    new_test: Items | None


def atomic_write(path, content):
    """Puts text or bytes into `path`, whole or not at all. OSError: no room, or the folder cannot be written."""
    with open_atomic(path) as file, wrap_os_errors(path):
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomic(path):
    """A binary file beside `path`, which takes its place when all is written, and not at all after an error."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with wrap_os_errors(path):
            file = open(beside, "wb")  # noqa: SIM115  closed below
        try:
            yield file
        finally:
            with wrap_os_errors(path):
                file.close()
        with wrap_os_errors(path):
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def wrap_os_errors(path):
    """Turns an OSError of the block into a sentence: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): make room there, or give another --out") from error


def make_folder(folder):
    """Makes a folder, and those above it, where they do not exist. OSError: it cannot be made."""
    with wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def fingerprint(content):
    """SHA-256 of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_own(path, kind):
    """Whether predict.py may write a file: it is not there, it is empty, or predict.py wrote it. kind: its ending."""
    if not path.exists() and not path.is_symlink():
        return True
    if path.is_symlink() or not path.is_file():  # such as /dev/null
        return False
    with open(path, "rb") as file:
        start = file.read(200)
    if kind == ".csv":
        start = start.splitlines()[0].removeprefix(codecs.BOM_UTF8) if start else b""
        return start in (b"", MARKS[kind])
    return not start or MARKS.get(kind, b"") in start


def read_text(path, advice="get the file again", option=""):
    """A text file's content, without a byte order mark. option: "--names ", where the user named the file by it.

    FileNotFoundError: it cannot be read, or is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileNotFoundError(f"cannot read {option}{path} ({reason}): {advice}") from error


def read_json(path, kind, advice="get the file again", option=""):
    """The content of a JSON file, converted to a type that msgspec knows. Errors as `read_text` and `decode`."""
    return decode(read_text(path, advice, option), kind, f"{option}{path}", advice)


def decode(text, kind, where, advice):
    """A JSON text, converted to a type. where: the file, for the sentence. ValueError: it is broken or does not fit."""
    try:
        found = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=no_duplicate_keys)
        return msgspec.convert(found, kind)
    except (ValueError, RecursionError) as error:  # json's and msgspec's own errors are ValueErrors
        raise ValueError(f"{where} is broken ({str(error)[:300]}): {advice}") from error


def refuse_constant(constant):
    """ValueError: NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{constant} is not a number")


def no_duplicate_keys(pairs):
    """A dict of (key, value) pairs. ValueError: a key comes twice, or something is not a pair."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key}' is there twice")
        found[key] = value
    return found
