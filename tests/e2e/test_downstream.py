"""Tasks while a run trains: what is logged is what `mdm evaluate` finds in the checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from commands import NUM_STEPS, Run, pretrain, run, torchrun
from local_tasks import write_tasks

from megatron_mdm.hf.from_run import export_run
from megatron_mdm.inference.options import ScoringOptions
from megatron_mdm.inference.tasks.command import run as evaluate
from megatron_mdm.reporting.metrics import read_metrics

TASKS = ["local_choice", "local_word", "local_story"]
DRAWS, LIMIT = 8, 6
LOSSES = ("train/loss_nats_per_token", "train/grad_norm", "valid/nll_nats_per_token")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def hooked(recipe, tasks, tmp_path_factory) -> Run:
    """The run `mdm` of all tests, with tasks at half time and at its end, of an average too."""
    root = tmp_path_factory.mktemp("hooked")
    hook = {"kind": "downstream", "include_path": str(tasks), "draws": DRAWS, "limit": LIMIT}
    hooks = [
        {"kind": "ema", "horizon_tokens": 500},
        hook | {"every_steps": NUM_STEPS // 2, "tasks": TASKS},
        hook | {"tasks": ["local_word"], "weights": "ema"},
    ]
    tree = yaml.safe_load(recipe.read_text("utf-8")) | {"hooks": hooks}
    path = root / "hooked.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return Run(root / "run", path, [], run(*pretrain(path, root / "run")).succeeded())


def found_in(folder: Path) -> dict[int, dict[str, float]]:
    records = [
        {name: value for name, value in one.items() if name == "step" or "downstream" in name}
        for one in read_metrics(folder / "metrics.jsonl")
    ]
    found: dict[int, dict[str, float]] = {}
    for one in records:
        if len(one) > 1:
            found.setdefault(one.pop("step"), {}).update(one)
    return found


def results_of(folder: Path) -> dict[str, float]:
    """The figures of `mdm evaluate`, by the names that a run gives them."""
    tree = json.loads((folder / "results.json").read_text())
    found = {}
    for task, entry in tree["tasks"].items():
        for label, value in entry["results"][task].items():
            metric, _, kind = label.partition(",")
            if kind and isinstance(value, int | float):
                found[f"{task}/{metric.replace('_stderr', '_standard_error')}"] = value
        for metric, value in entry["noise"][task].items():
            found[f"{task}/{metric}_noise"] = value
    return {name: value for name, value in found.items() if math.isfinite(value)}


@pytest.mark.parametrize(
    ("step", "group", "weights", "names"),
    [
        (NUM_STEPS // 2, "downstream", "raw", TASKS),
        (NUM_STEPS, "downstream", "raw", TASKS),
        (NUM_STEPS, "downstream_ema", "ema", ["local_word"]),
    ],
    ids=["half", "end", "average"],
)
def test_what_is_logged_is_what_the_checkpoint_gives(
    hooked, tasks, tmp_path, step, group, weights, names
):
    export_run(hooked.dir, tmp_path / "hf", step=step, weights=weights)
    evaluate(
        model=[tmp_path / "hf"],
        tasks=",".join(names),
        include_path=tasks,
        limit=LIMIT,
        out=tmp_path / "results",
        scoring=ScoringOptions(draws=DRAWS),
    )
    expected = results_of(tmp_path / "results")
    # Of local_word perplexity and accuracy.
    assert len([one for one in expected if "standard_error" in one]) == len(names) + 1
    logged = found_in(hooked.dir)
    mine = {
        name.removeprefix(f"{group}/"): value
        for name, value in logged[step].items()
        if name.startswith(f"{group}/")
    }
    assert mine == pytest.approx(expected, rel=1e-5)


def test_tasks_are_evaluated_when_they_are_due(hooked):
    logged = found_in(hooked.dir)
    assert list(logged) == [NUM_STEPS // 2, NUM_STEPS]
    assert not any("ema" in name for name in logged[NUM_STEPS // 2])
    title = "/local_word/perplexity"
    perplexities = {
        *(one[f"downstream{title}"] for one in logged.values()),
        logged[NUM_STEPS][f"downstream_ema{title}"],
    }
    assert len(perplexities) == 3
    assert f"tasks at step {NUM_STEPS} | local_choice acc " in hooked.result.output
    assert "it/s]" not in hooked.result.errors


def test_the_run_is_the_same_to_the_bit_with_tasks_and_without(hooked, whole_runs):
    curves = [
        [
            [one.get(name) for name in ("step", *LOSSES)]
            for one in read_metrics(folder / "metrics.jsonl")
            if any(name in one for name in LOSSES)
        ]
        for folder in (hooked.dir, whole_runs["mdm"].dir)
    ]
    assert curves[0] == curves[1]


def test_the_report_shows_the_curves_of_tasks(hooked, tmp_path):
    page = tmp_path / "report.html"
    run("tools/report.py", "--run", hooked.dir, "--output", page).succeeded()
    html = page.read_text("utf-8")
    assert "<h2>Tasks</h2>" in html
    assert 'id="tasks-acc-' in html
    value = found_in(hooked.dir)[NUM_STEPS]["downstream/local_choice/acc"]
    assert f"<td>{value:.4g} ± " in html


@pytest.mark.slow
def test_ranks_that_divide_the_model_find_the_same_and_a_run_goes_on(hooked, tmp_path):
    folder = hooked.stopped_at_half(tmp_path / "again")
    layout = ["parallel.tensor_model_parallel_size=2"]
    torchrun(2, *hooked.command(folder, *layout)).succeeded()
    again, logged = found_in(folder), found_in(hooked.dir)
    assert list(again) == list(logged)
    assert again[NUM_STEPS // 2] == logged[NUM_STEPS // 2]
    for name in ("acc", "acc_standard_error"):
        title = f"downstream/local_choice/{name}"
        assert again[NUM_STEPS][title] == pytest.approx(logged[NUM_STEPS][title])
