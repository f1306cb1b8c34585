"""Two hosts as Linux network namespaces: they share the kernel, and meet over one cable only."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "uplink"


@dataclass(frozen=True)
class Host:
    """A host.

    Attributes:
        namespace: Its network namespace.
        address: Its address at the cable.
    """

    namespace: str
    address: str

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a command on it."""
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], **options)


def missing_for_hosts() -> str | None:
    """Why no two hosts can be made here; None if they can."""
    if shutil.which("ip") is None:
        return "ip is not installed: apt-get install iproute2"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    namespace = f"probe-{os.getpid()}"
    result = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
    if result.returncode:
        return f"no network namespace can be made ({result.stderr.strip()})"
    ends = ("name", "probe0", "type", "veth", "peer", "name", "probe1")
    cable = ["ip", "-netns", namespace, "link", "add", *ends]
    result = subprocess.run(cable, capture_output=True, text=True)
    _ip("netns", "delete", namespace)
    if result.returncode:
        return f"no virtual cable can be made ({result.stderr.strip()})"
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, each with a loopback of its own, joined by a virtual cable."""
    # An address block for documentation, which no real network uses.
    hosts = [Host(f"host{number}-{os.getpid()}", f"192.0.2.{number}") for number in (1, 2)]
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        ends = ("type", "veth", "peer", "name", INTERFACE, "netns", second.namespace)
        _ip("link", "add", INTERFACE, "netns", first.namespace, *ends)
        for host in hosts:
            inside = ("-netns", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip(*inside, "link", "set", INTERFACE, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"
