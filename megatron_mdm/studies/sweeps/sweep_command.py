"""The command line of tools/sweep.py."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.sweeps.grid import Sweep, SweepRun, load_sweep
from megatron_mdm.studies.sweeps.run_sizes import RunSize, size_runs
from megatron_mdm.studies.sweeps.run_states import RunState, check_same_run, read_state
from megatron_mdm.studies.sweeps.run_table import build_rows, check_table_path, write_table
from megatron_mdm.studies.sweeps.submitting import submit
from megatron_mdm.studies.sweeps.sweep_display import Display, count_line, plan_lines, status_lines
from megatron_mdm.studies.sweeps.sweeping import LocalSweep

_TRAINING_SCRIPT = "pretrain/pretrain_mdm.py"
_BATCH_SCRIPT = "pretrain/slurm/sweep.sbatch"
_TOOL = "tools/sweep.py"
_WATCH_SECONDS = 2.0
_FILES_HELP = "YAML file of the sweep; of several, all runs in this order"


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the commands and their options.

    Args:
        parser: An empty parser.
    """
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "plan": "what would be run, with N, D, epochs and FLOPs; starts nothing",
        "run": "run here what is not done",
        "submit": "run what is not done as a SLURM job array; unknown options go to sbatch",
        "status": "how far each run is",
        "table": "write the table of all runs",
    }
    parsers = {
        name: commands.add_parser(name, help=text, allow_abbrev=False)
        for name, text in helps.items()
    }
    for name, command in parsers.items():
        if name == "run":
            command.add_argument("files", type=Path, nargs="+", metavar="FILE", help=_FILES_HELP)
        else:
            command.add_argument("file", type=Path, metavar="FILE", help="YAML file of the sweep")
        if name != "table":
            command.add_argument(
                "--only",
                action="append",
                default=[],
                metavar="PATTERN",
                help="only runs of such names, for example 'ar_*'; repeatable",
            )
    add = parsers["run"].add_argument
    add("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default 1)")
    add("--limit", type=_positive, metavar="K", help="start at most so many")
    add("--skip-failed", action="store_true", help="leave alone what has failed")
    add(
        "--save-seconds",
        type=_positive,
        default=120,
        metavar="S",
        help="kill a run that has not saved so long after a request to stop (default 120)",
    )
    add = parsers["submit"].add_argument
    add("--at-once", type=_positive, metavar="N", help="most runs at a time")
    parsers["status"].add_argument(
        "--watch", action="store_true", help="until every run is done or failed"
    )
    parsers["table"].add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".csv or .parquet (default: runs.csv in the sweep's folder)",
    )


def run_command(arguments: argparse.Namespace, unknown: Sequence[str], repository: Path) -> int:
    """Does what the command line asks for.

    Args:
        arguments: Of `add_command_line`.
        unknown: Arguments that it does not know, for sbatch.
        repository: Folder of the training and batch scripts.

    Returns:
        Exit status.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    if unknown and arguments.command != "submit":
        raise ConfigError(
            f"{unknown[0]} is not an option of sweep.py {arguments.command}: see --help."
        )
    if arguments.command == "run":
        return _run(arguments, repository)
    sweep = load_sweep(arguments.file)
    if arguments.command == "submit":
        _submit(sweep, arguments, unknown, repository)
    elif arguments.command == "plan":
        runs = sweep.select(arguments.only)
        sizes = size_runs(runs)
        Display().page(plan_lines(runs, sizes, _states(runs, sizes)))
    elif arguments.command == "status":
        _status(sweep.select(arguments.only), arguments.watch)
    else:
        _table(sweep, arguments.out or sweep.dir / "runs.csv")
    return 0


def _run(arguments: argparse.Namespace, repository: Path) -> int:
    sweeps = [load_sweep(file) for file in arguments.files]
    runs = sweeps[0].select(arguments.only) if len(sweeps) == 1 else _pool(sweeps, arguments.only)
    return LocalSweep(
        runs,
        size_runs(runs),
        [sys.executable, repository / _TRAINING_SCRIPT],
        Display(),
        jobs=arguments.jobs,
        limit=arguments.limit,
        retry_failed=not arguments.skip_failed,
        save_seconds=arguments.save_seconds,
    ).run()


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


def _submit(
    sweep: Sweep, arguments: argparse.Namespace, options: Sequence[str], repository: Path
) -> None:
    chosen = sweep.select(arguments.only)
    states = _states(chosen, size_runs(chosen))
    runs = [
        run
        for run in chosen
        if not states[run.name].has_ended and states[run.name].status != "running"
    ]
    if not runs:
        Display().event(f"nothing to submit: {count_line(states)}")
        return
    job = submit(
        sweep,
        runs,
        script=repository / _BATCH_SCRIPT,
        command=[sys.executable, repository / _TOOL, "run", sweep.path],
        options=options,
        at_once=arguments.at_once,
    )
    # The first word is what scripts want.
    Display().page([f"{job} submitted with {len(runs)} runs"])


def _status(runs: Sequence[SweepRun], watch: bool) -> None:
    display = Display()
    while True:
        states = _states(runs, size_runs(runs, from_ledgers=True))
        display.page(status_lines(runs, states))
        if not watch or all(state.status in ("done", "failed") for state in states.values()):
            return
        time.sleep(_WATCH_SECONDS)


def _table(sweep: Sweep, path: Path) -> None:
    check_table_path(path)
    sizes = size_runs(sweep.runs, from_ledgers=True)
    states = _states(sweep.runs, sizes)
    write_table(path, sweep, build_rows(sweep.runs, sizes, states))
    Display().page([f"{path}: {count_line(states)}"])


def _states(runs: Sequence[SweepRun], sizes: dict[str, RunSize]) -> dict[str, RunState]:
    for run in runs:
        check_same_run(run)
    return {run.name: read_state(run, sizes[run.name]) for run in runs}


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
