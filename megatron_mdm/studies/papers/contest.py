"""A contest: every contestant is tuned by as many trials, then trained over the same seeds.

All runs are those of sweeps, written into the contest's folder: a contest that was stopped goes on
where it was, and its sweeps can be submitted to a cluster one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mdm.core.errors import MdmError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.reporting.judged_windows import RAW_WEIGHTS
from megatron_mdm.studies.papers.contest_file import ContestFile
from megatron_mdm.studies.papers.contest_findings import JudgedRun, Way, judge_run
from megatron_mdm.studies.papers.contest_tuning import Tuner
from megatron_mdm.studies.steps import run_step

Fields = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        name: Of its run.
        fields: What was proposed.
        run: What it came to; None: it failed.
    """

    name: str
    fields: Fields
    run: JudgedRun | None

    @property
    def loss(self) -> float:
        """By which trials are chosen, nats per token; infinite where it failed."""
        return math.inf if self.run is None else self.run.chosen_loss


@dataclass(frozen=True)
class Result:
    """What a contestant, or a rung of the ladder, came to.

    Attributes:
        name: Of the contestant or rung.
        fields: What its runs set.
        runs: One a seed.
        trials: What it was chosen from; empty for a rung.
    """

    name: str
    fields: Fields
    runs: tuple[JudgedRun, ...]
    trials: tuple[Trial, ...] = ()


def tune(contest: ContestFile, jobs: int) -> dict[str, list[Trial]]:
    """Tunes every contestant.

    Args:
        contest: The contest.
        jobs: Runs at a time; 0 takes what has been run.

    Returns:
        The trials of each, in order.

    Raises:
        MdmError: Runs were stopped, or a configuration is not valid.
    """
    names = list(contest.contestants)
    tuners = {
        name: Tuner(contest.find_space(name), contest.seed * 1000 + number, contest.at_once)
        for number, name in enumerate(names)
    }
    trials: dict[str, list[Trial]] = {name: [] for name in names}
    points: dict[str, Fields] = {}
    for first in range(0, contest.trials, contest.at_once):
        size = min(contest.at_once, contest.trials - first)
        proposed = {name: tuners[name].propose(size) for name in names}
        for name in names:
            for place, fields in enumerate(proposed[name]):
                whole = contest.set | contest.contestants[name] | fields
                points[f"{name}-{first + place}"] = whole | {"run.seed": contest.seed}
        folder = run_points(contest, "trials", points, jobs)
        for name in names:
            for place, fields in enumerate(proposed[name]):
                label = f"{name}-{first + place}"
                found = judge_run(folder / find_twin(points, label), contest.seed)
                trials[name].append(Trial(label, fields, found))
            tuners[name].tell([trial.loss for trial in trials[name][first:]])
    return trials


def compete(contest: ContestFile, trials: Mapping[str, list[Trial]], jobs: int) -> list[Result]:
    """Trains the best setting of each contestant over the seeds.

    Args:
        contest: The contest.
        trials: Of `tune`.
        jobs: Runs at a time.

    Returns:
        What each came to, in the order of the file.

    Raises:
        MdmError: As `tune`, or all trials of a contestant failed.
    """
    chosen = {}
    for name, tried in trials.items():
        best = min(tried, key=lambda trial: trial.loss)
        if not math.isfinite(best.loss) and not jobs:
            raise MdmError(
                f"{contest.dir}/trials holds no finished trial of {name}: leave out --report-only."
            )
        if not math.isfinite(best.loss):
            raise MdmError(
                f"All {len(tried)} trials of {name} failed, so nothing can be compared: see "
                f"console.log in {contest.dir}/trials."
            )
        chosen[name] = contest.contestants[name] | best.fields
    runs = _run_over_seeds(contest, "finals", chosen, jobs)
    return [Result(name, chosen[name], runs[name], tuple(trials[name])) for name in chosen]


def climb(contest: ContestFile, jobs: int) -> list[Result]:
    """Trains the rungs of the ladder over the seeds; empty where there is none."""
    ladder = contest.ladder
    if ladder is None:
        return []
    fields, rungs = dict(ladder.start), {"start": dict(ladder.start)}
    raw_alone, counts = [], ladder.averages_from is None
    for name, more in [("start", {}), *ladder.rungs.items()]:
        counts = counts or name == ladder.averages_from
        if not counts:
            raw_alone.append(name)
        fields |= more
        rungs[name] = dict(fields)
    runs = _run_over_seeds(contest, "ladder", rungs, jobs, raw_alone)
    return [Result(name, rungs[name], runs[name]) for name in rungs]


def run_points(contest: ContestFile, part: str, points: Mapping[str, Fields], jobs: int) -> Path:
    """Runs what is not done of some points, as a sweep of its own.

    Args:
        contest: The contest.
        part: What the sweep is called.
        points: Fields of each run, by name; of two that are the same, one is run.
        jobs: Runs at a time; 0 takes what has been run.

    Returns:
        The folder of the runs.

    Raises:
        MdmError: The sweep was stopped, or is not valid.
    """
    root = Path(contest.dir)
    distinct = {name: dict(points[name]) for name in points if find_twin(points, name) == name}
    tree = {"base": contest.base, "dir": str(root / part), "axes": {"run": distinct}}
    root.mkdir(parents=True, exist_ok=True)
    file = root / f"{part}.yaml"
    write_text_whole(file, yaml.safe_dump(tree, sort_keys=False))
    if jobs:
        # 1: runs failed, such as one that diverged. A trial may; what is compared is looked for.
        run_step("sweep", "run", file, "--jobs", jobs, "--skip-failed", accepts=(0, 1))
    return root / part


def find_twin(points: Mapping[str, Fields], name: str) -> str:
    """The first point with the same fields, which may be the point itself."""
    told = json.dumps(points[name], sort_keys=True)
    return next(one for one in points if json.dumps(points[one], sort_keys=True) == told)


def _run_over_seeds(
    contest: ContestFile,
    part: str,
    settings: Mapping[str, Fields],
    jobs: int,
    raw_alone: Collection[str] = (),
) -> dict[str, tuple[JudgedRun, ...]]:
    points = {
        f"{name}_seed-{seed}": contest.set | fields | {"run.seed": seed}
        for name, fields in settings.items()
        for seed in contest.seeds
    }
    folder = run_points(contest, part, points, jobs)
    found: dict[str, tuple[JudgedRun, ...]] = {}
    remedy = f"see console.log of each in {folder}" if jobs else "leave out --report-only"
    for name in settings:
        ways = [Way(RAW_WEIGHTS, None)] if name in raw_alone else None
        runs = [
            judge_run(folder / find_twin(points, f"{name}_seed-{seed}"), contest.seed, ways)
            for seed in contest.seeds
        ]
        found[name] = tuple(run for run in runs if run is not None)
        if len(found[name]) < len(runs):
            raise MdmError(
                f"{part}: {len(runs) - len(found[name])} of {len(runs)} runs of {name} have no "
                f"held-out loss: {remedy}."
            )
    return found
