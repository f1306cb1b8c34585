"""A real corpus that every machine has: the sources of the Python standard library."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from megatron_mdm.core.errors import DataError, unreadable_error
from megatron_mdm.core.files import open_whole_file, write_errors
from megatron_mdm.data.manifest import Record, SourceFile

_LOG = logging.getLogger(__name__)
_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__")
)
_FINGERPRINT = "corpus.json"
_FILES = ("train.jsonl", "valid.jsonl")


class CorpusCounts(NamedTuple):
    """The size of a gathered corpus.

    Attributes:
        train_documents: The documents of train.jsonl.
        valid_documents: The documents of valid.jsonl.
        train_bytes: Their text as UTF-8.
        valid_bytes: Their text as UTF-8.
    """

    train_documents: int
    valid_documents: int
    train_bytes: int
    valid_bytes: int


class _Fingerprint(Record):
    """The content of corpus.json: what made a corpus, and the files as they were written."""

    what = "a corpus fingerprint"
    remedy = "remove it with its corpus or choose another --output."

    format_version: Literal[1] = 1
    valid_fraction: float
    functions: bool = False
    sources_sha256: str
    counts: CorpusCounts
    files: list[SourceFile]

    def describes(
        self, output: Path, valid_fraction: float, functions: bool, sources_sha256: str
    ) -> bool:
        return (
            self.valid_fraction == valid_fraction
            and self.functions == functions
            and self.sources_sha256 == sources_sha256
            and all((output / name).is_file() for name in _FILES)
            and all(
                SourceFile.of(output / name).has_content_of(file)
                for name, file in zip(_FILES, self.files, strict=True)
            )
        )


def gather_python_corpus(
    root: Path, output: Path, valid_fraction: float = 0.05, *, functions: bool = False
) -> CorpusCounts:
    """Writes train.jsonl and valid.jsonl with one document for each Python file of a folder.

    A document is `{"text": ..., "name": relative path}`; documents are sorted by name. A hash of
    the name decides what is held out, so a file stays on its side when others come and go. Tests,
    installed packages, empty files and files that are not UTF-8 are left out. Equal sources reuse
    what is there.

    Args:
        root: The folder to search, with its subfolders.
        output: The folder to write to, which is made if need be.
        valid_fraction: The share of files to hold out, in [0, 1).
        functions: Make a document of each function at the top level of a file instead, named
            `path:function`; files that this Python cannot parse have none.

    Returns:
        The size of both files.

    Raises:
        DataError: An argument is wrong, there are no Python files, or the output folder holds
            files of another origin or cannot be written to.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"--valid-fraction={valid_fraction} is outside [0, 1): use 0.05 or so.")
    if not root.is_dir():
        raise DataError(f"--root={root} is not a folder: give one that holds Python files.")
    sources_sha256 = _hash_sources(root)
    existing = _read_fingerprint(output)
    if existing and existing.describes(output, valid_fraction, functions, sources_sha256):
        _LOG.info("reusing %s: the same sources made it", output)
        return existing.counts
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        counts = _write(root, output, valid_fraction, functions)
        fingerprint = _Fingerprint(
            valid_fraction=valid_fraction,
            functions=functions,
            sources_sha256=sources_sha256,
            counts=counts,
            files=[SourceFile.of(output / name) for name in _FILES],
        )
        fingerprint.write(output / _FINGERPRINT)
    return counts


def _read_python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the relative name and the text of each file, sorted by name."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    for name in sorted(names):
        try:
            text = (root / name).read_bytes().decode("utf-8")
            name.encode("utf-8")
        except (UnicodeDecodeError, UnicodeEncodeError):
            continue
        except OSError as error:
            raise unreadable_error(root / name, error) from error
        if text:
            yield name, text


def _hash_sources(root: Path) -> str:
    digest = hashlib.sha256()
    empty = True
    for name, text in _read_python_files(root):
        empty = False
        content = text.encode("utf-8")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    if empty:
        raise DataError(f"--root={root} holds no Python sources: give a folder with .py files.")
    return digest.hexdigest()


def _is_held_out(name: str, valid_fraction: float) -> bool:
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")
    return number < valid_fraction * 2**64


def _list_functions(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the source of each function of a file, with its decorators."""
    try:
        with warnings.catch_warnings():
            # Old escapes in strings.
            warnings.simplefilter("ignore")
            nodes = ast.parse(text).body
    except (SyntaxError, ValueError):
        return
    # Not str.splitlines, which would divide at form feeds too.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield f"{name}:{node.name}", "\n".join(lines[first - 1 : node.end_lineno]) + "\n"


def _write(root: Path, output: Path, valid_fraction: float, functions: bool) -> CorpusCounts:
    num_documents = {True: 0, False: 0}
    num_bytes = {True: 0, False: 0}
    with (
        open_whole_file(output / "train.jsonl") as train,
        open_whole_file(output / "valid.jsonl") as valid,
    ):
        streams: dict[bool, BinaryIO] = {False: train, True: valid}
        for name, text in _read_python_files(root):
            held_out = _is_held_out(name, valid_fraction)
            for title, document in _list_functions(name, text) if functions else [(name, text)]:
                line = json.dumps({"text": document, "name": title}, ensure_ascii=False) + "\n"
                streams[held_out].write(line.encode("utf-8"))
                num_documents[held_out] += 1
                num_bytes[held_out] += len(document.encode("utf-8"))
    return CorpusCounts(
        num_documents[False], num_documents[True], num_bytes[False], num_bytes[True]
    )


def _read_fingerprint(output: Path) -> _Fingerprint | None:
    path = output / _FINGERPRINT
    if not path.exists():
        strangers = [output / name for name in _FILES if (output / name).exists()]
        if strangers:
            raise DataError(
                f"{strangers[0]} exists and no {_FINGERPRINT} says how it was made: remove it or "
                "choose another --output."
            )
        return None
    return _Fingerprint.read(path)
