from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "configs/smdm/smdm-170M-1e19.yaml"


def estimate_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/estimate_run.py"), "--config", str(CONFIG)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_configs_own_layout_is_described():
    done = estimate_run("--gpus", "8", "parallel.zero_stage=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Predicted, not measured.\n")
    for part in ("weights", "optimizer", "logits", "pipeline bubble", "gradients", "fits 80 GB"):
        assert part in done.stdout


def test_the_best_layouts_are_json_too():
    done = estimate_run("--gpus", "8,16", "--best", "2", "--json", "--samples-per-gpu", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["num_gpus"] for one in found] == [8, 8, 16, 16]
    assert [one["global_batch_size"] for one in found] == [32, 32, 64, 64]
    assert all(one["predicted"] and one["fits"] for one in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpus", "8", "--cluster", "h1000"],
            "The cluster h1000 is not known: use a100, h100, h200, b200, and options such as "
            "--memory-bytes for another machine.",
        ),
        (["--gpus", "12"], "--gpus=12 is not a multiple of the 8 GPUs of a node: use 8 or 16."),
        (
            ["--gpus", "8", "--simulate", "--best", "2"],
            "--best=2 ranks layouts by what is predicted of them, and --simulate plays the "
            "config's own: leave one of them out.",
        ),
        (
            ["--gpus", "1", "--simulate", "--ranks", "0,x"],
            "--ranks=0,x is not valid: give whole numbers from 0 on, such as 8,64.",
        ),
        (
            ["--gpus", "1", "--ranks", "0"],
            "--ranks=0 says which ranks to play: add --simulate, or leave it out.",
        ),
        (
            ["--gpus", "1", "--simulate", "--ranks", "3"],
            "--ranks=3 is not one of 1 ranks: count from 0.",
        ),
        (["--gpus", "0"], "--gpus=0 is not valid: give whole numbers from 1 on, such as 8,64."),
    ],
)
def test_errors_are_one_sentence(arguments, message):
    done = estimate_run(*arguments, "batch.global_batch_size=768")
    assert done.returncode == 2
    assert done.stderr == f"error: {message}\n"
