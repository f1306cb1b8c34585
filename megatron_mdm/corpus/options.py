"""The options of preprocessing."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.ids import MASK_KEY
from megatron_mdm.corpus.records import RecordKey
from megatron_mdm.corpus.token_files import FormatName


@dataclass(frozen=True)
class PreprocessOptions:
    """How to preprocess.

    Attributes:
        workers: The processes that encode, 1 or more; 1 stays in this process.
        text_key: The JSON key or column that holds the text.
        ids_key: The JSON key or column that holds token ids, which are then not encoded; None for
            text, and for files of tokens.
        format: The format of files of tokens; None to recognise it.
        dtype: The type of raw tokens; None to recognise it.
        split_at_eod: Whether tokens are one stream that is cut after each end-of-document id; None
            for files of tokens, but not for rows.
        copy: Whether to write tokens anew even where the files that hold them can be read as they
            are.
        show: How many documents of ids to show decoded before the job starts.
        split: Which split of a saved `datasets` folder with several.
        append_eod: Whether to end every document with the end-of-document token.
        eod_token: That token; None for the tokenizer's own.
        on_error: Whether to stop at a record that holds no valid text, or to skip and count it.
        valid_fraction: The share of documents to hold out, in (0, 1); None for none.
        hold_out_by: What is hashed to divide documents of ids: these, or the text that they spell,
            which is slower and divides as the text itself would be.
        task: The number, from 0, and the count of the tasks that share the inputs; None for one
            job over all of them.
        overwrite: Whether to replace shards and unfinished jobs of something else.
        resume: Whether to go on with an unfinished job.
        progress: Whether to show a progress bar; None for only on a terminal.
    """

    workers: int = 1
    text_key: str = "text"
    ids_key: str | None = None
    format: FormatName | None = None
    dtype: str | None = None
    split_at_eod: bool | None = None
    copy: bool = False
    show: int = 3
    split: str | None = None
    append_eod: bool = True
    eod_token: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    valid_fraction: float | None = None
    hold_out_by: Literal["ids", "text"] = "ids"
    task: tuple[int, int] | None = None
    overwrite: bool = False
    resume: bool = False
    progress: bool | None = None

    def without_show(self) -> PreprocessOptions:
        """The same, showing no documents."""
        return dataclasses.replace(self, show=0)

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
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise DataError(
                f"--valid-fraction={self.valid_fraction} has to be between 0 and 1, both excluded: "
                "use such as 0.01, or leave it out."
            )
        if self.show < 0:
            raise DataError(f"--show={self.show} has to be at least 0: use such as 3.")
        if self.task is not None and not 0 <= self.task[0] < self.task[1]:
            raise DataError(
                f"--task={self.task[0]} --num-tasks={self.task[1]}: a task is numbered from 0 and "
                "below the number of tasks: correct them."
            )


def array_task(
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
        return _slurm_numbers("TASK_ID")[0], num_tasks
    number, lowest, highest, count = _slurm_numbers("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_COUNT")
    if highest - lowest + 1 != count:
        raise DataError(
            f"--array needs all numbers from {lowest} to {highest} and the array has {count}: "
            "submit all of them, or give the whole number with --num-tasks."
        )
    return number - lowest, count


def _slurm_numbers(*names: str) -> list[int]:
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
