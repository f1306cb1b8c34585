"""The options of preprocessing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.options import FLATTENED, NO_OPTION, YES_OR_NO
from megatron_mdm.corpus.chunk_reader import check_valid_fraction
from megatron_mdm.corpus.ids import MASK_KEY
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.token_files import FormatName, RawDtype


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How to preprocess.

    Attributes:
        workers: Processes that encode, 1 or more; 1 stays in this process.
        text_key: JSON key or column of the text.
        ids_key: JSON key or column of token ids, instead of text.
        format: Format of files of tokens; by default it is recognised.
        dtype: Type of raw tokens; by default it is recognised.
        split_at_eod: Cut tokens after each end-of-document id; by default files are cut, and rows
            are not.
        copy: Write tokens anew where they could stay.
        show: Documents of ids to show decoded before the job starts.
        split: The split of a data set or folder with several.
        append_eod: Whether to end every document with the end-of-document token.
        eod_token: Ends a document; by default the tokenizer's own.
        eod_first: Put that token before each document of text, not after it.
        max_tokens: Read text until there are so many tokens, to the end of a block of about a
            megabyte; None: all.
        on_error: What a record does that holds no valid text: it stops the job, or is counted.
        valid_fraction: Hold out this share in (0, 1), by a hash, as PREFIX-valid.
        hold_out_by: Hash of documents of ids: of these, or of the text that they spell, which is
            slower and divides as the text itself would be.
        task: The number, from 0, and the count of the tasks that share the inputs; None for one
            job over all of them.
        overwrite: Replace shards and unfinished jobs of something else.
        resume: Go on with an unfinished job, if there is one.
        progress: Whether to show a progress bar; None for only on a terminal.
    """

    workers: int = 1
    text_key: str = "text"
    ids_key: str | None = None
    format: FormatName | None = None
    dtype: RawDtype | None = None
    split_at_eod: Annotated[bool | None, YES_OR_NO] = None
    copy: bool = False
    show: int = 3
    split: str | None = None
    append_eod: Annotated[bool, NO_OPTION] = True
    eod_token: str | None = None
    eod_first: bool = False
    max_tokens: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    valid_fraction: float | None = None
    hold_out_by: Literal["ids", "text"] = "ids"
    task: Annotated[tuple[int, int] | None, NO_OPTION] = None
    overwrite: bool = False
    resume: bool = False
    progress: Annotated[bool | None, NO_OPTION] = None

    @property
    def key(self) -> RecordKey:
        """The key or column of the documents."""
        if self.ids_key is None:
            return RecordKey(self.text_key)
        return RecordKey(self.ids_key, "--ids-key", MASK_KEY)

    def check(self) -> None:
        """Checks the values.

        Raises:
            DataError: One is out of range.
        """
        if self.workers < 1:
            raise DataError(
                f"--workers={self.workers} has to be at least 1: use the number of free cores."
            )
        check_valid_fraction(self.valid_fraction)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"--max-tokens={self.max_tokens} has to be at least 1: ask for more.")
        if self.max_tokens is not None and self.task is not None:
            raise DataError("--max-tokens counts those of one job: leave it or the task out.")
        if self.show < 0:
            raise DataError(f"--show={self.show} has to be at least 0: use such as 3.")
        if self.task is not None and not 0 <= self.task[0] < self.task[1]:
            raise DataError(
                f"--task={self.task[0]} --num-tasks={self.task[1]}: a task is numbered from 0 and "
                "below the number of tasks: correct them."
            )

    def refuse_for_tokens(self) -> None:
        """Refuses what is for text alone.

        Raises:
            DataError: There is such an option, and the input is tokens.
        """
        for_text = {"--eod-first": self.eod_first, "--max-tokens": self.max_tokens}
        for name in (name for name, value in for_text.items() if value):
            raise DataError(f"{name} is for text and the input is tokens: leave it out.")


def find_array_task(
    task: int | None, num_tasks: int | None, *, from_slurm: bool
) -> tuple[int, int] | None:
    """Finds out which task of an array job this process is.

    Args:
        task: The number of the task, from 0, or None.
        num_tasks: The number of tasks, or None.
        from_slurm: Whether to read from the variables that SLURM sets in an array job: both
            numbers, or with `num_tasks` the task's alone, which then counts from 0.

    Returns:
        Number and count, or None for no array job.

    Raises:
        DataError: Only one of them is known, or the array is not numbered in steps of 1.
    """
    if not from_slurm:
        if task is None and num_tasks is None:
            return None
        if task is None or num_tasks is None:
            raise DataError("--task and --num-tasks belong together: give both or neither.")
        return task, num_tasks
    if task is not None:
        raise DataError("--array takes the place of --task: give one or the other.")
    if num_tasks is not None:
        return _read_slurm_numbers("TASK_ID")[0], num_tasks
    number, lowest, highest, count = _read_slurm_numbers(
        "TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_COUNT"
    )
    if highest - lowest + 1 != count:
        raise DataError(
            f"--array needs all numbers from {lowest} to {highest} and the array has {count}: "
            "submit all of them, or give the whole number with --num-tasks."
        )
    return number - lowest, count


def _read_slurm_numbers(*names: str) -> list[int]:
    remedy = "submit with sbatch --array=0-N, or use --task and --num-tasks."
    numbers = []
    for name in (f"SLURM_ARRAY_{name}" for name in names):
        text = os.environ.get(name)
        if text is None:
            raise DataError(f"--array finds no array job of SLURM ({name} is not set): {remedy}")
        if not (text.isascii() and text.isdigit()):
            raise DataError(f"--array reads {name}={text}, which is not a number: {remedy}")
        numbers.append(int(text))
    return numbers
