"""Runs the stages of a proof within its time, and writes down at once what each command found.

Every measurement is a command of `tools/benchmark.py`, or another of the tools, in a process of its
own. A stage has one
file, NAME.json, which is written anew after each of its commands: whatever ends the proof costs the
command that ran. A proof that is called again goes on where it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import read_json, write_json_whole
from megatron_mdm.studies.steps import REPO

# How a command ended: by itself, with an error, at its stage's limit, or with the whole proof.
Status = Literal["done", "failed", "over_time", "broken_off"]
Report = dict[str, Any]

_SCRIPT = "tools/benchmark.py"
_LAST_ERROR_CHARACTERS = 4000
# So short a rest of the time is worth no start.
_LEAST_SECONDS = 2.0
_REMEDY = "remove it, and the stage is measured anew."


class Ask:
    """How a stage measures: it names a benchmark and its options, and gets the report.

    Args:
        record: The stage so far.
        run: Runs a command: words in, status and report or error out.
        save: Called after each command.
    """

    def __init__(
        self,
        record: StageRecord,
        run: Callable[[list[str]], Command],
        save: Callable[[], None],
    ) -> None:
        self._record = record
        self._run = run
        self._save = save

    def __call__(self, *words: object) -> Report | None:
        """Runs a benchmark, unless an earlier call of the proof has.

        Args:
            *words: Its name and its options; or another tool, such as `tools/sweep.py`.

        Returns:
            Its report, of another tool its `output`; None where there is none, which is written
            down and ends nothing else.

        Raises:
            OutOfTime: The stage or the proof is.
        """
        named = [str(word) for word in words]
        known = next((one for one in self._record.commands if one.words == named), None)
        if known is None:
            known = self._run(named)
            self._record.commands.append(known)
            self._save()
        if known.status in ("over_time", "broken_off"):
            raise OutOfTime(known.status)
        return known.report

    def choose(self, **chosen: Any) -> None:
        """Writes down what the stage decided from its reports.

        Args:
            **chosen: By name.
        """
        self._record.chosen |= chosen
        self._save()


class OutOfTime(Exception):
    """A command had to be ended."""


@dataclass
class Command:
    """A benchmark that was run.

    Attributes:
        words: Its name and options.
        status: How it ended.
        seconds: The time that it took.
        report: What it printed; None unless it ended by itself.
        error: The last lines of its standard error, if it did not.
    """

    words: list[str]
    status: Status
    seconds: float
    report: Report | None = None
    error: str | None = None


@dataclass
class StageRecord:
    """What is known of a stage: the contents of its file.

    Attributes:
        stage: Its name.
        is_done: Has it nothing left to measure?
        commands: In the order in which they were run.
        chosen: What was decided from them.
    """

    stage: str
    is_done: bool = False
    commands: list[Command] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> list[Command]:
        """Commands without a report."""
        return [one for one in self.commands if one.status != "done"]


class Stage(NamedTuple):
    """A part of the proof.

    Attributes:
        name: Of its file.
        minutes: What it may take.
        measure: Asks for benchmarks.
    """

    name: str
    minutes: float
    measure: Callable[[Ask], None]


def record_path(out: Path, stage: str) -> Path:
    """The file of a stage.

    Args:
        out: Folder of the proof.
        stage: Its name.
    """
    return out / f"{stage}.json"


def read_record(out: Path, stage: str) -> StageRecord:
    """Reads what is known of a stage.

    Args:
        out: Folder of the proof.
        stage: Its name.

    Returns:
        The record, an empty one without a file.

    Raises:
        DataError: The file is damaged.
    """
    path = record_path(out, stage)
    if not path.is_file():
        return StageRecord(stage)
    tree = read_json(path, _REMEDY)
    try:
        commands = [Command(**entry) for entry in tree.pop("commands")]
        return StageRecord(commands=commands, **tree)
    except (TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path} is no file of a proof: {_REMEDY}") from None


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    minutes: float,
    *,
    say: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
    again: bool = False,
) -> bool:
    """Runs stages until all are done or the time is over.

    Args:
        stages: In order.
        out: Folder that gets their files.
        minutes: For all of them.
        say: Shows a line.
        environment: Variables of the benchmarks.
        again: Run also commands again that failed or took too long before.

    Returns:
        Has every stage a report of each command?
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    is_whole = True
    for stage in stages:
        record = read_record(out, stage.name)
        if again and record.faults:
            record.is_done = False
            record.commands = [one for one in record.commands if one.status == "done"]
        if record.is_done:
            say(f"{stage.name}: done before")
        elif deadline - time.monotonic() < _LEAST_SECONDS:
            say(f"{stage.name}: no time left, call again to go on")
            is_whole = False
            continue
        else:
            _run_stage(stage, record, out, deadline, say, environment)
        is_whole = is_whole and record.is_done and not record.faults
    return is_whole


