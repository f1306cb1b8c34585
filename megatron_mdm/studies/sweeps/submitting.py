"""A sweep as a job array of SLURM: a task for each run that is not done."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.studies.sweeps.grid import Sweep, SweepRun

# No run is called so: names begin with a letter or digit.
_FOLDER = "_slurm"


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

    The names of the runs stand in a file beside them, one per line: the task i runs line i. It
    looks at the run's state when it starts, so what has been done meanwhile is not run again.

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
            "with tools/sweep.py run."
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
