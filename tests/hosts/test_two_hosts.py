"""Training over two hosts that share no loopback: launchers, stores and gloo use the cable."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from network import INTERFACE, missing_for_hosts, two_hosts
from ssh import missing_for_ssh, ssh_servers
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


OPTIONS = {"cwd": REPO, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# Without it gloo takes the address of the machine's name: the loopback, for both.
GLOO_INTERFACE = f"GLOO_SOCKET_IFNAME={INTERFACE}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    reason = missing_for_hosts()
    if reason is not None:
        pytest.skip(f"no two hosts: {reason}")
    return write_recipe(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "pretrain/pretrain_mdm.py", "--config", str(recipe)]
    process = subprocess.Popen(
        [*command, f"run.dir={folder}"], env=os.environ | ENVIRONMENT, **OPTIONS
    )
    end(process)
    return folder


def end(*processes: subprocess.Popen[str]) -> None:
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, "\n".join(outputs)


def assert_equal_runs(found: Path, expected: Path) -> None:
    records, others = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    assert [record["step"] for record in records] == list(range(1, 7))
    for left, right in zip(records, others, strict=True):
        assert left[LOSS] == pytest.approx(right[LOSS], abs=1e-5)
        assert left[GRAD_NORM] == pytest.approx(right[GRAD_NORM], rel=1e-4)
        assert left[LR] == right[LR]


def start_both(hosts, recipe: Path, folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Starts the lines of docs/slurm.md, "Two machines without SLURM", with one rank a host."""
    page = (
        (REPO / "docs/slurm.md").read_text("utf-8").partition("### Two machines without SLURM")[2]
    )
    lines = re.findall(r"^ +(\S+/torchrun (?:.*\\\n)*.*)", page, re.MULTILINE)
    (variables,) = re.findall(r"^ +export (.*)", page, re.MULTILINE)
    places = {"run.yaml": str(recipe), "--nproc_per_node=8": "--nproc_per_node=1"}
    places["--master_addr=n1"] = f"--master_addr={hosts[0].address}"
    interface = variables.replace("eth0", INTERFACE).split()
    processes = []
    for host, line in zip(hosts, lines, strict=True):
        words = [places.get(word, word) for word in shlex.split(line.replace("\\\n", " "))]
        command = ["env", *interface, *words, f"run.dir={folder}", *overrides]
        processes.append(host.start(command, env=os.environ | ENVIRONMENT, **OPTIONS))
    return processes


def test_two_hosts_train_as_one_process_does(recipe, one_process, tmp_path):
    with two_hosts() as hosts:
        end(*start_both(hosts, recipe, tmp_path / "two"))
    assert_equal_runs(tmp_path / "two", one_process)


def test_a_signal_to_one_torchrun_saves_on_both_hosts_and_the_same_lines_go_on(recipe, tmp_path):
    folder = tmp_path / "run"
    with two_hosts() as hosts:
        first, second = start_both(hosts, recipe, folder, "schedule.steps=100")
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + TIMEOUT_SECONDS
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second.terminate()
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in (first, second)]
        assert "stopped by SIGTERM at step " in outputs[0]
        end(*start_both(hosts, recipe, folder, "schedule.steps=100"))
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, 101))


def test_deepspeed_starts_both_hosts_over_ssh(recipe, one_process, tmp_path):
    reason = missing_for_ssh()
    if reason is not None:
        pytest.skip(f"no ssh between hosts: {reason}")
    # The command of docs/slurm.md, and what `.deepspeed_env` is for.
    page = (REPO / "docs/slurm.md").read_text("utf-8")
    (line,) = re.findall(r"^    (\S*deepspeed --hostfile hosts pretrain.*)", page, re.MULTILINE)
    places = {"hosts": str(tmp_path / "hosts"), "run.yaml": str(recipe)}
    command = [places.get(word, word) for word in line.split()] + [f"run.dir={tmp_path}/two"]
    variables = tmp_path / "variables"
    variables.write_text("\n".join([GLOO_INTERFACE, *map("=".join, ENVIRONMENT.items())]))
    environment = os.environ | ENVIRONMENT | {"DS_ENV_FILE": str(variables)}
    with two_hosts() as hosts, ssh_servers(hosts, tmp_path) as path:
        Path(places["hosts"]).write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        end(hosts[0].start(command, env=environment | {"PATH": path}, **OPTIONS))
    assert_equal_runs(tmp_path / "two", one_process)