def _run_stage(
    stage: Stage,
    record: StageRecord,
    out: Path,
    deadline: float,
    say: Callable[[str], None],
    environment: Mapping[str, str],
) -> None:
    started = time.monotonic()
    # What ended with the proof begins anew.
    record.commands = [one for one in record.commands if one.status != "broken_off"]
    spent = sum(one.seconds for one in record.commands)
    own_deadline = started + 60 * stage.minutes - spent

    def save() -> None:
        write_json_whole(record_path(out, stage.name), _to_tree(record))

    def run(words: list[str]) -> Command:
        limit = min(deadline, own_deadline)
        status: Status = "over_time" if own_deadline < deadline else "broken_off"
        command = run_command_of_proof(words, limit - time.monotonic(), status, environment)
        ended = "" if command.status == "done" else f" {command.status.replace('_', ' ')}"
        say(f"{stage.name}: {command.seconds:.0f} s{ended}: {' '.join(words)}")
        return command

    try:
        stage.measure(Ask(record, run, save))
        record.is_done = True
    except OutOfTime as reason:
        # At its own limit a stage has what it has; with the proof's it goes on another time.
        record.is_done = str(reason) == "over_time"
    save()
    say(f"{stage.name}: {_summarize(record)} after {time.monotonic() - started:.0f} s")


def run_command_of_proof(
    words: list[str], seconds: float, at_limit: Status, environment: Mapping[str, str]
) -> Command:
    """Runs a benchmark in a process, with all that it starts ended at the limit.

    Args:
        words: Its name and options.
        seconds: The limit.
        at_limit: What to write down if it comes there.
        environment: Variables of the process.

    Returns:
        How it ended, and its report.
    """
    started = time.monotonic()
    if seconds < _LEAST_SECONDS:
        return Command(words, at_limit, 0.0, error="no time was left")
    is_benchmark = not words[0].endswith(".py")
    arguments = (
        [str(REPO / _SCRIPT), *words] if is_benchmark else [str(REPO / words[0]), *words[1:]]
    )
    with _process([sys.executable, *arguments], environment) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            _, errors = process.communicate()
            return Command(words, at_limit, time.monotonic() - started, error=_last(errors))
    spent = time.monotonic() - started
    report = None
    if process.returncode == 0:
        report = _read_report(output) if is_benchmark else {"output": output}
    if report is None:
        remark = f"status {process.returncode}\n{_last(errors)}"
        return Command(words, "failed", spent, error=remark)
    return Command(words, "done", spent, report)


def _read_report(output: str) -> Report | None:
    try:
        report: Report = json.loads(output)
    except ValueError:
        return None
    return report


@contextmanager
def _process(command: list[str], environment: Mapping[str, str]) -> Iterator[Any]:
    # A group of its own, so that ranks and workers end with it, but no session: whoever ends the
    # proof's session ends it too.
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill_group(process)
            process.communicate()


def _kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def _last(errors: str) -> str:
    return errors[-_LAST_ERROR_CHARACTERS:]


def _summarize(record: StageRecord) -> str:
    counts = {
        status: sum(one.status == status for one in record.commands)
        for status in ("done", "failed", "over_time", "broken_off")
    }
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    return told or "nothing to measure"


def _to_tree(record: StageRecord) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "is_done": record.is_done,
        "chosen": record.chosen,
        "commands": [vars(one) for one in record.commands],
    }
