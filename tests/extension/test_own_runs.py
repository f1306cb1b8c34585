"""Runs whose components lie outside the package: tensor-parallel, saved, resumed bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import pretrain, run, torchrun
from pair_shards import write_pairs
from safetensors.numpy import load_file
from threads import TEST_THREADS

from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.reporting.metrics import read_metrics

VOCAB_SIZE, NUM_STEPS, SAVED_AT = 61, 5, 3
LOSS, GRAD_NORM = "train/loss_nats_per_token", "train/grad_norm"
LARGEST = "train/largest_loss_nats_per_token"

_SOURCE = {"kind": "own_source:SquareSums"}
RECIPES = {
    "token-source": {
        "data": {
            "train": [{"path": "squares/4000", **_SOURCE}],
            "valid": [{"path": "squares/400", **_SOURCE}],
            "seq_length": 16,
        }
    },
    "objective": {"objective": {"kind": "own_objective:SuffixConfig", "width": 5}},
    "process-and-loss-head": {
        "objective": {
            "process": {"kind": "own_process:UniformConfig"},
            "loss_head": {"kind": "own_loss_head:SmoothedConfig", "share": 0.2},
        }
    },
    "optimizer-schedule-and-hook": {
        "optimizer": {"kind": "own_training:MomentumConfig", "momentum": 0.8},
        "schedule": {"kind": "own_training:LineConfig", "steps": NUM_STEPS},
        "hooks": [
            {"kind": "own_training:LargestLossConfig", "every_steps": 2},
            {"kind": "own_training:FarthestConfig"},
        ],
    },
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    generator = np.random.default_rng(2)
    texts = [(generator.integers(1, VOCAB_SIZE, 40).tolist(), []) for _ in range(30)]
    write_pairs(prefix, texts, VOCAB_SIZE, with_recipe=False)
    return prefix


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, shards, tmp_path_factory) -> Path:
    tree = {
        "run": {"dir": "unset", "seed": 3, "device": "cpu", "num_threads": TEST_THREADS},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": VOCAB_SIZE,
            "vocab_padding_multiple": 8,
        },
        "data": {
            "train": [{"path": str(shards)}],
            "valid": [{"path": str(shards)}],
            "seq_length": 16,
        },
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "schedule": {"steps": NUM_STEPS},
        "validation": {"num_samples": 8},
        "checkpoint": {"every_steps": SAVED_AT},
        "reporting": {"peak_tflops": 0.1},
    }
    path = tmp_path_factory.mktemp(request.param) / "own.yaml"
    path.write_text(yaml.safe_dump(tree | RECIPES[request.param]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with TP 2."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torchrun(2, *pretrain(recipe, folder, "parallel.tensor_model_parallel_size=2")).succeeded()
    return folder


def curve(run_dir: Path) -> dict[int, list[float]]:
    records = [one for one in read_metrics(run_dir / "metrics.jsonl") if LOSS in one]
    return {
        one["step"]: [one[LOSS], one[GRAD_NORM], one["train/lr"], one.get(LARGEST, 0.0)]
        for one in records
    }


def holds(told: object, part: object) -> bool:
    """Does a tree say all that a part of it says?"""
    if isinstance(part, dict):
        return all(holds(told[name], value) for name, value in part.items())
    if isinstance(part, list):
        return len(told) == len(part) and all(map(holds, told, part))
    return told == part


def test_two_tensor_parallel_ranks_equal_one_process(recipe, whole, tmp_path):
    run(*pretrain(recipe, tmp_path / "one")).succeeded()
    one, two = curve(tmp_path / "one"), curve(whole)
    assert list(one) == list(two) == list(range(1, NUM_STEPS + 1))
    for step, values in one.items():
        np.testing.assert_allclose(two[step], values, rtol=2e-5)
    assert one[NUM_STEPS] != one[1]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe, whole, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{NUM_STEPS:08d}")
    (resumed / "checkpoints" / "latest").write_text(f"step_{SAVED_AT:08d}\n")
    command = pretrain(recipe, resumed, "parallel.tensor_model_parallel_size=2")
    torchrun(2, *command).succeeded()
    assert curve(resumed) == curve(whole)
    last = Path("checkpoints") / f"step_{NUM_STEPS:08d}"
    assert read_manifest(resumed / last).state == read_manifest(whole / last).state
    files = sorted((whole / last).glob("*.safetensors"))
    # The tensors that a hook keeps of the weights have files of their own, of each rank.
    keeps = "FarthestConfig" in recipe.read_text()
    assert sum(file.name.startswith("hooks-") for file in files) == (2 if keeps else 0)
    assert files
    for file in files:
        mine, theirs = load_file(resumed / last / file.name), load_file(file)
        assert list(mine) == list(theirs)
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(mine[name], tensor)


def test_a_dry_run_describes_the_components(recipe, tmp_path):
    result = run(*pretrain(recipe, tmp_path / "run"), "--dry-run", "--full").succeeded()
    asked = RECIPES[recipe.parent.name.rstrip("0123456789")]
    _, described, rest = result.output.split("\n\n", 2)
    assert holds(yaml.safe_load(described), asked)
    assert "estimated total" in rest
