"""tools/benchmark.py attention: cases that compute the same, counted and refused by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.benchmarks.attention import measure_attention, useful_flops
from megatron_mdm.studies.benchmarks.settings import AttentionSettings

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, "attention", *arguments], capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_cases_compute_the_same_and_ours_hold_no_square():
    results = measure_attention(
        AttentionSettings(
            seq_length=2048,
            micro_batch_size=2,
            num_heads=2,
            query_groups=1,
            head_width=16,
            repeats=1,
            device="cpu",
        )
    )
    assert 4 < results["num_documents"] < 40
    for ours, other in (("full", "full_explicit"), ("documents", "documents_dense")):
        assert results[ours]["loss"] == pytest.approx(results[other]["loss"], rel=1e-4, abs=1e-2)
        norms = [results[name]["gradient_norm"] for name in (ours, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        # 2 x 2 x 2048^2 scores take 67 MB, a mask of one byte each 8 MB and of floats 34 MB.
        assert results["ratios"][f"{ours}_over_{other}"]["peak_bytes"]["median"] < 0.6
    assert len({results[name]["gradient_norm"] for name in ("full", "causal", "documents")}) == 3
    rate = results["matmul_flops_per_second"]["max"]
    for name, flops in (
        ("full", 12 * 2 * 16 * 2 * 2048**2),
        ("causal", 12 * 2 * 16 * 2 * 2048 * 2049 // 2),
    ):
        case = results[name]
        assert case["useful_flops"] == flops
        speed = case["useful_flops_per_second"]["median"]
        assert speed == pytest.approx(flops / case["milliseconds"]["median"] * 1e3, rel=1e-3)
        assert case["share_of_matmul"]["median"] == pytest.approx(speed / rate, abs=1e-4)


def test_documents_count_by_the_squares_of_their_lengths():
    settings = AttentionSettings(seq_length=6, micro_batch_size=2, num_heads=3, head_width=4)
    documents_BS = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]])
    expected = 12 * 3 * 4 * (9 + 1 + 4 + 36)
    for name in ("documents", "documents_dense"):
        assert useful_flops(name, settings, documents_BS) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 0}, "--seq-length=0 has to be at least 1"),
        ({"query_groups": 0}, "--query-groups=0 has to be at least 1"),
        ({"document_length": -3}, "--document-length=-3"),
        ({"head_width": 5}, "--head-width=5 is odd"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        measure_attention(AttentionSettings(**changes))


def test_the_command_line_answers_in_one_sentence():
    ran = run_tool("--query-groups", "4", "--num-heads", "6")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines()[-1].startswith(
        "error: --query-groups=4 does not divide --num-heads=6: "
    )
