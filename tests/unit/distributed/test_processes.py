from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.processes import (
    choose_collective_timeout,
    leads_machine,
    order_kernels,
    read_world_size,
    start_process_group,
)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert read_world_size() == 1


def test_a_number_of_processes_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=4 is set without a launcher"):
        start_process_group(torch.device("cpu"))


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} is in use on this machine"):
            start_process_group(torch.device("cpu"))


@pytest.mark.parametrize("hang_timeout", [1.0, 1800.0, 7200.0, 30 * 86400.0])
def test_the_watchdog_speaks_before_a_collective_gives_up(hang_timeout):
    # It looks every ten seconds at the latest.
    assert choose_collective_timeout(hang_timeout) > timedelta(seconds=hang_timeout + 60)
    assert choose_collective_timeout(hang_timeout) >= timedelta(minutes=30)
    assert choose_collective_timeout(None) > choose_collective_timeout(hang_timeout)


def test_kernels_are_ordered_where_a_layer_is_shared(monkeypatch):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    order_kernels(1)
    assert name not in os.environ
    order_kernels(2)
    assert os.environ[name] == "1"
    monkeypatch.setenv(name, "8")
    order_kernels(2)
    assert os.environ[name] == "8"


def test_one_process_of_each_machine_leads_it():
    places = [{"LOCAL_RANK": str(n)} for n in range(3)]
    assert [leads_machine(place) for place in places] == [True, False, False]
    assert leads_machine({})
    # Where SLURM binds GPUs, each task takes the only one that it sees.
    bound = [{"LOCAL_RANK": "0", "SLURM_LOCALID": str(n)} for n in range(3)]
    assert [leads_machine(place) for place in bound] == [True, False, False]
    # torchrun, started once on each node by srun.
    within = [{"LOCAL_RANK": str(n), "SLURM_LOCALID": "0"} for n in range(3)]
    assert [leads_machine(place) for place in within] == [True, False, False]


LEAVES = """
import os, torch
from megatron_mdm.distributed.processes import join_process_group

for given in (None, "3"):
    if given:
        os.environ["LOCAL_RANK"] = given
    with join_process_group(torch.device("cpu")):
        print(os.environ["LOCAL_RANK"])
    print(os.environ.get("LOCAL_RANK"))
"""


def test_a_process_that_leaves_its_group_is_no_launchers():
    """DeepSpeed reads the variable; whoever chose a GPU by it keeps it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCAL_RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "None", "3", "3"], done.stderr
