"""tools/benchmark.py train and head: every case computes the same loss."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.benchmarks.head import measure_head
from megatron_mdm.studies.benchmarks.settings import HeadSettings, TrainingSettings
from megatron_mdm.studies.benchmarks.training import measure_training

UNCOMPILED = ("ours", "model_alone", "plain", "transformers")
CASES = (*UNCOMPILED, "plain_compiled", "transformers_compiled")
TINY = TrainingSettings(
    preset="demo",
    seq_length=32,
    vocab_size=30000,
    micro_batch_size=2,
    steps=1,
    repeats=1,
    device="cpu",
    cases=("ours", "model_alone"),
)
TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_all_cases_train_the_same_model_on_the_same_loss():
    sizes = ["--preset", "demo", "--seq-length", "32", "--vocab-size", "30000", "--cases", *CASES]
    ran = run_tool("train", *sizes, "--micro-batch-size", "2", "--steps", "1", "--repeats", "1")
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)["results"]
    losses = {name: results[name]["first_loss"] for name in CASES}
    assert losses["model_alone"] == pytest.approx(losses["ours"], rel=1e-6)
    assert losses["plain"] == pytest.approx(losses["ours"], rel=1e-5)
    # Its softmax has one more token, the mask: log(30001 / 30000).
    assert losses["transformers"] == pytest.approx(losses["ours"], rel=1e-4)
    # Compiled, transformers' own way to bidirectional attention would be causal: another loss.
    for name in ("plain", "transformers"):
        assert losses[f"{name}_compiled"] == pytest.approx(losses[name], rel=3e-6)
    assert 1 < losses["ours"] < 20
    # By hand: 4 layers of 4 d^2 + 3 d f, attention 12 L S d, head rows of a half and eps / 2.
    layers = 6 * 4 * (4 * 192**2 + 3 * 192 * 768) + 12 * 4 * 32 * 192
    head = 6 * 192 * 30080 * (1 + 1e-3) / 2
    assert results["useful_flops_per_token"] == pytest.approx(layers + head, rel=1e-9)
    for name in losses:
        speed = results[name]
        assert speed["tokens_per_second"]["median"] * speed["step_seconds"]["median"] == (
            pytest.approx(64, rel=1e-2)
        )


def test_overrides_change_what_our_cases_train():
    overrides = ("objective.kind=ar", "model.hidden_dropout=0.1", "parallel.recompute=full")
    results = measure_training(replace(TINY, overrides=(*overrides, "data.attention=document")))
    assert results["ours"]["first_loss"] == pytest.approx(results["model_alone"]["first_loss"])
    # Causal attention sees half, and the last token of a window predicts nothing.
    layers = 6 * 4 * (4 * 192**2 + 3 * 192 * 768) + 6 * 4 * 32 * 192
    head = 6 * 192 * 30080 * 31 / 32
    assert results["useful_flops_per_token"] == pytest.approx(layers + head, rel=1e-9)
    # Weights, gradients and two moments of 4 bytes.
    assert results["ours"]["estimated_bytes"] > 16 * results["parameters"]["total"]
    assert "share_of_peak" not in results["ours"]


@pytest.mark.parametrize(
    ("cases", "override", "message"),
    [
        (("ours", "plain"), "objective.kind=ar", "--cases=plain learns .* change objective: leave"),
        (("transformers",), "model.hidden_dropout=0.1", "--cases=transformers .* change model"),
        (("model_alone",), "batch.global_batch_size=4", "--cases=model_alone .* change batch"),
        (("ours",), "parallel.tensor_model_parallel_size=2", "tensor_model_parallel_size=2"),
        (("ours",), "modle.hidden_dropout=0.1", "did you mean model"),
        (("ours",), "hidden_dropout", "is not an override: write section.key=value"),
    ],
)
def test_overrides_that_cannot_be_measured_are_refused(cases, override, message):
    with pytest.raises(ConfigError, match=message):
        measure_training(replace(TINY, cases=cases, overrides=(override,)))


@pytest.mark.slow
def test_the_head_never_holds_all_logits():
    results = measure_head(HeadSettings(hidden_size=64, num_tokens=2048, repeats=1, device="cpu"))
    losses = [results[name]["loss"] for name in ("all_logits", "masked_logits", "chunked")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    # 412 MB of logits and a copy of half of them, against 64 MiB and the matrix's gradient.
    assert results["chunked_over_all_logits"]["peak_bytes"]["median"] < 0.25


def test_sizes_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError, match="--num-tokens=1 has to be at least 2"):
        measure_head(HeadSettings(num_tokens=1))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device=cuda needs a GPU"):
            measure_head(HeadSettings(device="cuda"))
        with pytest.raises(ConfigError, match="--device=cuda needs a GPU"):
            measure_training(replace(TINY, device="cuda"))
    ran = run_tool("train", "--preset", "smdm-18M")
    assert ran.returncode == 2
    assert "smdm-18M" in ran.stderr.splitlines()[-1]
