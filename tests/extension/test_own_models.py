"""Models of objectives from outside the package: what can run them elsewhere, and what cannot."""

from __future__ import annotations

import pytest

from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest, read_saved_model
from megatron_mdm.core.errors import CheckpointError

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}


def saved(objective: dict) -> CheckpointManifest:
    config = {"model": SIZES | {"vocab_size": 61}, "data": {"seq_length": 16}}
    return CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=1,
        consumed_samples=1,
        config=config | {"objective": objective},
        versions={},
        data_fingerprint="",
    )


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "own_objective:SuffixConfig"},
        {"kind": "mdm", "process": {"kind": "own_process:UniformConfig"}},
    ],
    ids=["objective", "process"],
)
def test_what_fills_in_no_masks_is_refused_where_it_would_be_run_as_if_it_did(objective):
    model = read_saved_model(saved(objective))
    assert model.model.hidden_size == 32
    for run_it in (lambda: model.is_causal, lambda: model.attention):
        with pytest.raises(CheckpointError, match="runs_as of its section"):
            run_it()


@pytest.mark.parametrize(
    ("objective", "is_causal"),
    [
        ({"kind": "ar"}, True),
        ({"kind": "mdm", "loss_head": {"kind": "own_loss_head:SmoothedConfig"}}, False),
    ],
)
def test_another_loss_head_changes_nothing_about_how_a_model_runs(objective, is_causal):
    assert read_saved_model(saved(objective)).is_causal == is_causal
