"""Runs of a sweep as curves: conditions and settings come from what was swept."""

from __future__ import annotations

import pytest
from sweep_examples import BATCH, SEQ, begin, write_sweep

from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.studies.papers.crossover import compare
from megatron_mdm.studies.papers.crossover_runs import read_sweeps, setting_of

AXES = {
    "objective": {"ar": {"objective.kind": "ar"}, "mdm": {"objective.kind": "mdm"}},
    "optimizer.lr": [1e-3, 2e-3],
    "size": {"small": {"model.num_layers": 1}, "large": {"model.num_layers": 2}},
    "run.seed": [0, 1],
}
# A layer of width 16 with 24 inside: 4 d^2 + 3 d f + 2 d; and the last norm.
LAYER = 4 * 16**2 + 3 * 16 * 24 + 2 * 16


def judged(*losses):
    return [
        {"step": step, NLL: loss, "valid/nll_standard_error": 0.1}
        for step, loss in enumerate(losses, start=1)
    ]


def test_before_any_run_the_remedy_is_to_train(tmp_path):
    write_sweep(tmp_path, axes=AXES)
    with pytest.raises(DataError, match=r"^None of the 16 runs has begun.*: leave out --report-o"):
        read_sweeps([tmp_path / "sweep.yaml"])


def test_a_curve_has_epochs_flops_and_losses(tmp_path):
    sweep = write_sweep(tmp_path, axes=AXES)
    begin(sweep.runs[0], judged(3.0, 2.5, 2.75))
    (run,), missing = read_sweeps([sweep.path])
    assert missing == [one.name for one in sweep.runs[1:]]
    assert run.condition.unique_tokens == 10 * SEQ
    assert run.condition.num_parameters == LAYER + 16
    tokens = BATCH * SEQ
    assert run.epochs.tolist() == pytest.approx([tokens * k / (10 * SEQ) for k in (1, 2, 3)])
    # AR counts windows whole, as MDM does.
    assert run.flops.tolist() == pytest.approx([6 * (LAYER + 16) * tokens * k for k in (1, 2, 3)])
    assert (run.losses.tolist(), run.best) == ([3.0, 2.5, 2.75], 1)


def test_sizes_are_conditions_or_settings(tmp_path):
    sweep = write_sweep(tmp_path, axes=AXES)
    for run in sweep.runs:
        # The small AR model is ahead; of MDMs the large one.
        is_large = run.config.model.num_layers == 2
        is_mdm = run.config.objective.kind == "mdm"
        begin(run, judged(2.0 + 0.1 * (is_large != is_mdm) + 0.2 * is_mdm))
    runs, missing = read_sweeps([sweep.path])
    assert not missing
    small, large = compare(runs)
    assert (small.gap, large.gap) == (pytest.approx(0.3), pytest.approx(0.1))
    assert small.ar.num_settings == 2
    assert {run.setting for run in runs} == {"optimizer.lr=0.001", "optimizer.lr=0.002"}
    (best,) = compare(read_sweeps([sweep.path], best_size=True)[0])
    assert best.condition.num_parameters is None
    assert best.gap == pytest.approx(0.2)
    assert best.ar.setting.startswith(f"N={LAYER + 16:,}, optimizer.lr=")
    assert best.mdm.setting.startswith(f"N={2 * LAYER + 16:,}, optimizer.lr=")


def test_what_is_compared_or_repeated_is_no_setting(tmp_path):
    sweep = write_sweep(
        tmp_path,
        axes={
            "run.seed": [0, 1],
            "data.train.0.max_unique_tokens": [40, 80],
            "model.hidden_dropout": [0.0, 0.1],
        },
    )
    found = {setting_of(sweep, run) for run in sweep.runs}
    assert found == {"model.hidden_dropout=0.0", "model.hidden_dropout=0.1"}


def test_a_loss_that_is_no_number_is_refused(tmp_path):
    sweep = write_sweep(tmp_path)
    begin(sweep.runs[0], judged(3.0, float("nan")))
    with pytest.raises(DataError, match="held-out losses that are not finite"):
        read_sweeps([sweep.path])
