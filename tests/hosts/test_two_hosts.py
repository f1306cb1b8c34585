"""Training over two hosts that share no loopback: torchrun, its store and gloo use the cable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from network import INTERFACE, missing_for_hosts, two_hosts
from threads import TEST_THREADS

from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.reporting.metrics import read_metrics

REPO = Path(__file__).resolve().parents[2]
LOSS, GRAD_NORM, LR = "train/loss_nats_per_token", "train/grad_norm", "train/lr"
TIMEOUT_SECONDS = 300


def write_recipe(folder: Path) -> Path:
    with ShardWriter(folder / "train", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 299, 2000))
        writer.finish()
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    tree = {
        "run": {"dir": "unset", "seed": 3, "device": "cpu", "num_threads": TEST_THREADS},
        "model": {**sizes, "vocab_size": 300},
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": str(folder / "train")}], "seq_length": 32},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "schedule": {"steps": 6},
        "reporting": {"peak_tflops": 0.1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_two_hosts_train_as_one_process_does(tmp_path):
    reason = missing_for_hosts()
    if reason is not None:
        pytest.skip(f"no two hosts: {reason}")
    recipe = write_recipe(tmp_path)
    train = ["pretrain/pretrain_mdm.py", "--config", str(recipe)]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    options = {
        "cwd": REPO,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    with two_hosts() as hosts:
        processes = [
            subprocess.Popen([sys.executable, *train, f"run.dir={tmp_path}/one"], **options)
        ]
        for rank, host in enumerate(hosts):
            # Without it gloo takes the address of the machine's name: the loopback, for both.
            launcher = ["env", f"GLOO_SOCKET_IFNAME={INTERFACE}", sys.executable]
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node=1"]
            launcher += ["--nnodes=2", f"--node_rank={rank}"]
            launcher += [f"--master_addr={hosts[0].address}", "--master_port=29500"]
            command = [*launcher, *train, f"run.dir={tmp_path}/two", "parallel.zero_stage=2"]
            processes.append(host.start(command, **options))
        try:
            outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)
    found, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [record["step"] for record in found] == list(range(1, 7))
    for left, right in zip(found, expected, strict=True):
        assert left[LOSS] == pytest.approx(right[LOSS], abs=1e-5)
        assert left[GRAD_NORM] == pytest.approx(right[GRAD_NORM], rel=1e-4)
        assert left[LR] == right[LR]
