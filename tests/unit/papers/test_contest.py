"""Contests: proposals, choices on one half of the documents, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.studies.papers.contest import climb, compete, find_twin, tune
from megatron_mdm.studies.papers.contest_file import Range, read_contest
from megatron_mdm.studies.papers.contest_findings import (
    Way,
    judge_run,
    measure_difference,
    pool_seeds,
    split_documents,
)
from megatron_mdm.studies.papers.contest_report import write_contest
from megatron_mdm.studies.papers.contest_tuning import Tuner
from megatron_mdm.studies.sweeps.grid import load_sweep

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs/fair_fight").glob("*.yaml")
    if "contestants:" in path.read_text()
)

SPACE = {"optimizer.lr": Range(low=1e-4, high=1e-2, log=True), "data.order": ["shuffle", "fixed"]}
TREE = {
    "base": "base.yaml",
    "set": {"schedule.epochs": 4},
    "contestants": {
        "ar": {"objective.kind": "ar"},
        "masked": {"objective.kind": "mdm", "optimizer.lr": 0.002},
    },
    "space": {
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "optimizer.weight_decay": {"low": 0.01, "high": 1.0, "log": True},
    },
    "trials": 3,
    "at_once": 2,
    "seeds": [1, 2],
    "ladder": {
        "start": {"objective.kind": "ar"},
        "rungs": {"dropout": {"model.hidden_dropout": 0.1}, "averaging": {}},
        "averages_from": "averaging",
    },
}


def contest_of(tmp_path: Path, **changes):
    file = tmp_path / "contest.yaml"
    tree = TREE | {"dir": str(tmp_path / "runs")} | changes
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_contest(file)


def leave_run(folder: Path, losses: dict[tuple[str, int], float], seed: int = 0) -> None:
    """Leaves what a run keeps of its validations: losses by weights and step."""
    folder.mkdir(parents=True)
    document_N = np.arange(12).repeat(3)
    hard_N = np.random.default_rng(7).normal(size=36) + 0.01 * np.random.default_rng(seed).normal(
        size=36
    )
    with (folder / "validations.jsonl").open("w") as file:
        for (weights, step), loss in losses.items():
            nll_N = loss + hard_N - hard_N.mean()
            judged = JudgedWindows(step, "same", document_N, None, 1, nll_N, nll_N, weights)
            file.write(json.dumps(judged.as_record()) + "\n")
    steps = sorted({step for _, step in losses})
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            record = {"step": step, "epoch": step / 10, "consumed_flops_6nd": 1e12 * step}
            file.write(json.dumps(record) + "\n")


def leave_contest(root: Path) -> None:
    for place, loss in enumerate((3.0, 2.0, 2.5)):
        leave_run(root / f"trials/ar-{place}", {("raw", 10): loss})
        leave_run(root / f"trials/masked-{place}", {("raw", 10): loss + 0.5})
    for seed in (1, 2):
        better = {("raw", 10): 2.2, ("raw", 20): 2.4, ("ema", 10): 2.1}
        leave_run(root / f"finals/ar_seed-{seed}", better, seed)
        leave_run(root / f"finals/masked_seed-{seed}", {("raw", 10): 2.6, ("raw", 40): 1.9}, seed)
        leave_run(root / f"ladder/start_seed-{seed}", {("raw", 10): 2.5, ("ema", 10): 2.0}, seed)
        leave_run(root / f"ladder/dropout_seed-{seed}", {("raw", 10): 2.4, ("ema", 10): 1.8}, seed)


def test_each_contestant_is_tuned_and_its_best_trial_is_judged_over_the_seeds(tmp_path):
    contest = contest_of(tmp_path)
    leave_contest(tmp_path / "runs")
    trials = tune(contest, 0)
    assert [trial.name for trial in trials["ar"]] == ["ar-0", "ar-1", "ar-2"]
    assert set(trials["ar"][0].fields) == {"optimizer.lr", "optimizer.weight_decay"}
    # What a contestant sets itself is not tuned for it.
    assert set(trials["masked"][0].fields) == {"optimizer.weight_decay"}
    results = compete(contest, trials, 0)
    ar, masked = results
    assert ar.fields == {"objective.kind": "ar", **trials["ar"][1].fields}
    assert [str(run.way) for run in ar.runs] == ["average ema"] * 2
    assert [run.step for run in masked.runs] == [40, 40]
    points = yaml.safe_load((tmp_path / "runs/finals.yaml").read_text())["axes"]["run"]
    assert {points[f"ar_seed-{seed}"]["run.seed"] for seed in (1, 2)} == {1, 2}
    page, picture, verdict = write_contest(tmp_path / "runs", results, [], "ar")
    rows = page.with_suffix(".md").read_text().replace(" ", "").splitlines()
    assert any(row.startswith("|masked|ar|-0.200|") for row in rows)
    assert picture.exists()
    assert "masked lies 0.2" in verdict
    assert verdict.endswith("So on these tokens masked beats ar.")


def test_a_rung_that_is_better_than_the_trials_found_is_an_opponent_too(tmp_path):
    contest = contest_of(tmp_path)
    leave_contest(tmp_path / "runs")
    results, rungs = compete(contest, tune(contest, 0), 0), climb(contest, 0)
    *_, verdict = write_contest(tmp_path / "runs", results, rungs, "ar")
    assert "masked lies 0.200 below it" in verdict
    assert "The ladder's averaging reaches 1.541" in verdict
    assert "so ar's trials missed its best. masked lies 0.100 above that" in verdict
    assert verdict.endswith("So on these tokens nothing is shown to beat ar.")
    assert "lowest rung to the highest -0.700" in (tmp_path / "runs/contest.md").read_text()
    # Without averages no rung is better than what the trials found.
    *_, verdict = write_contest(tmp_path / "runs", results, rungs[:2], "ar")
    assert "ladder" not in verdict


def test_averages_count_from_their_rung_on_and_cost_no_run(tmp_path):
    contest = contest_of(tmp_path)
    leave_contest(tmp_path / "runs")
    start, dropout, averaging = climb(contest, 0)
    assert {str(run.way) for rung in (start, dropout) for run in rung.runs} == {"raw"}
    assert {str(run.way) for run in averaging.runs} == {"average ema"}
    points = yaml.safe_load((tmp_path / "runs/ladder.yaml").read_text())["axes"]["run"]
    assert not any(name.startswith("averaging") for name in points)
    assert [run.folder for run in averaging.runs] == [run.folder for run in dropout.runs]


def test_the_same_results_get_the_same_proposals_and_others_get_others():
    def go_on(losses):
        tuner, proposed = Tuner(SPACE, 3, 2), []
        for first in range(0, 8, 2):
            proposed.append(tuner.propose(2))
            tuner.tell(losses[first : first + 2])
        return proposed

    one = go_on([3, 2, 4, 1, 2, 2, 1, 3])
    assert one == go_on([3, 2, 4, 1, 2, 2, 1, 3])
    other = go_on([1, 4, 2, float("inf"), 1, 1, 1, 1])
    # The first ones are random; after them results decide.
    assert one[:2] == other[:2]
    assert one[2:] != other[2:]
    for fields in (fields for pair in one for fields in pair):
        assert 1e-4 <= fields["optimizer.lr"] <= 1e-2
        assert fields["data.order"] in ("shuffle", "fixed")


def test_what_chooses_does_not_judge(tmp_path):
    document_N = np.arange(10).repeat(4)
    mask_N = split_documents(document_N, 0)
    assert mask_N.sum() == 20
    assert not set(document_N[mask_N]) & set(document_N[~mask_N])
    assert (split_documents(document_N, 0) == mask_N).all()
    # The least loss of choosing documents is at step 2; what the others say does not count.
    losses = {1: np.where(mask_N, 3.0, 1.0), 2: np.where(mask_N, 2.0, 5.0)}
    with (tmp_path / "validations.jsonl").open("w") as file:
        for step, nll_N in losses.items():
            judged = JudgedWindows(step, "same", document_N, None, 1, nll_N, nll_N)
            file.write(json.dumps(judged.as_record()) + "\n")
    run = judge_run(tmp_path, 0)
    assert (run.step, run.chosen_loss, run.loss, run.way) == (2, 2.0, 5.0, Way("raw", None))
    assert run.curve == {1: 1.0, 2: 5.0}


def test_a_run_without_a_finite_loss_is_none(tmp_path):
    assert judge_run(tmp_path / "nothing", 0) is None
    leave_run(tmp_path / "run", {("raw", 10): float("nan")})
    assert judge_run(tmp_path / "run", 0) is None


def test_differences_hold_seeds_and_documents(tmp_path):
    for seed, (one, other) in enumerate(((2.0, 2.1), (2.02, 2.16))):
        leave_run(tmp_path / f"a{seed}", {("raw", 1): one}, seed)
        leave_run(tmp_path / f"b{seed}", {("raw", 1): other}, seed)
    a, b = ([judge_run(tmp_path / f"{name}{seed}", 0) for seed in (0, 1)] for name in "ab")
    spread = pool_seeds([a, b])
    assert spread.degrees == 2
    found = measure_difference(a, b, spread)
    assert found.mean == pytest.approx(0.12)
    # The windows are alike, so the seeds are the error: two sides, two seeds each.
    reach = 4.303 * spread.deviation
    assert found.interval[1] - found.mean == pytest.approx(reach, rel=1e-3)


def test_twins_are_one_run():
    points = {"a": {"x": 1, "y": [2]}, "b": {"y": [2], "x": 1}, "c": {"x": 2, "y": [2]}}
    assert [find_twin(points, name) for name in points] == ["a", "a", "c"]


def test_a_contestant_whose_trials_all_failed_is_named(tmp_path):
    contest = contest_of(tmp_path)
    trials = tune(contest, 0)
    with pytest.raises(MdmError, match="All 3 trials of ar failed"):
        compete(contest, trials, 1)
    with pytest.raises(MdmError, match="holds no finished trial of ar: leave out --report-only"):
        compete(contest, trials, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\] holds seed=0, by which the trials were chosen"),
        ({"space": {"optimizer.lr": [0.1]}}, "leaves no choice: put it into set"),
        ({"space": {"optimizer.lr": {"low": 2, "high": 1}}}, "low=2.0 is not below high=1.0"),
        ({"space": {"optimizer.lr": {"low": 0, "high": 1, "log": True}}}, "has no logarithm"),
        ({"ladder": {"start": {}, "rungs": {"a": {}}, "averages_from": "b"}}, "b is no rung"),
        ({"contestants": {"ar": {}}}, "contestants"),
    ],
)
def test_a_file_that_cannot_be_right_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        contest_of(tmp_path, **changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_runs_of_a_shipped_contest_are_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    contest = read_contest(path).model_copy(update={"dir": str(tmp_path)})
    trials = tune(contest, jobs=0)
    with pytest.raises(MdmError, match="have no held-out loss"):
        climb(contest, jobs=0)
    assert {len(one) for one in trials.values()} == {contest.trials}
    assert len(load_sweep(tmp_path / "trials.yaml").runs) == contest.trials * len(trials)
    assert load_sweep(tmp_path / "ladder.yaml").runs
