"""The command lines of docs/slurm.md, "Other launchers": each has the batch script's metrics."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from jobs import LAYOUT, QUIET, TIMEOUT_SECONDS, curve, wait_for_steps

REPO = Path(__file__).resolve().parents[2]
# The nodes here have no GPUs, four CPUs and two ranks each; n1 does not resolve.
SMALLER = {
    "--ntasks-per-node=8": "--ntasks-per-node=2",
    "--gpus-per-node=8": None,
    "--cpus-per-task=8": "--cpus-per-task=2",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--master_addr=n1": "--master_addr=127.0.0.1",
    "16": "4",
    "parallel.zero_stage=2": None,
}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def documented(beginning: str) -> list[str]:
    """The words of the command in the documentation that begins so, made smaller."""
    section = (REPO / "docs/slurm.md").read_text("utf-8").partition("## Other launchers")[2]
    section = section.partition("\n## ")[0].replace("\\\n", " ")
    commands = re.findall(r"^    +(\S.*)", section, re.MULTILINE)
    (command,) = [command for command in commands if command.startswith(beginning)]
    words = [SMALLER.get(word, word) for word in shlex.split(command)]
    return [word for word in words if word is not None]


def place_files(words: list[str], recipe: Path, folder: Path) -> list[str]:
    hosts = folder.parent / "hosts"
    hosts.write_text("n1 slots=2\nn2 slots=2\n")
    places = {"run.yaml": recipe, "hosts": hosts}
    return [str(places.get(word, word)) for word in words] + [f"run.dir={folder}", *LAYOUT]


def output_of(*processes: subprocess.Popen[str]) -> str:
    """What they print, once all have ended with status 0."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return "".join(outputs)


def test_srun_starts_ranks_stops_them_and_goes_on(whole, cluster, recipe, tmp_path):
    folder = tmp_path / "run"
    command = place_files(documented("srun "), recipe, folder)
    # Scatters SLURM's own numbers of the tasks.
    command.insert(1, "--distribution=cyclic")
    first = cluster.begin(*command, **QUIET)
    wait_for_steps(folder, 2)
    first.send_signal(signal.SIGUSR1)
    output = first.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert first.returncode == 75, output
    assert output.count("stopped by SIGUSR1 at step ") == 1
    assert (folder / "stopped").exists()
    assert "; resuming from " in output_of(cluster.begin(*command, **QUIET))
    assert curve(folder) == curve(whole[0])


@pytest.mark.parametrize("launcher", ["mpirun ", ".venv/bin/deepspeed "])
def test_launchers_that_use_srun_themselves(launcher, whole, cluster, recipe, tmp_path):
    if launcher == "mpirun " and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    allocation = "salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 "
    command = place_files(documented(allocation + launcher), recipe, tmp_path / "run")
    assert "4 x cpu" in output_of(cluster.begin(*command, **QUIET, **AS_ROOT))
    assert curve(tmp_path / "run") == curve(whole[0])


def test_torchruns_on_two_hosts(whole, cluster, recipe, tmp_path):
    folder = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [
        documented(f".venv/bin/torchrun --nnodes=2 --node_rank={rank} ") for rank in range(2)
    ]
    for command in commands:
        command[command.index("--master_port=29500")] = f"--master_port={port}"
    placed = [place_files(command, recipe, folder) for command in commands]
    output_of(*[cluster.begin(*command, **QUIET) for command in placed])
    assert curve(folder) == curve(whole[0])
