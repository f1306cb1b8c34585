"""An ssh server on each host, with keys made for one test: what deepspeed and pdsh need."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from network import Host

_START_SECONDS = 30.0
_SERVER = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""
_CLIENT = """\
#!/bin/sh
exec {ssh} -F none -i {folder}/user -o StrictHostKeyChecking=no \\
  -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


def missing_for_ssh() -> str | None:
    """Why no ssh servers can be started here; None if they can."""
    absent = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    return (
        f"{', '.join(absent)} not installed: apt-get install openssh-server pdsh"
        if absent
        else None
    )


@contextlib.contextmanager
def ssh_servers(hosts: Sequence[Host], folder: Path) -> Iterator[str]:
    """Servers that let in whoever has the key of the folder.

    Args:
        hosts: Where.
        folder: For keys and settings.

    Yields:
        A PATH in which `ssh` uses the key, whatever the user's own settings.
    """
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    settings = folder / "sshd_config"
    settings.write_text(_SERVER.format(folder=folder))
    client = folder / "bin/ssh"
    client.parent.mkdir()
    client.write_text(_CLIENT.format(ssh=shutil.which("ssh"), folder=folder))
    client.chmod(0o755)
    # The server refuses to start without it.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = [shutil.which("sshd") or "sshd", "-D", "-e", "-f", str(settings)]
    log = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    servers = [host.start(server, **log) for host in hosts]
    path = f"{client.parent}:{os.environ['PATH']}"
    try:
        for host in hosts:
            _wait_until_reachable(hosts[0], host, path)
        yield path
    finally:
        for process in servers:
            process.terminate()
            process.wait()


def _wait_until_reachable(source: Host, target: Host, path: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    command = ["ssh", target.address, "true"]
    while (process := source.start(command, env=os.environ | {"PATH": path})).wait():
        assert time.monotonic() < deadline, f"no ssh to {target.address}: {process.returncode}"
        time.sleep(0.2)
