from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.core import launcher
from megatron_mdm.core.launcher import (
    Launch,
    LaunchError,
    adopt_launch,
    drop_launch,
    expand_counts,
    expand_nodes,
    find_launch,
    find_meeting_point,
)

TORCH = {"RANK": "3", "WORLD_SIZE": "16"}
STEP = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[08-10]",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "4",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.99",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1300692993",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def find(environment):
    return find_launch(environment, lambda node: f"{node}.example")


def test_a_process_without_a_launcher_has_no_place():
    assert find({}) is None
    # A dry run for as many processes.
    assert find({"WORLD_SIZE": "8"}) is None
    environment = {}
    adopt_launch(environment)
    assert environment == {}


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1"},
    ],
    ids=["batch script", "step of one task", "mpirun -n 1", "MPICH of one"],
)
def test_one_task_is_one_process(environment):
    assert find(environment) is None


@pytest.mark.parametrize("outer", [STEP, OPEN_MPI, MPICH], ids=["srun", "Open MPI", "MPICH"])
def test_torchruns_own_variables_win(outer):
    assert find(outer | TORCH) is None


def test_srun_ranks_are_numbered_node_by_node():
    # 20000 + 31 x 70 + 2
    assert find(STEP) == Launch(3, 1, 5, 2, "n08.example", 22172)
    last = STEP | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0"}
    assert find(last) == Launch(4, 0, 5, 1, "n08.example", 22172)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 1))
def test_every_task_of_a_step_has_another_rank(counts):
    step = STEP | {
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)),
        "SLURM_STEP_NODELIST": f"n[1-{len(counts)}]",
    }
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    found = [
        find(step | {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)})
        for node, local in places
    ]
    assert [launch.rank for launch in found] == list(range(sum(counts)))
    assert len({(launch.address, launch.port) for launch in found}) == 1


@given(st.integers(1, 10**9), st.integers(1, 200), st.integers(0, 20), st.integers(0, 20))
def test_jobs_and_steps_beside_each_other_have_other_ports(job, later, step, other_step):
    def port(job, step):
        numbers = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return find_meeting_point(STEP | numbers | {"MASTER_ADDR": "head"})[1]

    assert 20000 <= port(job, step) < 30000
    assert port(job, step) != port(job + later, other_step)
    assert step == other_step or port(job, step) != port(job, other_step)


def test_a_step_on_one_node_needs_no_name():
    one_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step = STEP | one_node | {"SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0"}
    assert find_launch(step, lambda node: None).address == "127.0.0.1"


def test_a_port_in_use_is_told_on_the_first_node_before_torchrun_starts():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        point = {"MASTER_ADDR": "head", "MASTER_PORT": str(port)}
        for node in ("0", "1"):
            result = subprocess.run(
                [sys.executable, launcher.__file__],
                env=STEP | point | {"SLURM_NODEID": node},
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == (1 if node == "0" else 0)
            assert result.stdout == ("" if node == "0" else f"head {port}\n")
            line = f"error: MASTER_PORT={port} cannot be used on the first node ("
            assert result.stderr.startswith(line) == (node == "0")


def test_what_the_user_sets_wins():
    given_point = {"MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    for environment in (STEP, OPEN_MPI, MPICH):
        launch = find(environment | given_point)
        assert (launch.address, launch.port) == ("head", 4000)


def test_a_task_with_a_bound_gpu_takes_the_one_it_sees():
    alone = STEP | {"CUDA_VISIBLE_DEVICES": "0"}
    assert find(alone).local_rank == 1
    assert find(alone | {"SLURM_GPUS_PER_TASK": "1"}).local_rank == 0
    # The node's two tasks have two GPUs, or share one.
    assert find(alone | {"SLURM_GPUS_ON_NODE": "2"}).local_rank == 0
    assert find(alone | {"SLURM_GPUS_ON_NODE": "1"}).local_rank == 1
    shown = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}
    assert find(STEP | shown).local_rank == 1


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun_on_one_host_and_on_slurms_nodes(variables):
    one_host = variables | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MPI_LOCALNRANKS": "4"}
    launch = find(one_host)
    assert (launch.rank, launch.local_rank, launch.world_size) == (3, 1, 4)
    assert launch.address == "127.0.0.1"
    # Its helpers are tasks of a step, one a node.
    helpers = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2"}
    launch = find(variables | STEP | helpers | job)
    assert (launch.rank, launch.world_size, launch.local_world_size) == (3, 4, 2)
    assert launch.address == "n1.example"


@pytest.mark.parametrize(
    ("variables", "option"),
    [(OPEN_MPI, "-x MASTER_ADDR=HOST"), (MPICH, "-genv MASTER_ADDR HOST")],
    ids=["Open MPI", "MPICH"],
)
def test_mpirun_on_several_hosts_asks_for_the_first(variables, option):
    with pytest.raises(LaunchError, match=option):
        find(variables)
    first = {"OMPI_COMM_WORLD_RANK": "0", "PMI_RANK": "0"}
    elsewhere = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2"}
    with pytest.raises(LaunchError, match=option):
        find(variables | first | elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            r"2\(x2\),1 on .* does not make the SLURM_STEP_NUM_TASKS=4",
        ),
        ({"SLURM_STEP_NODELIST": "n[1-2]"}, "does not make"),
        ({"SLURM_NODEID": "3"}, "name no task"),
        ({"SLURM_LOCALID": "2"}, "name no task"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x is not a number"),
        ({"SLURM_STEP_NODELIST": "n[1-"}, "cannot be read"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "cannot be read"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but the launcher started 5"),
    ],
)
def test_variables_that_do_not_fit_are_one_sentence(change, message):
    with pytest.raises(LaunchError, match=message) as caught:
        find(STEP | change)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "²", " 2"])
