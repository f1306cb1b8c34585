"""One cluster for all tests, and a tiny run on random tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster, missing_for_a_cluster
from jobs import LAYOUT, log_of, submit, wait_for
from threads import TEST_THREADS

from megatron_mdm.data.writer import ShardWriter

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster():
    """A running cluster."""
    reason = missing_for_a_cluster()
    if reason is not None:
        pytest.skip(f"no SLURM cluster: {reason}")
    # Not below pytest's own folder: the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = Cluster(Path(folder))
        try:
            try:
                cluster.start()
            except AssertionError as error:
                # Daemons that do not come up are this machine's matter, not the project's.
                pytest.skip(f"no SLURM cluster: {error}")
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A YAML config of a tiny run."""
    root = tmp_path_factory.mktemp("prepared")
    with ShardWriter(root / "train", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 299, 4000))
        writer.finish()
    tree = {
        "run": {"dir": "unset", "seed": 3, "device": "cpu", "num_threads": TEST_THREADS},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": 300,
        },
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": str(root / "train")}], "seq_length": 32},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
        "schedule": {"steps": 30, "warmup_steps": 2},
        "reporting": {"peak_tflops": 0.1},
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def one_process(recipe, tmp_path_factory) -> Path:
    """The folder of the same run in one process without a launcher."""
    folder = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "pretrain/pretrain_mdm.py", "--config", recipe, f"run.dir={folder}"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def whole(cluster, recipe, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run and its job."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = submit(cluster, recipe, folder, *LAYOUT)
    state = wait_for(cluster, job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", log_of(folder, job) + log_of(folder, job, "-node0")
    return folder, job
