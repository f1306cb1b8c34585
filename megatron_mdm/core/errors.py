"""The errors that users meet: one sentence with the field or file, value, rule and remedy."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mdm.core.launcher import LaunchError, adopt_launch

# Exit statuses besides 0, and besides 128 + n after the signal n.
EXIT_ERROR = 2
# A stop was asked for and the run can go on: EX_TEMPFAIL of sysexits.h.
EXIT_REQUEUE = 75
EXIT_HANG = 76
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or choose another folder"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another path"),
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.EISDIR: "a folder stands where a file should: move it away or choose another path",
    errno.ENOTDIR: "a file stands where a folder should: move it away or choose another path",
    errno.ENOENT: "check the path",
    errno.EMFILE: "allow the process more open files with ulimit -n",
}


class MdmError(Exception):
    """Base of every error that this project raises on purpose.

    Attributes:
        rank: The rank that alone met the error, None where every rank meets it alike.
        is_told: Does the user know already, from this rank or another?
    """

    rank: int | None = None
    is_told: bool = False


class ConfigError(MdmError):
    """A configuration that cannot be run: an unknown key, a bad value, sizes that do not divide."""


class DataError(MdmError):
    """A corpus, tokenizer or token shard that is missing, damaged or does not fit the run."""


class CheckpointError(MdmError):
    """A checkpoint that is missing, incomplete or does not fit the run."""


class ConversionError(MdmError):
    """A model that cannot be converted or loaded in the other format."""


class BadStepsError(MdmError):
    """Too many steps in a row whose loss or gradient cannot be used."""


class LostPeerError(MdmError):
    """A rank of the run died, or cannot be reached any more."""


class RunStopped(Exception):
    """A run that ended early because a signal asked for it; what is needed to go on is saved."""


def run_entry_point(main: Callable[[], int | None]) -> int:
    """Runs a command-line entry point and turns expected errors into one line and exit status 2.

    First the process learns its rank from the variables of whatever launcher started it. An error
    that all ranks meet alike is told by the first one. Characters that the standard output's
    encoding lacks are printed as escapes: a model's text may hold any.

    Args:
        main: The entry point. Returns its exit status, or None for success.

    Returns:
        The exit status of the process: 2 for an expected error, 75 for a run that was stopped and
        can go on, 130 after a Ctrl-C that nothing else answers, 141 if nobody reads its output any
        more.
    """
    try:
        _learn_rank()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        status = main() or 0
        # Here and not when Python ends: its failure would have a text and a status of its own.
        sys.stdout.flush()
        return status
    except RunStopped:
        return EXIT_REQUEUE
    except MdmError as error:
        if not error.is_told and error.rank is None and os.environ.get("RANK", "0") != "0":
            _let_the_first_rank_speak()
        tell(error)
        _hand_to_torchrun(error)
        return EXIT_ERROR
    except BrokenPipeError:
        # Who read the output, such as `head`, has seen enough: end as other programs do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        # A file that cannot be used is the user's to mend, whoever opened it.
        whose = os.fsdecode(error.filename)
        tell(MdmError(f"{whose} cannot be used ({error.strerror}): {find_remedy(error)}."))
        return EXIT_ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def note_problem(problems: list[str]) -> Iterator[None]:
    """Notes what a check in the block refuses, so that others can be made before all is said.

    Args:
        problems: Takes the sentence of a ConfigError or a ValueError.

    Yields:
        Nothing.
    """
    try:
        yield
    except (ConfigError, ValueError) as error:
        problems.append(str(error))


def join_problems(problems: Sequence[str]) -> str:
    """All that is wrong: a sentence a line, each once, of which `tell` makes an error each."""
    lines = [line for problem in problems for line in problem.splitlines()]
    return "\n".join(dict.fromkeys(lines))


def find_remedy(error: OSError) -> str:
    """What a user can do about a file that the system refuses.

    Args:
        error: The system's refusal.

    Returns:
        The end of a sentence.
    """
    return _REMEDIES.get(error.errno or 0, "check the storage and the path")


@contextmanager
def explain_write_errors(path: os.PathLike[str], kind: type[MdmError]) -> Iterator[None]:
    """Turns the system's errors in a block that writes into one sentence.

    Args:
        path: What is written.
        kind: The error to raise.

    Yields:
        Nothing.

    Raises:
        MdmError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise kind(f"{path} cannot be written ({reason}): {find_remedy(error)}.") from None


def first_line(error: Exception) -> str:
    """Shortens a library's error to its first line, or to its class where it says nothing.

    Args:
        error: The error.

    Returns:
        A part of a sentence, without the full stop.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def unreadable_error(path: Path, error: OSError) -> DataError:
    """Says that the system cannot read a file of the user's.

    Args:
        path: The file.
        error: The system's error.

    Returns:
        The error to raise.
    """
    return DataError(
        f"{path} cannot be read ({error.strerror or error}): check the file and its permissions."
    )


def tell(error: MdmError) -> None:
    """Says an expected error in one line, or in one for each sentence, unless that was done.

    Args:
        error: The error; it is told afterwards.
    """
    if error.is_told:
        return
    error.is_told = True
    whose = "" if error.rank is None else f"rank {error.rank}: "
    for line in str(error).splitlines():
        print(f"error: {whose}{line}", file=sys.stderr, flush=True)


def _let_the_first_rank_speak() -> None:
    # The launcher ends every rank when one exits. torchrun would show each one that its signal
    # ended as a failure of its own, in seven lines.
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(10)
    signal.signal(signal.SIGTERM, before)


def _hand_to_torchrun(error: MdmError) -> None:
    """Puts the sentence into the table that torchrun ends with, where it shows a hint instead.

    The traceback above the table is torchrun's own: no rank can prevent it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": f"error: {error}", "extraInfo": {"timestamp": f"{time.time():.0f}"}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")


def _learn_rank() -> None:
    try:
        adopt_launch()
    except LaunchError as error:
        raise ConfigError(str(error)) from None
