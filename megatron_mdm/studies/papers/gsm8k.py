"""GSM8K as prompts and responses.

Its lines are `{"question", "answer"}`; an answer is a chain of reasoning, in which calculations are
annotated (`48/2 = <<48/2=24>>24`), and a last line `#### 72`. The augmented set that arXiv
2410.18514 fine-tunes on has one text line per problem instead, `question||<<48/2=24>> #### 72`: the
annotations are the whole chain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.files import write_text_whole

Style = Literal["text", "annotated", "equations"]
HUB_NAME = "openai/gsm8k"
_HUB_SUBSET = "main"
_MARK = "####"
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_FORM = 'write {"question": ..., "answer": "... #### 72"} a line'


class Problem(NamedTuple):
    """A problem of the set.

    Attributes:
        question: The text.
        reasoning: What leads to the answer, annotations included.
        answer: What stands after `####`.
    """

    question: str
    reasoning: str
    answer: str

    def framed(self, style: Style) -> dict[str, str]:
        """As a prompt-response pair.

        Args:
            style: `text`: the reasoning without its annotations; `annotated`: as it is;
                `equations`: the annotations alone.

        Returns:
            `prompt`, `response` and `answer`. The prompt ends where the response's first token
            begins with a space, as tokenizers have it within a text.

        Raises:
            DataError: There are no annotations, and nothing would be left.
        """
        reasoning = self.reasoning
        if style == "text":
            reasoning = _ANNOTATION.sub("", reasoning)
        elif style == "equations":
            reasoning = " ".join(_ANNOTATION.findall(reasoning))
            if not reasoning:
                raise DataError(
                    f"The problem {self.question[:60]!r} has no annotations such as <<48/2=24>>: "
                    "use --style text."
                )
        gap = " " if style == "equations" else "\n"
        return {
            "prompt": f"Question: {self.question}\nAnswer:",
            "response": f" {reasoning}{gap}{_MARK} {self.answer}",
            "answer": self.answer,
        }


def convert(problems: Iterator[Problem], output: Path, style: Style) -> int:
    """Writes prompt-response pairs for mdm prepare-finetuning and mdm evaluate-math.

    Args:
        problems: Any number.
        output: A `.jsonl` file to create or replace, whole or not at all.
        style: See `Problem.framed`.

    Returns:
        How many there were.

    Raises:
        DataError: A problem cannot be used, there is none, or the file cannot be written.
    """
    lines = [json.dumps(one.framed(style), ensure_ascii=False) for one in problems]
    if not lines:
        raise DataError(f"The input holds no problem: {_FORM}.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(output, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise DataError(
            f"--output={output} cannot be written ({error.strerror}): choose another place."
        ) from None
    return len(lines)


def read_source(paths: Sequence[Path], hub: str, split: str | None) -> Iterator[Problem]:
    """Reads problems from files, or from the hub.

    Args:
        paths: As for `read_problems`.
        hub: As for `read_hub`.
        split: As for `read_hub`; None: read the files.

    Returns:
        The problems.

    Raises:
        ConfigError: Neither files nor a split are given, or both.
    """
    if bool(paths) == (split is not None):
        given = "both are" if paths else "neither is"
        raise ConfigError(f"Give files with --input or a split of the hub with --split: {given}.")
    return read_problems(paths) if split is None else read_hub(hub, split)


def read_problems(paths: Sequence[Path]) -> Iterator[Problem]:
    """Reads problems from files.

    Args:
        paths: `.jsonl` in the form of the set, or `.txt` in that of the augmented one.

    Yields:
        The problems, file by file.

    Raises:
        DataError: A file cannot be read, or a line has another form.
    """
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--input={path} cannot be read ({error}): give a text file.") from None
        # Only line feeds end lines: JSON may hold other separators of Unicode.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                name = f"{path} line {number}"
                read = _from_text if path.suffix == ".txt" else _from_json
                yield read(line.strip(), name)


def read_hub(name: str, split: str) -> Iterator[Problem]:
    """Reads problems from the hub, or from what was fetched of it before.

    Args:
        name: Such as `openai/gsm8k`.
        split: `train` or `test`.

    Yields:
        The problems, in order.

    Raises:
        DataError: They cannot be fetched, or have another form.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, _HUB_SUBSET, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"The split {split} of {name} cannot be fetched ({reason}): give files with --input."
        ) from None
    for number, row in enumerate(rows, 1):
        yield _from_fields(row, f"{name} row {number}")


def _from_json(line: str, name: str) -> Problem:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON ({error}): {_FORM}.") from None
    if not isinstance(fields, dict):
        raise DataError(f"{name} is no JSON object: {_FORM}.")
    return _from_fields(fields, name)


def _from_fields(fields: dict[str, Any], name: str) -> Problem:
    for key in ("question", "answer"):
        if not isinstance(fields.get(key), str):
            raise DataError(f"{name} has no text {key!r}: {_FORM}.")
    return _problem(fields["question"], fields["answer"], name)


def _from_text(line: str, name: str) -> Problem:
    question, bars, answer = line.partition("||")
    if not bars:
        raise DataError(f"{name} has no '||' between question and answer: write both in a line.")
    return _problem(question, answer, name)


def _problem(question: str, solution: str, name: str) -> Problem:
    reasoning, mark, answer = (part.strip() for part in solution.rpartition(_MARK))
    if not mark or not answer or not question.strip():
        missing = "question" if not question.strip() else "answer after '####'"
        raise DataError(f"{name} has no {missing}: {_FORM}.")
    return Problem(question.strip(), reasoning, answer)
