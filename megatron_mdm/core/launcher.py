"""Which rank of which run this process is, whatever launcher started it.

Knows torchrun, deepspeed, srun, Open MPI and MPICH by their environment variables. Needs the
standard library alone: it runs before anything is imported, and as a file in
`pretrain/slurm/ranks.sh`.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

# Below the ports that Linux gives out by itself, from 32768 on.
_FIRST_PORT, _NUM_PORTS = 20000, 10000
# PyTorch's own, where nothing tells two runs on one machine apart.
_DEFAULT_PORT = 29500
# What makes a process a rank; a child without them is a process of its own.
_RANK_NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "CROSS_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)
# What PyTorch, DeepSpeed and this project read as numbers.
_OWN_NUMBERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    "TORCHELASTIC_RESTART_COUNT",
)

# torchrun's and deepspeed's: of a process that they have started and wait for.
_WAITED_FOR = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
# Read on import: a launcher may end while its ranks still import their libraries.
_PARENT = os.getppid()


class LaunchError(Exception):
    """Variables of a launcher that do not fit each other, or do not say where ranks can meet."""


@dataclass(frozen=True)
class Launch:
    """A rank's place and its meeting point.

    Attributes:
        rank: Global rank.
        local_rank: Its number on its machine, or the GPU that it shall take.
        world_size: Ranks in all.
        local_world_size: Ranks of its machine.
        address: Host of rank 0.
        port: Where rank 0 waits for the others.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int


def adopt_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Gives the process the names that PyTorch and DeepSpeed read, if a launcher started it.

    Raises:
        LaunchError: See `find_launch`.
    """
    try:
        launch = find_launch(environment)
    except LaunchError:
        # So that one rank alone tells the error.
        if not _is_number(environment.get("RANK", "0")):
            environment["RANK"] = "0"
        numbers = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
        number = next((name for name in numbers if name in environment), None)
        if number is not None:
            environment.setdefault("RANK", environment[number])
        raise
    if launch is not None:
        environment["RANK"] = str(launch.rank)
        environment["LOCAL_RANK"] = str(launch.local_rank)
        environment["WORLD_SIZE"] = str(launch.world_size)
        environment["LOCAL_WORLD_SIZE"] = str(launch.local_world_size)
        environment["MASTER_ADDR"] = launch.address
        environment["MASTER_PORT"] = str(launch.port)


def drop_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Leaves out what would make a child process a rank of this process's run."""
    return {name: value for name, value in environment.items() if name not in _RANK_NAMES}


