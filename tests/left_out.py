"""What a session left out because the machine lacks it, and the command that brings it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest

# By folder: what its tests need, and how to get and run them.
_NEEDS = {
    "tests/slurm": ("a SLURM cluster", "as root: make cluster-packages test-cluster"),
    "tests/hosts": ("network namespaces", "as root: make cluster-packages test-cluster"),
    "tests/versions": ("other versions of packages", "make test-versions"),
    "tests/browser": ("a browser", "as root: make browser-packages test-browser"),
}


def lines_about(skipped: Iterable[pytest.TestReport]) -> list[str]:
    """Says what was left out.

    Args:
        skipped: Reports of skipped tests.

    Returns:
        A line for each folder that needs more than Python and has skipped tests.
    """
    reasons = defaultdict(list)
    for report in skipped:
        folder = "/".join(report.nodeid.split("/")[:2])
        if folder in _NEEDS and isinstance(report.longrepr, (tuple, list)):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            reasons[folder].append(reason.splitlines()[0])
    return [
        f"{len(reasons[folder])} of {folder} for want of {need} ({reasons[folder][0]}); {command}"
        for folder, (need, command) in _NEEDS.items()
        if folder in reasons
    ]


# Outermost, so that it comes after pytest's own summary.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    lines = lines_about(terminalreporter.getreports("skipped"))
    if lines:
        terminalreporter.section("left out on this machine", yellow=True)
        for line in lines:
            terminalreporter.write_line(line)
