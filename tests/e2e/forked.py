"""The project's commands in processes that need not import the engines, which takes seconds.

A server imports them once, and every command is a fork of it. What a launcher starts, and one
command of each kind elsewhere in the tests, imports them as users' commands do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# Not transformers, which reads where the code of exports lies when it is imported.
_CONTEXT.set_forkserver_preload(["megatron_mdm.training.launch", "megatron_mdm.training.command"])


def start(
    command: Sequence[str],
    *,
    cores: set[int] | None,
    cwd: Path,
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
) -> ForkServerProcess:
    """Starts a script.

    Args:
        command: The script and its arguments.
        cores: Cores to run on; None: all.
        cwd: Working folder.
        environment: All variables of the process.
        output: File for standard output.
        errors: File for standard error.

    Returns:
        The process, which leads a session of its own.
    """
    arguments = (list(command), cores, str(cwd), dict(environment), str(output), str(errors))
    process = _CONTEXT.Process(target=_become, args=arguments)
    process.start()
    return process


def _become(
    command: list[str],
    cores: set[int] | None,
    cwd: str,
    environment: dict[str, str],
    output: str,
    errors: str,
) -> None:
    os.setsid()
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    # The tests' own process may have imported an export's code from there.
    sys.path[:] = [path for path in sys.path if path != os.environ.get("HF_MODULES_CACHE")]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(cwd, command[0]).resolve().parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        # A fork of a server ends without them.
        atexit._run_exitfuncs()
        sys.stdout.flush()
