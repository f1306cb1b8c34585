"""Divisions of ranks that the tests go through."""

from __future__ import annotations

from typing import Any


def layout(
    tp: int = 1, pp: int = 1, zero: int = 1, sp: bool = False, chunks: int = 1
) -> dict[str, Any]:
    """Config overrides of a division of ranks.

    Args:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        zero: ZeRO stage.
        sp: Sequence parallelism.
        chunks: Parts of the model a pipeline stage.

    Returns:
        Dotted keys and values.
    """
    return {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "parallel.zero_stage": zero,
        "parallel.sequence_parallel": sp,
        "parallel.virtual_pipeline_model_parallel_size": chunks,
    }


# Name: number of ranks, and how they are divided; the rest of them are replicas.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, layout(zero=1)),
    "zero2": (1, layout(zero=2)),
    "zero3": (1, layout(zero=3)),
    "tp2-zero0": (2, layout(tp=2, zero=0)),
    "tp2-zero1": (2, layout(tp=2, zero=1)),
    "tp2-sp-zero0": (2, layout(tp=2, sp=True, zero=0)),
    "tp2-sp-zero1": (2, layout(tp=2, sp=True, zero=1)),
    "pp2-zero0": (2, layout(pp=2, zero=0)),
    "pp2-zero1": (2, layout(pp=2, zero=1)),
    "pp2-zero2": (2, layout(pp=2, zero=2)),
    "dp2-zero0": (2, layout(zero=0)),
    "dp2-zero1": (2, layout(zero=1)),
    "dp2-zero2": (2, layout(zero=2)),
    "dp2-zero3": (2, layout(zero=3)),
    "dp2-zero1-overlap": (
        2,
        layout(zero=1) | {"parallel.overlap_gradient_reduction": True},
    ),
    "dp2-zero2-overlap": (
        2,
        layout(zero=2) | {"parallel.overlap_gradient_reduction": True},
    ),
    "dp4-zero1": (4, layout(zero=1)),
    "pp4-zero1": (4, layout(pp=4, zero=1)),
    "tp2-pp2-zero0": (4, layout(tp=2, pp=2, zero=0)),
    "tp2-pp2-zero1": (4, layout(tp=2, pp=2, zero=1)),
    "tp2-sp-pp2-zero0": (4, layout(tp=2, pp=2, sp=True, zero=0)),
    "tp2-sp-pp2-zero2": (4, layout(tp=2, pp=2, sp=True, zero=2)),
    "tp2-dp2-zero1": (4, layout(tp=2, zero=1)),
    "tp2-dp2-zero2": (4, layout(tp=2, zero=2)),
    "tp2-dp2-zero3": (4, layout(tp=2, zero=3)),
    "tp2-sp-dp2-zero3": (4, layout(tp=2, sp=True, zero=3)),
    "pp2x2-zero0": (2, layout(pp=2, zero=0, chunks=2)),
    "pp2x2-zero1": (2, layout(pp=2, zero=1, chunks=2)),
    "pp2x2-zero2": (2, layout(pp=2, zero=2, chunks=2)),
    "pp2x2-dp2-zero1": (4, layout(pp=2, zero=1, chunks=2)),
    "tp2-sp-pp2x2-zero2": (4, layout(tp=2, pp=2, sp=True, zero=2, chunks=2)),
    "pp2-dp2-zero0": (4, layout(pp=2, zero=0)),
    "pp2-dp2-zero1": (4, layout(pp=2, zero=1)),
    "pp2-dp2-zero2": (4, layout(pp=2, zero=2)),
}
