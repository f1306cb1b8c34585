"""Says what a job has saved, and the command that goes on. For pretrain.sbatch, inside its job."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mdm.checkpoint.storage import find_latest_checkpoint
from megatron_mdm.config import load_config
from megatron_mdm.core.errors import MdmError, run_entry_point

REPOSITORY = Path(__file__).resolve().parents[2]
# Options of sbatch whose values SLURM tells a job.
OPTIONS = {
    "--job-name": "SLURM_JOB_NAME",
    "--account": "SLURM_JOB_ACCOUNT",
    "--qos": "SLURM_JOB_QOS",
    "--partition": "SLURM_JOB_PARTITION",
    "--nodes": "SLURM_JOB_NUM_NODES",
    "--ntasks-per-node": "SLURM_NTASKS_PER_NODE",
    "--cpus-per-task": "SLURM_CPUS_PER_TASK",
    "--gpus-per-node": "SLURM_GPUS_PER_NODE",
    "--gpus-per-task": "SLURM_GPUS_PER_TASK",
    "--mem": "SLURM_MEM_PER_NODE",
    "--mem-per-cpu": "SLURM_MEM_PER_CPU",
    "--export": "SLURM_EXPORT_ENV",
    "--array": "SLURM_ARRAY_TASK_ID",
}
# Of pretrain.sbatch.
VARIABLES = (
    *("SCRIPT", "LAUNCHER", "PROCESSES_PER_NODE", "SAVE_SECONDS", "NODE_LOG"),
    *("SETUP", "PYTHON", "SRUN_ARGS", "CONTAINER", "CONTAINER_MOUNTS", "CONTAINER_RUNTIME"),
)


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    try:
        folder = Path(load_config(arguments.config, arguments.overrides).run.dir)
        saved = find_latest_checkpoint(folder / "checkpoints")
        print(f"saved: {saved}" if saved is not None else f"saved: nothing yet in {folder}")
    except MdmError as error:
        print(f"saved: unknown: {error}")
    words = ["sbatch", *options(), REPOSITORY / "pretrain/slurm/pretrain.sbatch"]
    words += [arguments.config, *arguments.overrides]
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    line = shlex.join(["env", *variables, *map(str, words)] if variables else map(str, words))
    place = shlex.quote(os.environ["SLURM_SUBMIT_DIR"])
    print(f"to go on, with any other options that the job had: cd {place} && {line}")


def options() -> list[str]:
    """Those of the job, as far as SLURM tells them."""
    found = {option: os.environ.get(name) for option, name in OPTIONS.items()}
    command = ["squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%l"]
    with contextlib.suppress(OSError):
        limits = subprocess.run(command, capture_output=True, text=True).stdout.split()
        found["--time"] = limits[0] if limits else None
    return [f"{option}={value}" for option, value in found.items() if value]


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
