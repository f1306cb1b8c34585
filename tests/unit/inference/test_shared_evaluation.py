"""The tools as programs: by one process and by two, the same figures to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_tasks import write_tasks

from megatron_mdm.data.writer import ShardWriter

REPO = Path(__file__).resolve().parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*words: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, *(launcher or []), *map(str, words)]
    return subprocess.run(
        command, cwd=REPO, env=environment, check=False, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_tasks_by_two_processes(export, tiny, tmp_path):
    folder = export(tiny())[0]
    (tmp_path / "tasks").mkdir()
    options = ["--model", folder, "--include-path", write_tasks(tmp_path / "tasks")]
    options += ["--tasks", "local_choice,local_text,local_story", "--draws", "8"]
    for name, launcher in (("one", None), ("two", TORCHRUN)):
        done = run("tools/evaluate.py", *options, "--out", tmp_path / name, launcher=launcher)
        assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["tasks"]
        for name in ("one", "two")
    )
    for task in one:
        for part in ("num_requests", "forward_passes", "num_documents"):
            assert one[task][part] == two[task][part]
        for metric, value in one[task]["results"][task].items():
            assert two[task]["results"][task][metric] == (
                pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            )


@pytest.mark.slow
def test_problems_by_two_processes(export, tiny, tmp_path):
    problems = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"w{n} w5", "response": f"w3 #### {n}", "answer": f"{n}"} for n in range(9)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", export(tiny())[0], "--data", problems, "--length", 6, "--temperature", 1]
    for name, launcher in (("one", None), ("two", TORCHRUN)):
        done = run("tools/evaluate_math.py", *options, "--out", tmp_path / name, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| 9 ") == 1
    for file in ("results.json", "samples.jsonl", "results.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
def test_perplexity_of_two_models_by_two_processes(export, tiny, tmp_path):
    models = [export(tiny(is_causal=causal), f"causal-{causal}")[0] for causal in (True, False)]
    for seed, name in enumerate(("first", "second")):
        with ShardWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.random.default_rng(seed).integers(0, 19, 400))
            writer.finish()
    options = [word for model in models for word in ("--model", model)]
    options += ["--data", f"early={tmp_path / 'first'}", "--data", tmp_path / "second"]
    options += ["--seq-length", 16, "--num-windows", 9]
    for name, launcher in (("one", None), ("two", TORCHRUN)):
        out = tmp_path / f"{name}.json"
        done = run("tools/perplexity.py", *options, "--out", out, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert "| early " in done.stdout
        assert "| second " in done.stdout
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["settings"] == two["settings"]
    for model in map(str, models):
        for domain in ("early", "second"):
            first, second = one["models"][model][domain], two["models"][model][domain]
            assert first["num_tokens"] == second["num_tokens"] == 9 * 15
            assert first["nats_per_token"] == pytest.approx(second["nats_per_token"], rel=1e-5)
    twice = run("tools/perplexity.py", *options[:2], "--data", "a=x", "--data", "a=y")
    assert "error: --data names a twice" in twice.stderr
