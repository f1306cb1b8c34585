"""Prompts, each perhaps with a suffix, from the command line or a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from megatron_mdm.core.errors import DataError

PromptsFormat = Literal["jsonl", "json", "text"]
STANDARD_INPUT = Path("-")

_FORM = "an object with prompt, and optionally suffix and length"


class Prompt(BaseModel):
    """One text to complete.

    Attributes:
        prompt: Text before the new tokens.
        suffix: Text after them, None for none.
        length: New tokens, None for as many as the options say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str
    suffix: str | None = None
    length: PositiveInt | None = None


def read_prompts(path: Path, form: PromptsFormat | None = None) -> list[Prompt]:
    """Reads the prompts of a file.

    Args:
        path: The file; `-` is the standard input.
        form: jsonl: one object per line; json: a list of such objects; text: one prompt per line.
            Blank lines are left out of jsonl and text. None: jsonl or json by the file's ending,
            otherwise text.

    Returns:
        At least one prompt.

    Raises:
        DataError: The file cannot be read, or a line of it has another form.
    """
    name = "the standard input" if path == STANDARD_INPUT else str(path)
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{name} line {line} is not UTF-8: convert the file.") from None
    except OSError as error:
        raise DataError(f"--prompts={path} cannot be read ({error.strerror}).") from None
    endings: dict[str, PromptsFormat] = {".jsonl": "jsonl", ".json": "json"}
    form = form or endings.get(path.suffix, "text")
    if form == "json":
        entries = _parse(text, name, "a list of objects")
        if not isinstance(entries, list):
            raise DataError(
                f"{name} holds {type(entries).__name__} at its top: write a list, each entry "
                f"{_FORM}."
            )
        prompts = [
            _check(entry, f"{name} entry {number}") for number, entry in enumerate(entries, 1)
        ]
    else:
        # Only line feeds end lines: JSON and prompts may hold other separators of Unicode.
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        prompts = [
            Prompt(prompt=line) if form == "text" else _from_line(line, f"{name} line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    if not prompts:
        raise DataError(f"{name} holds no prompt: give at least one.")
    return prompts


def _from_line(line: str, where: str) -> Prompt:
    return _check(_parse(line, where, _FORM), where)


def _parse(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}): write {wanted}.") from None


def _check(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {json.dumps(entry)[:60]}: write {_FORM}.")
    try:
        return Prompt.model_validate(entry)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field, kind = ".".join(map(str, problem["loc"])), problem["type"]
        if kind == "extra_forbidden":
            reason = f"has the unknown field {field!r}"
        elif kind == "missing":
            reason = f"has no {field}"
        else:
            value = json.dumps(problem["input"])[:60]
            reason = f"has {field}={value}, which {problem['msg'].replace('Input ', '', 1)}"
    raise DataError(f"{where} {reason}: write {_FORM}.")