def has_lost_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Has the launcher ended that started this rank, so that nobody waits for it?

    A process that somebody started by hand may outlive a terminal; that is no loss.
    """
    return os.getppid() != _PARENT and any(name in environment for name in _WAITED_FOR)


def find_launch(
    environment: Mapping[str, str], find_address: Callable[[str], str | None] | None = None
) -> Launch | None:
    """This process's place, as srun or mpirun tells it.

    Args:
        environment: Variables of the process.
        find_address: From the name of a node to an address, None where there is none.

    Returns:
        The place; None for a process without a launcher and for one of torchrun or deepspeed, which
        set PyTorch's own names.

    Raises:
        LaunchError: A variable is not the number that it should be, the variables contradict each
            other, or rank 0 cannot be found.
    """
    _check_own_names(environment)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None
    find_address = find_address or resolve_address
    # mpirun may itself start its helpers by srun, whose variables the ranks then see too.
    if _read_number(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        found = [_read_number(environment, f"OMPI_COMM_WORLD_{name}") for name in names]
        launch = _read_mpi_launch(environment, found, "-x MASTER_ADDR=HOST", find_address)
    elif _read_number(environment, "PMI_SIZE", 1) > 1 and "MPI_LOCALNRANKS" in environment:
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        found = [_read_number(environment, name) for name in names]
        launch = _read_mpi_launch(environment, found, "-genv MASTER_ADDR HOST", find_address)
    elif _read_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        launch = _read_slurm_launch(environment, find_address)
    else:
        return None
    if _read_number(environment, "WORLD_SIZE", launch.world_size) != launch.world_size:
        raise LaunchError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but the launcher started "
            f"{launch.world_size} processes: unset WORLD_SIZE."
        )
    return launch


def find_meeting_point(
    environment: Mapping[str, str], find_address: Callable[[str], str | None] | None = None
) -> tuple[str, int]:
    """Where the ranks of a SLURM step meet.

    Args:
        environment: Variables of a task of the step.
        find_address: From the name of a node to an address, None where there is none.

    Returns:
        MASTER_ADDR or the step's first node, and MASTER_PORT or a port that belongs to the step.

    Raises:
        LaunchError: A variable is missing, or the first node has no address.
    """
    # Not SLURM_LAUNCH_NODE_IPADDR: under salloc srun may run on a login node.
    nodes = expand_nodes(_read_text(environment, "SLURM_STEP_NODELIST"))
    step = _read_number(environment, "SLURM_STEP_ID")
    address = environment.get("MASTER_ADDR")
    port = _read_number(environment, "MASTER_PORT", _derive_slurm_port(environment, step))
    return address or _choose_address(nodes, find_address or resolve_address), _check_port(port)


def expand_nodes(nodes: str) -> list[str]:
    """Names of nodes from SLURM's short form.

    Args:
        nodes: Such as `n[01-03,7],login`.

    Returns:
        Such as n01, n02, n03, n7, login.

    Raises:
        LaunchError: It is not of that form.
    """
    words = re.findall(r"(?:[^,\[\]()\s]|\[[^\[\]]*\])+", nodes)
    if not nodes or ",".join(words) != nodes:
        raise LaunchError(f"The list of nodes {nodes!r} cannot be read: start torchrun on each.")
    names: list[str] = []
    for word in words:
        parts = re.split(r"\[([^\]]*)\]", word)
        choices = [_expand_range(part) if odd % 2 else [part] for odd, part in enumerate(parts)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def expand_counts(counts: str) -> list[int]:
    """Numbers from SLURM's short form: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        LaunchError: It is not of that form.
    """
    numbers: list[int] = []
    for word in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if match is None:
            raise LaunchError(f"The numbers of tasks {counts!r} cannot be read: use torchrun.")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def resolve_address(node: str) -> str | None:
    """The node's name if it resolves, or else the address that SLURM knows; None without either."""
    if _resolves(node):
        return node
    try:
        result = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"NodeAddr=(\S+)", result.stdout)
    return match[1] if match is not None and _resolves(match[1]) else None


def _read_slurm_launch(
    environment: Mapping[str, str], find_address: Callable[[str], str | None]
) -> Launch:
    counts = expand_counts(_read_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    nodes = expand_nodes(_read_text(environment, "SLURM_STEP_NODELIST"))
    world_size = _read_number(environment, "SLURM_STEP_NUM_TASKS")
    node = _read_number(environment, "SLURM_NODEID")
    local = _read_number(environment, "SLURM_LOCALID")
    if sum(counts) != world_size or len(counts) != len(nodes):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']} on "
            f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']} does not make the "
            f"SLURM_STEP_NUM_TASKS={world_size} of this step: leave these variables to srun."
        )
    if node >= len(counts) or local >= counts[node]:
        raise LaunchError(
            f"SLURM_NODEID={node} and SLURM_LOCALID={local} name no task of "
            f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']}: leave these "
            "variables to srun."
        )
    address, port = find_meeting_point(environment, find_address)
    # Not SLURM_PROCID, which --distribution scatters: neighbours share a node, and rank 0 is on the
    # first one.
    rank = sum(counts[:node]) + local
    gpu = 0 if _has_gpu_of_its_own(environment, counts[node]) else local
    return Launch(rank, gpu, world_size, counts[node], address, port)


def _has_gpu_of_its_own(environment: Mapping[str, str], num_tasks: int) -> bool:
    # Tasks to which SLURM binds GPUs see only theirs, each under the number 0; not every version
    # tells a task of the binding.
    if re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")) is None:
        return False
    bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"))
    return bound or _read_number(environment, "SLURM_GPUS_ON_NODE", 0) >= num_tasks


