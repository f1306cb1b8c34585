"""A real SLURM cluster of two nodes on this machine: its own daemons, ports, key and folder.

Nothing outside the folder changes. The nodes are called n1 and n2 and share one address, so these
names do not resolve: a script that runs here finds the first node by address, as it has to wherever
node names are known to SLURM alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_DAEMONS = ("slurmctld", "slurmd", "munged")
_START_SECONDS = 30.0

# cred_expire: a requeued job waits for so long, by default for two minutes; then for the scheduler,
# which looks at such jobs every half minute by itself (bf_interval).
# MinJobAge: after 300 s, by default, the controller forgets a job that tests still ask about.
# The partition `urgent` preempts the jobs of `main`, which get GraceTime seconds to save.
_CONFIG = """\
ClusterName=test
FirstJobId={first_job}
MinJobAge=7200
SlurmctldHost=localhost
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
MpiDefault=none
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first_port} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second_port} CPUs=4 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=off
"""


def missing_for_a_cluster() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in _DAEMONS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can run the daemons of SLURM"


class Cluster:
    """Two nodes of four CPUs each, as SLURM counts them.

    Args:
        folder: Empty folder for the state, the key and the logs of the daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
        } | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        for name in ("controller", "n1", "n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = dict(
            zip(("controller_port", "first_port", "second_port"), _free_ports(3), strict=True)
        )
        # The ports of runs follow from their jobs' numbers: another cluster of this machine, which
        # other tests may have started, has others.
        names = {"folder": self.folder, "first_job": 1 + os.getpid() % 50_000}
        (self.folder / "slurm.conf").write_text(_CONFIG.format(**names, **ports))
        places = (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"))
        places += (("log-file", "log"), ("seed-file", "seed"))
        paths = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in places]
        # Forced, as it warns of an owner or a mode of the folder that it does not like.
        self._start("munged", "--foreground", "--force", *paths)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait_until_idle()

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        if self._daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
            # A controller that has ended cannot tell; its daemons have to end all the same.
            with contextlib.suppress(AssertionError):
                self._wait_until_no_job()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def run(self, *command: object, cwd: Path | None = None, **environment: str) -> str:
        """Runs a client of SLURM from the repository's root, or cwd; returns what it printed."""
        result = subprocess.run(
            [str(word) for word in command],
            env=self.environment | environment,
            cwd=cwd or Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def begin(self, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Starts a command from the repository's root that runs as long as its job."""
        return subprocess.Popen(
            [str(word) for word in command],
            env=self.environment | environment,
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def field(self, job: str, name: str) -> str:
        """A field of a job, such as JobState, Restarts or ExitCode."""
        for word in self.run("scontrol", "show", "job", job).split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        raise AssertionError(f"job {job} has no {name}")

    def processes(self, job: str) -> list[str]:
        """Command lines of all processes that the job's batch script and steps have left here."""
        word = f"SLURM_JOB_ID={job}".encode()
        lines = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if word in (process / "environ").read_bytes().split(b"\0"):
                    lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended
                continue
        return lines

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self._daemons)}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
            )

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        nodes = ""
        while time.monotonic() < deadline:
            result = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%N %t", "-p", "main"],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            nodes = result.stdout + result.stderr
            if nodes.split() == ["n1", "idle", "n2", "idle"]:
                return
            time.sleep(0.2)
        logs = "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))
        raise AssertionError(f"no two idle nodes within {_START_SECONDS} s: {nodes}\n{logs}")

    def _wait_until_no_job(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.run("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    """Free ports below those that the system gives out by itself, and below those of runs."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("this machine has no free ports from 10000 to 19999")
