"""Loss heads from outside the package: what a loss can ask of all ranks, and mistakes."""

from __future__ import annotations

import cases
import pytest
import resuming
import torch
from worlds import RankFailure

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.head import Predictions
from megatron_mdm.model.loss_heads import build_loss_head
from megatron_mdm.model.vocabulary import VocabularySlice


def test_a_loss_of_another_shape_is_refused_at_the_first_step(world_of, tmp_path):
    wrong = {"objective.loss_head": {"kind": "own_loss_head:PerPositionConfig"}}
    with pytest.raises(RankFailure, match=r"PerPosition .* sum of the weighted losses of each"):
        world_of(1).run(resuming.run, overrides=wrong, folder=str(tmp_path), resume=False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Nothing", ["builds a NoneType", "megatron_mdm.model.loss_heads.LossHead"]),
        ("WithoutFacts", ["cannot be built", "too many positional arguments"]),
    ],
)
def test_a_section_that_builds_no_loss_head_is_refused_with_the_plan(name, parts):
    kind = f"own_loss_head:{name}Config"
    with pytest.raises(ConfigError) as caught:
        build_loss_head(cases.config_of({"objective.loss_head": {"kind": kind}}))
    for part in [f"objective.loss_head.kind={kind}", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(("mask", "possible"), [(61, 61), (5, 60)])
def test_the_tokens_that_may_be_predicted_are_counted(mask, possible):
    rows = VocabularySlice(0, 64, 61, mask, None)
    assert rows.num_possible == possible
    logits_MV = rows.logits(torch.randn(3, 8), torch.randn(64, 8))
    assert torch.isfinite(logits_MV).sum(dim=-1).tolist() == [possible] * 3


def test_smoothed_labels_are_those_of_torch():
    head = build_loss_head(
        cases.config_of(
            {"objective.loss_head": {"kind": "own_loss_head:SmoothedConfig", "share": 0.2}}
        )
    )
    generator = torch.Generator().manual_seed(0)
    hidden_MH = torch.randn(5, 8, generator=generator, requires_grad=True)
    weight_VH = torch.randn(64, 8, generator=generator, requires_grad=True)
    weights_M = torch.rand(5, generator=generator)
    targets_M = torch.tensor([0, 60, 3, 60, 17])
    sequence_M = torch.tensor([0, 1, 1, 0, 1])
    # 61 tokens, the last rows are padding.
    rows = VocabularySlice(0, 64, 61, 61, None)
    losses_B = head(hidden_MH, weight_VH, Predictions(targets_M, weights_M, sequence_M, 2), rows)
    each_M = torch.nn.functional.cross_entropy(
        (hidden_MH @ weight_VH.T)[:, :61], targets_M, label_smoothing=0.2, reduction="none"
    )
    expected_B = torch.zeros(2).index_add(0, sequence_M, each_M * weights_M)
    torch.testing.assert_close(losses_B, expected_B)
    leaves = hidden_MH, weight_VH
    found, expected = (torch.autograd.grad(one.sum(), leaves) for one in (losses_B, expected_B))
    torch.testing.assert_close(found, expected)