def _read_mpi_launch(
    environment: Mapping[str, str],
    found: list[int],
    option: str,
    find_address: Callable[[str], str | None],
) -> Launch:
    rank, world_size, local_rank, local_world_size = found
    # All ranks of one mpirun have the same.
    run = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    port = _DEFAULT_PORT
    if run is not None:
        port = _FIRST_PORT + zlib.crc32(run.encode()) % _NUM_PORTS
    elif "SLURM_JOB_ID" in environment:
        port = _derive_slurm_port(environment, 0)
    address = environment.get("MASTER_ADDR")
    if not address and local_world_size == world_size:
        address = "127.0.0.1"
    elif not address:
        nodes = environment.get("SLURM_JOB_NODELIST")
        first = expand_nodes(nodes)[0] if nodes else None
        # A hostfile may begin with another node.
        if first is None or (rank == 0 and environment.get("SLURMD_NODENAME", first) != first):
            raise LaunchError(
                f"mpirun started {world_size} processes on several hosts and does not tell them "
                f"where rank 0 is: give it {option}, with the first host."
            )
        address = _choose_address([first], find_address, is_whole=False)
    port = _read_number(environment, "MASTER_PORT", port)
    return Launch(rank, local_rank, world_size, local_world_size, address, port)


def _choose_address(
    nodes: list[str], find_address: Callable[[str], str | None], *, is_whole: bool = True
) -> str:
    if is_whole and len(nodes) == 1:
        return "127.0.0.1"
    address = find_address(nodes[0])
    if address is None:
        raise LaunchError(
            f"{nodes[0]}, the first node, has neither a name that resolves nor an address that "
            "scontrol shows: set MASTER_ADDR to its address."
        )
    return address


def _derive_slurm_port(environment: Mapping[str, str], step: int) -> int:
    # Jobs and steps that run beside each other have numbers close to each other: never the same.
    return _FIRST_PORT + (31 * _read_number(environment, "SLURM_JOB_ID") + step) % _NUM_PORTS


def _expand_range(ranges: str) -> list[str]:
    names: list[str] = []
    for word in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None:
            raise LaunchError(
                f"The list of nodes [{ranges}] cannot be read: start torchrun on each."
            )
        first, last = match[1], match[2] or match[1]
        names += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return names


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True


def _check_own_names(environment: Mapping[str, str]) -> None:
    """Checks PyTorch's own names, which a launcher or a user may have set to anything."""
    given = {name: _read_number(environment, name) for name in _OWN_NUMBERS if name in environment}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if given.get(name) == 0:
            raise LaunchError(f"{name}=0 leaves no process: unset it, or set it to 1 or more.")
    _check_port(given.get("MASTER_PORT", _DEFAULT_PORT))
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in given and size in given and given[rank] >= given[size]:
            raise LaunchError(
                f"{rank}={given[rank]} is not below {size}={given[size]}: unset both, or start the "
                "run by torchrun, which sets them."
            )


def _check_port(port: int) -> int:
    if not 0 < port < 1 << 16:
        raise LaunchError(
            f"MASTER_PORT={port} is no port: unset it, or set it to a free one from 1024 to 65535."
        )
    return port


def _read_text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise LaunchError(f"{name} is not set, as the launcher should: start the run by torchrun.")
    return environment[name]


def _read_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    value = _read_text(environment, name)
    if not _is_number(value):
        raise LaunchError(f"{name}={value} is not a number: unset it, or correct it.")
    return int(value)


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _tell_meeting_point(environment: Mapping[str, str]) -> str:
    address, port = find_meeting_point(environment)
    if _read_number(environment, "SLURM_NODEID") == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise LaunchError(
                    f"MASTER_PORT={port} cannot be used on the first node ({error.strerror}): set "
                    "MASTER_PORT to a free port."
                ) from None
    return f"{address} {port}"


if __name__ == "__main__":
    import sys

    try:
        print(_tell_meeting_point(os.environ))  # noqa: T201 - for ranks.sh
    except LaunchError as error:
        sys.exit(f"error: {error}")
