"""The batch script on a real SLURM: two nodes, two processes each, TP 2 x DP 2."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from jobs import (
    LAYOUT,
    TIMEOUT_SECONDS,
    curve,
    log_of,
    submit,
    wait_for,
    wait_for_steps,
)

SCRIPT = Path(__file__).resolve().parents[2] / "pretrain/slurm/pretrain.sbatch"


def test_two_nodes_train_as_one_process_does(whole, one_process, cluster):
    folder, job = whole
    found, expected = curve(folder), curve(one_process)
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for left, right in zip(found, expected, strict=True):
        assert left[1] == pytest.approx(right[1], abs=1e-5)
        assert left[2] == pytest.approx(right[2], rel=1e-4)
        assert left[3] == right[3]
    assert cluster.field(job, "Restarts") == "0"
    assert "4 x cpu" in log_of(folder, job, "-node0")
    assert "requeued" not in log_of(folder, job)


@pytest.mark.parametrize(
    ("way", "launcher"),
    [("preempted", "torchrun"), ("time limit", "torchrun"), ("preempted", "srun")],
)
def test_a_stopped_job_saves_is_requeued_and_ends_bit_for_bit(
    way, launcher, whole, cluster, recipe, tmp_path
):
    folder = tmp_path / "run"
    job = submit(cluster, recipe, folder, *LAYOUT, LAUNCHER=launcher)
    wait_for_steps(folder, 2)
    if way == "preempted":
        cluster.run("scontrol", "requeue", job)
        number = "SIGTERM"
    else:
        # SLURM looks at time limits twice per minute: this is what it sends then.
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        number = "SIGUSR1"
    wait_for(cluster, job, "PENDING")
    saved = [path.name for path in (folder / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert (folder / "stopped").exists()
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "COMPLETED"

    # One that waits to requeue would stop the second start, however far it is.
    assert not [line for line in cluster.processes(job) if "sleep" in line]
    ranks = log_of(folder, job, "-node0")
    assert f"stopped by {number} at step {step}: saved {folder}" in ranks
    assert f"resuming from {folder}/checkpoints/{saved[0]}" in ranks
    assert cluster.field(job, "Restarts") == "1"
    assert not (folder / "stopped").exists()
    assert curve(folder) == curve(whole[0])


def test_wrong_sizes_are_a_line_each_and_no_requeue(cluster, recipe, tmp_path):
    folder = tmp_path / "run"
    job = submit(cluster, recipe, folder, "parallel.tensor_model_parallel_size=3")
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert cluster.field(job, "Restarts") == "0"
    lines = [line for line in log_of(folder, job).splitlines() if "error" in line.lower()]
    assert lines
    for line in lines:
        assert line.startswith("error: parallel.tensor_model_parallel_size=3 ")
        assert " does not divide " in line
    assert not folder.exists()
    assert not list(tmp_path.glob("*-node*"))


def test_from_elsewhere_without_variables_and_without_requeue(whole, cluster, recipe, tmp_path):
    """The next part is submitted ahead, and the line that the first one prints goes on as well."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def submit_part(*options: str) -> str:
        options = ("--export=NONE", "--nodes=2", "--ntasks-per-node=2", "--no-requeue", *options)
        return cluster.run(
            *("sbatch", "--parsable", f"--output={tmp_path}/job-%j.log", *options, SCRIPT),
            *(recipe, "run.dir=../run", *LAYOUT),
            cwd=elsewhere,
        )

    job = submit_part()
    ahead = submit_part(f"--dependency=afternotok:{job}")
    wait_for_steps(folder, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "75:0"
    refusal, saved, line = log_of(folder, job).splitlines()[-3:]
    assert "not finished, and SLURM does not requeue the job: Requested operation" in refusal
    assert saved.startswith("saved: ../run/checkpoints/step_")

    assert wait_for(cluster, ahead, "COMPLETED", "FAILED") == "COMPLETED"
    assert curve(folder) == curve(whole[0])
    (node0,) = elsewhere.glob(f"*-{ahead}-node0.log")
    assert f"resuming from {saved.removeprefix('saved: ')}" in node0.read_text()

    _, _, command = line.partition("job had: ")
    cluster.run("bash", "-c", command.replace("sbatch ", "sbatch --test-only "))
    assert command.endswith(f"{SCRIPT} {recipe} run.dir=../run {' '.join(LAYOUT)}")


def test_what_does_not_fit_is_one_sentence_before_the_start(cluster, recipe, tmp_path):
    both = submit(cluster, recipe, tmp_path / "run", options=["--ntasks-per-node=4", "--nodes=1"])
    unknown = submit(cluster, recipe, tmp_path / "run", LAUNCHER="mpirun")
    copy = shutil.copy(SCRIPT, tmp_path)
    outside = cluster.run(
        *("sbatch", "--parsable", f"--output={tmp_path}/job-%j.log", copy, recipe), cwd=tmp_path
    )
    sentences = {
        both: "error: PROCESSES_PER_NODE=2 and --ntasks-per-node=4 both give ",
        unknown: "error: LAUNCHER=mpirun is neither torchrun nor srun: choose one.",
        outside: f"error: {tmp_path} is not the repository of megatron_mdm, ",
    }
    for job, sentence in sentences.items():
        assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
        assert cluster.field(job, "ExitCode") == "2:0"
        (line,) = log_of(tmp_path / "run", job).splitlines()
        assert line.startswith(sentence)


def test_gpus_are_counted_where_slurm_names_none(cluster, recipe, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n'\n")
    tool.chmod(0o755)
    # Refused by the dry run, which has as many processes as were counted.
    job = cluster.run(
        *("env", "-u", "CUDA_VISIBLE_DEVICES", f"PATH={tmp_path}:{cluster.environment['PATH']}"),
        *("sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/job-%j.log", SCRIPT, recipe),
        *("run.dir=none", "parallel.tensor_model_parallel_size=3"),
    )
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
    log = log_of(tmp_path / "run", job)
    assert "SLURM gives no number of GPUs, and this node has 2: 2 processes per node" in log
    assert "error: parallel.tensor_model_parallel_size=3 does not divide " in log


def test_an_array_trains_one_run_a_seed_and_requeues_a_task_alone(cluster, recipe, tmp_path):
    folder = tmp_path / "seed-%a"
    options = ["--array=4-5", "--nodes=1"]
    job = submit(cluster, recipe, folder, "run.seed=%a", *LAYOUT, options=options)
    # The number of the last task is that of the whole array.
    wait_for_steps(tmp_path / "seed-5", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_5")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first, second = (curve(tmp_path / f"seed-{seed}") for seed in (4, 5))
    assert len(first) == len(second) > 2
    assert first != second
    assert [cluster.field(f"{job}_{task}", "Restarts") for task in (4, 5)] == ["0", "1"]
