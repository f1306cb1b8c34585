"""A drill: a real run is killed again and again, and has to end as if it had never been.

Two runs are killed by SIGKILL: one of a single process, and one of two ranks under torchrun. The
single process is forked from a server that has imported the libraries and nothing more (a
`forkserver` of the standard library): it is a process of its own that runs `mdm train`, from
the command line on, and only the seconds of importing are saved. Under torchrun all is as ever.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import yaml
from safetensors.numpy import load_file

from megatron_mdm.checkpoint.storage import find_latest_checkpoint
from megatron_mdm.core.command_line import PROGRAM
from megatron_mdm.core.errors import CheckpointError, run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.training.command import pretrain

# A life is killed within so many of its steps, so that the drill ends in bounded time.
_MOST_STEPS_A_LIFE = 4
# A run may take so many times as long to its first step, or from one to the next, as the run that
# is left alone did on this machine; and on any machine so long.
_PATIENCE = 30.0
_LEAST_SILENCE_SECONDS = 30.0
_POLL_SECONDS = 0.001
# About as long as a save takes.
_LONGEST_WAIT_SECONDS = 0.01
_GLOBAL_BATCH_SIZE = 4
# Wide enough that a large part of each step is spent in its save.
_CONFIG: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 1000,
        "hidden_dropout": 0.1,
    },
    "objective": {"kind": "mdm"},
    "batch": {"micro_batch_size": 2, "global_batch_size": _GLOBAL_BATCH_SIZE},
    "optimizer": {"lr": 1e-3},
    "checkpoint": {"every_steps": 1, "keep_last": 2},
    "reporting": {"peak_tflops": 0.1},
}


@dataclass(frozen=True)
class DrillReport:
    """What a drilled run went through, and whether it shows.

    Attributes:
        name: Which run.
        kills: Times it was killed.
        kills_during_a_save: Times that this left an unfinished checkpoint behind.
        resumes: Starts that went on from a checkpoint.
        samples_lost: Samples of steps that are not in `metrics.jsonl`.
        samples_repeated: Samples of steps that it holds once too often.
        same_metrics: Does it hold the values of the run that was never killed, bit for bit?
        same_checkpoint: Do the last checkpoint and the ledger equal its own, bit for bit? False
            where the drill broke off before there was one to compare.
        leftovers: Temporary files that are still there.
        seconds: From the first start to the end.
        broke_off: Why the drill ended before its last kill; empty: it did not. Samples and metrics
            are then those of the steps so far.
    """

    name: str
    kills: int
    kills_during_a_save: int
    resumes: int
    samples_lost: int
    samples_repeated: int
    same_metrics: bool
    same_checkpoint: bool
    leftovers: int
    seconds: float
    broke_off: str = ""

    @property
    def passed(self) -> bool:
        """Does the run equal the one that was never killed?"""
        faults = self.samples_lost + self.samples_repeated + self.leftovers
        return self.same_metrics and self.same_checkpoint and not faults


def run_drill(folder: Path, kills: int, seed: int) -> list[DrillReport]:
    """Kills two small runs at random moments and compares them with runs that are left alone.

    Args:
        folder: Empty folder for data, runs and logs.
        kills: Number of kills, at least 2; a fifth of them, and at least one, under torchrun.
        seed: Of the moments and of the choice between one rank and all.

    Returns:
        A report of each run; one that fails by itself, or is interrupted, says so and is the last.

    Raises:
        CheckpointError: The folder is not empty, or a run that is left alone fails.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"--folder={folder} is not empty: give one that is, or a new one.")
    launched_kills = max(1, kills // 5)
    reports = []
    for name, start, number in (
        ("one process", _ForkedLife, kills - launched_kills),
        ("two ranks under torchrun", _LaunchedLife, launched_kills),
    ):
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        config = _write_run(place, num_steps=number * _MOST_STEPS_A_LIFE + _MOST_STEPS_A_LIFE)
        drill = _Drill(name, place, config, start, random.Random(f"{seed} {name}"))
        reports.append(drill.run(number))
        if reports[-1].broke_off:
            break
    return reports


class _Life(Protocol):
    """A run from one start to its end."""

    def status(self) -> int | None:
        """Exit status; None while the run lives."""

    def kill(self, moments: random.Random, silence_seconds: float) -> None:
        """Kills by SIGKILL, and waits for so long until nothing of the run is left."""


class _ForkedLife:
    def __init__(self, arguments: list[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_mdm.training.launch"])
        self._process = context.Process(target=_pretrain, args=(arguments, log))
        self._process.start()

    def status(self) -> int | None:
        return self._process.exitcode

    def kill(self, moments: random.Random, silence_seconds: float) -> None:
        del moments, silence_seconds
        self._process.kill()
        self._process.join()


class _LaunchedLife:
    def __init__(self, arguments: list[str], log: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words = [sys.executable, *launcher, str(PROGRAM), "train", *arguments]
        with log.open("ab") as output:
            self._process = psutil.Popen(words, stdout=output, stderr=output)

    def status(self) -> int | None:
        return self._process.poll()

    def kill(self, moments: random.Random, silence_seconds: float) -> None:
        ranks = self._process.children(recursive=True)
        if ranks and moments.random() < 0.5:
            # The other rank then waits for a lost peer until it notices, or the launcher ends it.
            moments.choice(ranks).kill()
            self._process.wait(silence_seconds)
        else:
            for process in (self._process, *ranks):
                process.kill()
            self._process.wait()
        psutil.wait_procs(ranks, silence_seconds)


class _Drill:
    def __init__(
        self,
        name: str,
        place: Path,
        config: Path,
        start: Callable[[list[str], Path], _Life],
        moments: random.Random,
    ) -> None:
        self._name = name
        self._config = config
        self._start_life = start
        self._moments = moments
        self._whole, self._killed = place / "whole", place / "killed"
        self._log = place / "killed.log"
        self._silence_seconds = _LEAST_SILENCE_SECONDS

    def run(self, kills: int) -> DrillReport:
        start_seconds, step_seconds = self._finish(self._whole)
        slowest = max(start_seconds, step_seconds)
        self._silence_seconds = max(_LEAST_SILENCE_SECONDS, _PATIENCE * slowest)
        started = time.monotonic()
        done = during_a_save = 0
        broke_off = ""
        try:
            for _ in range(kills):
                self._kill_once(start_seconds)
                done += 1
                during_a_save += bool(self._unfinished())
            self._finish(self._killed)
        except CheckpointError as failure:
            broke_off = str(failure)
        except KeyboardInterrupt:
            broke_off = "It was interrupted."
        return self._report(done, during_a_save, time.monotonic() - started, broke_off)

    def _kill_once(self, start_seconds: float) -> None:
        life = self._start(self._killed)
        try:
            self._wait_for_the_moment(life, start_seconds)
            if life.status() is not None:
                raise self._failure(f"ended with status {life.status()} before it was killed")
        finally:
            if life.status() is None:
                life.kill(self._moments, self._silence_seconds)

    def _start(self, run_dir: Path) -> _Life:
        arguments = ["--config", str(self._config), f"run.dir={run_dir}"]
        return self._start_life(arguments, self._log.with_name(f"{run_dir.name}.log"))

    def _finish(self, run_dir: Path) -> tuple[float, float]:
        """Lets a run come to its end; returns seconds to its first new step, and at most a step."""
        life = self._start(run_dir)
        step, since = _last_step(run_dir), time.monotonic()
        waits = []
        while (status := life.status()) is None:
            now = time.monotonic()
            if (found := _last_step(run_dir)) != step:
                waits.append(now - since)
                step, since = found, now
            time.sleep(10 * _POLL_SECONDS)
        if status:
            raise self._failure(f"ended with status {status} although it was not killed")
        return (waits[0] if waits else 0.0), max(waits[1:], default=0.0)

    def _wait_for_the_moment(self, life: _Life, start_seconds: float) -> None:
        """One of four: while it starts, between steps, and twice as it begins to save."""
        kind = self._moments.choice(("start", "step", "save", "save"))
        # metrics.jsonl may hold steps that are dropped when the run starts: count its checkpoints.
        first = _last_checkpoint(self._killed)
        num_steps = self._moments.randrange(_MOST_STEPS_A_LIFE - 1)
        kill_at = time.monotonic() + self._moments.uniform(0.0, start_seconds)
        left_behind = self._unfinished()
        deadline = time.monotonic() + self._silence_seconds

        def has_come() -> bool:
            steps = _last_checkpoint(self._killed) - first
            if kind == "start":
                return steps > 0 or time.monotonic() > kill_at
            if kind == "step":
                return steps > num_steps
            return steps >= num_steps and bool(self._unfinished() - left_behind)

        while not has_come() and life.status() is None:
            if time.monotonic() > deadline:
                raise self._failure(
                    f"made no step within {self._silence_seconds:.0f} s, {_PATIENCE:.0f} times "
                    "what the run that was left alone took"
                )
            time.sleep(_POLL_SECONDS)
        if kind != "start":
            time.sleep(self._moments.uniform(0.0, _LONGEST_WAIT_SECONDS))

    def _unfinished(self) -> set[tuple[str, int]]:
        """Unfinished checkpoints, each by name and inode: one of the same name may follow."""
        found = set()
        for path in (self._killed / "checkpoints").glob(".*.tmp"):
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
        return found

    def _failure(self, what: str) -> CheckpointError:
        return CheckpointError(f"The drill's run of {self._name} {what}: see {self._log.parent}.")

    def _report(
        self, kills: int, during_a_save: int, seconds: float, broke_off: str
    ) -> DrillReport:
        found, expected = (_curve(run_dir) for run_dir in (self._killed, self._whole))
        steps = [record["step"] for record in found]
        if broke_off:
            expected = [record for record in expected if record["step"] <= max(steps, default=0)]
        return DrillReport(
            name=self._name,
            kills=kills,
            kills_during_a_save=during_a_save,
            resumes=self._log.read_text(encoding="utf-8").count("; resuming from "),
            samples_lost=_GLOBAL_BATCH_SIZE * len({e["step"] for e in expected} - {*steps}),
            samples_repeated=_GLOBAL_BATCH_SIZE * (len(steps) - len({*steps})),
            same_metrics=found == expected,
            same_checkpoint=not broke_off and _same_end(self._killed, self._whole),
            leftovers=sum(1 for _ in self._killed.rglob(".*.tmp")),
            seconds=seconds,
            broke_off=broke_off,
        )


def _pretrain(arguments: list[str], log: Path) -> None:
    """What a forked process runs."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(file, stream)
    sys.exit(run_entry_point(lambda: run_command(pretrain, "A run to be killed.", arguments)))


def _write_run(place: Path, num_steps: int) -> Path:
    tokens = np.random.default_rng(0).integers(0, 1000, 3000)
    with ShardWriter(place / "tokens", np.uint16) as writer:
        writer.add_document(tokens)
        writer.finish()
    tree = _CONFIG | {
        # One thread: a model so small only waits for more.
        "run": {"dir": "unset", "seed": 1, "device": "cpu", "num_threads": 1},
        "data": {"train": [{"path": str(place / "tokens")}], "seq_length": 32},
        "schedule": {"steps": num_steps},
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _last_step(run_dir: Path) -> int:
    file = run_dir / METRICS_FILE_NAME
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _last_checkpoint(run_dir: Path) -> int:
    """Step of the checkpoint that a start would go on from, 0 without one."""
    path = find_latest_checkpoint(run_dir / "checkpoints")
    return int(path.name.removeprefix("step_")) if path is not None else 0


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    """All that a run logged but its speed."""
    return [
        {name: value for name, value in record.items() if not name.startswith("perf/")}
        for record in RunFolder(run_dir).records
    ]


def _same_end(run_dir: Path, other: Path) -> bool:
    ledgers = [(folder / "ledger.json").read_bytes() for folder in (run_dir, other)]
    return _last_tensors(run_dir) == _last_tensors(other) and ledgers[0] == ledgers[1]


def _last_tensors(run_dir: Path) -> dict[str, bytes]:
    # Tensors and not files: safetensors writes the metadata of a file in any order.
    checkpoint = find_latest_checkpoint(run_dir / "checkpoints")
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint is not None else []
    return {
        f"{file.parent.name}/{file.name}/{name}": value.tobytes()
        for file in files
        for name, value in load_file(file).items()
    }
