"""`mdm sweep`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from megatron_mdm.core.command_line import own_command
from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.core.options import FOREIGN, REPEATED, Command, Count, make_app
from megatron_mdm.studies.steps import REPO
from megatron_mdm.studies.sweeps.grid import Sweep, SweepRun, load_sweep
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import read_states
from megatron_mdm.studies.sweeps.run_table import build_rows, check_table_path, write_table
from megatron_mdm.studies.sweeps.sweep_display import (
    Display,
    format_counts,
    format_runs,
    format_status,
)
from megatron_mdm.studies.sweeps.sweeping import LocalSweep

_WATCH_SECONDS = 2.0
# Of what a job array is told. No run is called so: names begin with a letter or digit.
_FOLDER = "_slurm"
_Only = Annotated[tuple[str, ...], REPEATED]


def plan(file: Path, /, *, only: _Only = ()) -> None:
    """What would be run, with N, D, epochs and FLOPs; starts nothing.

    Args:
        file: YAML file of the sweep.
        only: Only runs of such names, for example 'ar_*'; repeatable.
    """
    runs = size_runs(load_sweep(file).select(only))
    Display().page(format_runs(runs, read_states(runs)))


def run(
    file: Path,
    /,
    *more: Path,
    only: _Only = (),
    jobs: Count = 1,
    limit: Count | None = None,
    skip_failed: bool = False,
    save_seconds: Count = 120,
) -> int:
    """Run here what is not done.

    Args:
        file: YAML file of the sweep.
        more: Further ones: all runs in this order.
        only: Only runs of such names, for example 'ar_*'; repeatable.
        jobs: Runs at a time.
        limit: Start at most so many.
        skip_failed: Leave alone what has failed.
        save_seconds: Kill a run that has not saved so long after a request to stop.
    """
    from megatron_mdm.studies.sweeps.sweep_page import LivePage

    sweeps = [load_sweep(one) for one in (file, *more)]
    runs = _pool(sweeps, only) if more else sweeps[0].select(only)
    display = Display()
    return LocalSweep(
        size_runs(runs),
        own_command("train"),
        display,
        jobs=jobs,
        limit=limit,
        retry_failed=not skip_failed,
        save_seconds=save_seconds,
        pages=[LivePage(sweep, display) for sweep in sweeps],
    ).run()


def submit(
    file: Path,
    /,
    *sbatch: Annotated[str, FOREIGN],
    only: _Only = (),
    at_once: Count | None = None,
) -> None:
    """Run what is not done as a SLURM job array.

    Args:
        file: YAML file of the sweep.
        sbatch: Options that sbatch is given.
        only: Only runs of such names, for example 'ar_*'; repeatable.
        at_once: Most runs at a time.
    """
    sweep = load_sweep(file)
    chosen = size_runs(sweep.select(only))
    states = read_states(chosen)
    runs = [
        run
        for run in chosen
        if not states[run.name].has_ended and states[run.name].status != "running"
    ]
    if not runs:
        Display().event(f"nothing to submit: {format_counts(states)}")
        return
    job = submit_runs(
        sweep,
        runs,
        script=REPO / "pretrain/slurm/sweep.sbatch",
        command=[sys.executable, REPO / "tools/sweep.py", "run", sweep.path],
        options=sbatch,
        at_once=at_once,
    )
    # The first word is what scripts want.
    Display().page([f"{job} submitted with {len(runs)} runs"])


def status(file: Path, /, *, only: _Only = (), watch: bool = False) -> None:
    """How far each run is.

    Args:
        file: YAML file of the sweep.
        only: Only runs of such names, for example 'ar_*'; repeatable.
        watch: Until every run is done or failed.
    """
    runs, display = load_sweep(file).select(only), Display()
    while True:
        sized = size_runs(runs, from_ledgers=True)
        states = read_states(sized)
        display.page(format_status(sized, states))
        if not watch or all(state.status in ("done", "failed") for state in states.values()):
            return
        time.sleep(_WATCH_SECONDS)


def table(file: Path, /, *, out: Path | None = None) -> None:
    """Write the table of all runs.

    Args:
        file: YAML file of the sweep.
        out: .csv or .parquet; without it, runs.csv in the sweep's folder.
    """
    sweep = load_sweep(file)
    path = out or sweep.dir / "runs.csv"
    check_table_path(path)
    runs = size_runs(sweep.runs, from_ledgers=True)
    states = read_states(runs)
    write_table(path, sweep, build_rows(runs, states))
    Display().page([f"{path}: {format_counts(states)}"])


def page(file: Path, /, *, out: Path | None = None, watch: bool = False) -> None:
    """Write a page with the state, curves and results of all runs; `run` keeps one up to date.

    Args:
        file: YAML file of the sweep.
        out: The page; without it, sweep.html in the sweep's folder.
        watch: Write it again and again until every run is done or failed.
    """
    from megatron_mdm.studies.sweeps.sweep_page import (
        PAGE_NAME,
        REFRESH_SECONDS,
        write_sweep_page,
    )

    sweep = load_sweep(file)
    path = out or sweep.dir / PAGE_NAME
    states = write_sweep_page(sweep, path, is_live=watch)
    Display().page([f"{path}: {format_counts(states)}"])
    while watch and not all(state.status in ("done", "failed") for state in states.values()):
        time.sleep(REFRESH_SECONDS)
        states = write_sweep_page(sweep, path, is_live=True)
    if watch:
        write_sweep_page(sweep, path)


COMMANDS: dict[str, Command] = {
    "plan": plan,
    "run": run,
    "submit": submit,
    "status": status,
    "table": table,
    "page": page,
}
app = make_app(
    COMMANDS,
    "Runs a sweep from one YAML file, here or on SLURM, and makes the table of its runs.",
    name="sweep",
    examples=(
        "mdm sweep plan configs/sweeps/isoflop.yaml",
        "mdm sweep run configs/crossover/sizes.yaml --jobs 2",
    ),
)


def _pool(sweeps: Sequence[Sweep], patterns: Sequence[str]) -> list[SweepRun]:
    # Runs of two sweeps may have the same name.
    runs = [
        replace(run, name=f"{sweep.path.stem}/{run.name}")
        for sweep in sweeps
        for run in sweep.select(patterns)
    ]
    names, folders = [run.name for run in runs], [run.folder for run in runs]
    for place, run in enumerate(runs):
        if run.name in names[:place] or run.folder in folders[:place]:
            raise ConfigError(
                f"{run.name} would be run twice, in {run.folder}: name sweep files of different "
                "names and different dir."
            )
    return runs


def submit_runs(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    *,
    script: Path,
    command: Sequence[str | Path],
    options: Sequence[str],
    at_once: int | None = None,
) -> str:
    """Submits runs as one job array.

    The names of the runs stand in a file beside them, one a line: the task i runs line i. It looks
    at the run's state when it starts, so what has been done meanwhile is not run again.

    Args:
        sweep: The sweep.
        runs: Runs to submit, at least one.
        script: The batch script of a task.
        command: Interpreter and arguments of the command that runs a part of this sweep; the task
            adds which.
        options: Options of sbatch; they come after the script's own and win.
        at_once: Most tasks at a time; None: as many as SLURM lets.

    Returns:
        What sbatch says: the number of the job.

    Raises:
        ConfigError: There is no sbatch.
        MdmError: sbatch refused.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch cannot be found: submit on a machine of the cluster, or run the sweep here "
            "with mdm sweep run."
        )
    if not script.is_file():
        raise ConfigError(
            f"{script} is not there, and it is what SLURM runs: submit from a clone of the "
            "repository."
        )
    folder = sweep.dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("*.txt")))
    names = folder / f"{number}.txt"
    write_text_whole(names, "".join(f"{run.name}\n" for run in runs))
    throttle = "" if at_once is None else f"%{at_once}"
    words = ["sbatch", "--parsable", f"--array=1-{len(runs)}{throttle}"]
    words += [f"--output={folder}/{number}-%a.log", *options]
    words += [str(script), str(names), *(str(word) for word in command)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"status {result.returncode}"
        raise MdmError(f"sbatch refused the job array ({reason}): correct its options.")
    return result.stdout.strip()