@pytest.mark.parametrize(
    "name",
    [
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
        "TORCHELASTIC_RESTART_COUNT",
    ],
)
@pytest.mark.parametrize("others", [{}, TORCH, STEP, OPEN_MPI, MPICH])
def test_a_variable_that_is_no_number_is_named(others, name, value):
    with pytest.raises(LaunchError) as caught:
        find({**others, name: value})
    assert str(caught.value) == f"{name}={value} is not a number: unset it, or correct it."


@pytest.mark.parametrize("launch", [STEP, OPEN_MPI, MPICH])
def test_every_number_of_a_launcher_is_checked(launch):
    for name, value in launch.items():
        # Below 2 there is no launch; and some need not be numbers.
        if value.isdigit() and name not in ("PMIX_NAMESPACE", "SLURM_PROCID"):
            with pytest.raises(LaunchError, match=f"^{name}=abc is not a number: unset it"):
                find(launch | {name: "abc"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 leaves no process: unset it, or"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port: unset it, or"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port: unset it, or"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2: unset both, or"),
        (
            {"LOCAL_RANK": "8", "LOCAL_WORLD_SIZE": "8"},
            "LOCAL_RANK=8 is not below LOCAL_WORLD_SIZE=8: unset both, or",
        ),
    ],
)
def test_numbers_that_cannot_be_are_one_sentence(variables, message):
    with pytest.raises(LaunchError) as caught:
        find(variables)
    assert str(caught.value).startswith(message)


def test_a_process_whose_rank_is_no_number_speaks_for_itself():
    environment = {"RANK": "abc", "WORLD_SIZE": "2"}
    with pytest.raises(LaunchError):
        adopt_launch(environment)
    assert environment["RANK"] == "0"


def test_a_missing_variable_and_an_unknown_host_are_one_sentence():
    without = {name: value for name, value in STEP.items() if name != "SLURM_NODEID"}
    with pytest.raises(LaunchError, match="SLURM_NODEID is not set"):
        find(without)
    with pytest.raises(LaunchError, match=r"n08, the first node, has neither .* set MASTER_ADDR"):
        find_launch(STEP, lambda node: None)


def test_the_first_task_tells_an_error_for_all():
    environment = STEP | {"SLURM_NODEID": "7"}
    with pytest.raises(LaunchError):
        adopt_launch(environment)
    assert environment["RANK"] == "4"


def test_a_child_of_a_rank_is_no_rank():
    environment = STEP | {"MASTER_ADDR": "head", "PATH": "/bin"}
    adopt_launch(environment)
    assert environment["RANK"] == "3"
    assert environment["LOCAL_WORLD_SIZE"] == "2"
    child = drop_launch(environment)
    assert child["PATH"] == "/bin"
    assert find(child) is None


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,7]", ["n08", "n09", "n10", "n7"]),
        ("a[1-2]b[0-1],c", ["a1b0", "a1b1", "a2b0", "a2b1", "c"]),
        ("gpu-[001,003].site", ["gpu-001.site", "gpu-003.site"]),
    ],
)
def test_lists_of_nodes(short, names):
    assert expand_nodes(short) == names


@pytest.mark.parametrize("short", ["", "n[1-2", "n[a-b]", "n]1"])
def test_wrong_lists_of_nodes_are_refused(short):
    with pytest.raises(LaunchError):
        expand_nodes(short)


def test_numbers_of_tasks():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]
