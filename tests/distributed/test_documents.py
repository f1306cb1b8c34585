"""Attention that stops at the ends of documents: a packed window is its documents, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import documents
import numpy as np
import pytest
from worlds import World

GetWorld = Callable[[int], World]

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mdm": {},
    "mdm-gqa": {"model.num_query_groups": 2},
    "ar": {"objective.kind": "ar"},
}


def _tokens_seen(*, is_causal: bool) -> np.ndarray:
    """How many tokens each one sees of its document, [S, B]."""
    seen = [
        [seen for size in lengths for seen in (range(1, size + 1) if is_causal else [size] * size)]
        for lengths in documents.LENGTHS
    ]
    return np.array(seen).T


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    # Mask and padding have no probability: minus infinity on both sides.
    is_token = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), is_token)
    difference = found[is_token] - expected[is_token]
    return float(np.linalg.norm(difference) / np.linalg.norm(expected[is_token]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_packed_document_has_the_logits_it_has_alone_from_position_0(
    world_of: GetWorld, objective: str
) -> None:
    (results,) = world_of(1).run(documents.packed_and_alone, overrides=OBJECTIVES[objective])
    assert len(results) == 8
    for logits in results:
        assert _relative_error(logits["packed"], logits["alone"]) < 1e-5
    assert max(_relative_error(logits["window"], logits["alone"]) for logits in results) > 1e-2


@pytest.mark.parametrize("lengths", [None, [16, 6]], ids=["whole", "cut"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_token_changes_the_logits_of_its_own_document_and_of_no_other(
    world_of: GetWorld, objective: str, lengths: list[int] | None
) -> None:
    (result,) = world_of(1).run(
        documents.changed_tokens, overrides=OBJECTIVES[objective], lengths=lengths
    )
    for sequence, numbers in enumerate(result["documents"]):
        length = 16 if lengths is None else lengths[sequence]
        expected = numbers[:, None] == numbers
        expected[length:] = False
        if objective == "ar":
            expected &= np.arange(16)[:, None] <= np.arange(16)
        # What the model makes of positions beyond the cut counts nowhere.
        changed = result["changed"][sequence]
        np.testing.assert_array_equal(changed[:, :length], expected[:, :length])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_document_has_no_gradient_from_another(world_of: GetWorld, objective: str) -> None:
    (results,) = world_of(1).run(documents.embedding_gradients, overrides=OBJECTIVES[objective])
    for result in results:
        assert not set(result["own"]) & set(result["others"])
        assert (result["gradient"][result["others"]] == 0.0).all()
        assert (result["gradient"][result["own"]] != 0.0).any(axis=1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_mask_by_blocks_reaches_the_kernels_through_megatron(
    world_of: GetWorld, objective: str
) -> None:
    (found,) = world_of(1).run(
        documents.hidden_states_of_both_masks, overrides=OBJECTIVES[objective]
    )
    segments, blocks = found
    np.testing.assert_allclose(blocks, segments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dropout_leaves_weights_of_the_own_document_and_differs_between_ranks(
    world_of: GetWorld, objective: str
) -> None:
    overrides = OBJECTIVES[objective] | {
        "model.attention_dropout": 0.5,
        "parallel.tensor_model_parallel_size": 2,
    }
    ranks = world_of(2).run(documents.kept_weights, overrides=overrides)
    seen_SB = _tokens_seen(is_causal=objective == "ar")
    for rank in ranks:
        assert rank["untouched"]
        np.testing.assert_array_equal(*rank["outputs"])
        # Each kept weight is 1 / seen, doubled for those that were dropped.
        kept_SBC = rank["outputs"][0] * seen_SB[:, :, None] / 2
        np.testing.assert_allclose(kept_SBC, kept_SBC.round(), atol=1e-5)
        assert (kept_SBC.round() <= seen_SB[:, :, None]).all()
        assert len(np.unique(kept_SBC.round())) > 3
    assert (ranks[0]["outputs"][0] != ranks[1]["outputs"][0]).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_engine_hands_the_documents_on(world_of: GetWorld, objective: str) -> None:
    (losses,) = world_of(1).run(
        documents.losses_of_model_and_engine,
        overrides=OBJECTIVES[objective]
        | {
            "data.attention": "document",
            "objective.stochastic_length_ratio": 0.5,
            # An order whose first batch has a document's end within what is kept of a window.
            "run.seed": 4,
        },
    )
    np.testing.assert_allclose(losses["engine"], losses["model"], rtol=1e-6)
    assert (np.abs(losses["engine"] - losses["window"]) > 1e-4 * losses["engine"]).any()
