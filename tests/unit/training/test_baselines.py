from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from plan_examples import VOCAB, plan_of, write_shards

from megatron_mdm.data.ngrams import count_tokens, judge_windows
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.training import baselines
from megatron_mdm.training.baselines import CompareWithCounting
from megatron_mdm.training.validation import Validation


@pytest.fixture
def plan_with_valid(tree, tmp_path):
    write_shards(tmp_path / "train", np.random.default_rng(0).integers(0, 20, 400))
    valid = write_shards(tmp_path / "valid", np.random.default_rng(1).integers(0, 20, 100))
    tree["data"]["valid"] = [{"path": str(valid)}]
    Path(tree["run"]["dir"]).mkdir()

    def plan(**sections):
        return plan_of(tree, **sections)

    return plan


class Told:
    """A run as the hook sees it, on the first rank."""

    def __init__(self, plan):
        validation = Validation(
            plan.config, plan.data.train, plan.data.valid, plan.data.read_content()
        )
        self.hook = CompareWithCounting(plan, validation)
        self.mesh = SimpleNamespace(rank=0)
        self.is_last_step = False
        self.lines = []
        self.say = self.lines.append
        nll_N = np.zeros(2)
        self.judged = JudgedWindows(0, "windows", np.arange(2), 0, 1, nll_N, nll_N)

    def validate(self, loss):
        self.lines.clear()
        self.hook.after_validation(self, {"valid/nll_nats_per_token": loss}, self.judged)
        return self.lines


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_counts_of_a_run_are_kept_in_its_folder(plan_with_valid, monkeypatch, kind):
    plan = plan_with_valid(objective={"kind": kind})
    Told(plan).validate(1.0)
    counts = count_tokens(plan.data.train.sources, VOCAB, plan.config.data.seq_length)
    held_out = [plan.data.valid.read_window(n) for n in range(plan.data.valid.num_windows)]
    of_all, of_rest = judge_windows(counts, held_out)
    written = json.loads((plan.run_dir / "baselines.json").read_text())
    own = of_all if kind == "mdm" else of_rest
    for name, expected in (("nll", own), ("nll_given_first", of_rest)):
        assert written[name] == pytest.approx(expected._asdict(), rel=1e-12)
    assert written["counted_tokens"] == 400

    def fail(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(baselines, "count_tokens", fail)
    assert Told(plan).validate(99.0)


def test_a_loss_above_what_counting_gives_is_said_at_the_first_validation_and_the_last(
    plan_with_valid,
):
    run = Told(plan_with_valid())
    (line,) = run.validate(9.0)
    assert line.startswith("the validation loss 9.000 is not below 3.")
    assert run.validate(8.0) == []
    (line,) = run.validate(1.0)
    assert line.startswith("the validation loss 1.000 is now below 3.")
    assert run.validate(1.0) == []
    run.is_last_step = True
    assert run.validate(1.0) == []
    assert len(run.validate(9.0)) == 1
    assert len(run.validate(9.0)) == 1


def test_damaged_training_data_costs_the_line_alone(plan_with_valid, capsys):
    plan = plan_with_valid()
    run = Told(plan)
    shards = plan.data.train.sources[0].source.prefix
    Path(f"{shards}.bin").write_bytes(b"")
    assert run.validate(9.0) == []
    assert "what counting tokens gives is not known" in capsys.readouterr().err
    assert run.validate(9.0) == []
    assert capsys.readouterr().err == ""
    assert not (plan.run_dir / "baselines.json").exists()
