"""Ranks whose disks differ: two mount namespaces, in which one path leads to different files."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_two_hosts import ENVIRONMENT, OPTIONS, write_recipe

from megatron_mdm.data.writer import ShardWriter

TIMEOUT_SECONDS = 120


def missing_for_two_disks() -> str | None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return "only root can make mount namespaces"
    result = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if result.returncode:
        return f"no mount namespace can be made ({result.stderr.strip()})"
    return None


@pytest.fixture
def disks(tmp_path) -> Path:
    reason = missing_for_two_disks()
    if reason is not None:
        pytest.skip(f"no two hosts: {reason}")
    (tmp_path / "one").mkdir()
    write_recipe(tmp_path / "one")
    return tmp_path


def other_disk(folder: Path, num_tokens: int, seed: int) -> None:
    folder.mkdir()
    if num_tokens:
        with ShardWriter(folder / "train", np.uint16) as writer:
            writer.add_document(np.random.default_rng(seed).integers(0, 299, num_tokens))
            writer.finish()


def end_of_both(disks: Path, *overrides: str) -> tuple[list[int], list[str], float]:
    """Runs two ranks, the second with the other disk; returns statuses, error lines, seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "pretrain/pretrain_mdm.py", "--config", "CONFIG"]
    command += [f"run.dir={disks / 'run'}", "faults.hang_timeout_seconds=30", *overrides]
    text = shlex.join(command).replace("CONFIG", str(disks / "one" / "tiny.yaml"))
    processes = []
    since = time.monotonic()
    for rank in range(2):
        launch = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        script = f"exec {text}"
        if rank == 1:
            # The recipe is on every node.
            shutil.copy(disks / "one" / "tiny.yaml", disks / "two")
            script = f"mount --bind {disks / 'two'} {disks / 'one'}; {script}"
        shell = ["unshare", "-m", "bash", "-c", script]
        processes.append(subprocess.Popen(shell, env=os.environ | ENVIRONMENT | launch, **OPTIONS))
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for text in outputs for line in text.splitlines() if line.startswith("error: ")]
    assert not any("Traceback" in text for text in outputs), outputs
    return [process.returncode for process in processes], lines, time.monotonic() - since


@pytest.mark.parametrize(
    ("num_tokens", "overrides"),
    [
        (2000, []),
        (2000, ["parallel.tensor_model_parallel_size=2"]),
        (4000, ["schedule.steps=null", "schedule.epochs=0.4"]),
    ],
)
def test_other_tokens_under_the_same_path_are_refused_before_the_first_step(
    num_tokens, overrides, disks
):
    other_disk(disks / "two", num_tokens, seed=1)
    statuses, lines, _ = end_of_both(disks, *overrides)
    assert statuses == [2, 2]
    path = disks / "one" / "train"
    # Both nodes' logs say it.
    assert len(lines) == 2
    assert lines[0] == lines[1]
    host = socket.gethostname()
    start = (
        f"error: rank 0 on {host} and rank 1 on {host} read different data at data.train.0.path="
    )
    assert lines[0].startswith(f"{start}{path} (fingerprints ")
    assert not (disks / "run" / "checkpoints").exists()


def test_a_shard_that_one_node_lacks_ends_all_ranks_at_once(disks):
    other_disk(disks / "two", 0, seed=1)
    statuses, lines, seconds = end_of_both(disks)
    assert statuses == [2, 2]
    # The other rank waited for half an hour; a busy machine takes a while to start two processes.
    assert seconds < 90
    start = f"error: rank 1 on {socket.gethostname()} cannot start: {disks}/one/train.idx does not"
    assert [line[: len(start)] for line in lines] == [start]
