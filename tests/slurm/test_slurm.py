"""The batch script on a real SLURM: two nodes, two processes each, TP 2 x DP 2."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_mdm.reporting.metrics import read_metrics

LOSS, GRAD_NORM, LR = "train/loss_nats_per_token", "train/grad_norm", "train/lr"
LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TIMEOUT_SECONDS = 300


def submit(cluster, recipe, folder: Path, *overrides: str, options=()) -> str:
    """Submits the script with its logs in the run's parent folder; returns the job's number."""
    return cluster.run(
        *("sbatch", "--parsable", "--nodes=2", f"--output={folder.parent}/job-%j.log", *options),
        *("pretrain/slurm/pretrain.sbatch", recipe, f"run.dir={folder}", *overrides),
        PROCESSES_PER_NODE="2",
        NODE_LOG=f"{folder.parent}/job-%j-node%n.log",
        PYTHONWARNINGS="ignore",
        CUDA_VISIBLE_DEVICES="",
    )


def wait_for(cluster, job: str, *states: str) -> str:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if (state := cluster.field(job, "JobState")) in states:
            return state
        time.sleep(0.2)
    raise AssertionError(f"job {job} is {state} after {TIMEOUT_SECONDS} s")


def wait_for_steps(run_dir: Path, number: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    file = run_dir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, f"{file} does not get {number} lines"
        time.sleep(0.05)


def log_of(run_dir: Path, job: str, suffix: str = "") -> str:
    return (run_dir.parent / f"job-{job}{suffix}.log").read_text()


def curve(run_dir: Path) -> list[list[float]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [[record[name] for name in ("step", LOSS, GRAD_NORM, LR)] for record in records]


@pytest.fixture(scope="session")
def whole(cluster, recipe, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run and its job."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = submit(cluster, recipe, folder, *LAYOUT)
    state = wait_for(cluster, job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", log_of(folder, job) + log_of(folder, job, "-node0")
    return folder, job


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


@pytest.mark.parametrize("way", ["preempted", "time limit"])
def test_a_stopped_job_saves_is_requeued_and_ends_bit_for_bit(
    way, whole, cluster, recipe, tmp_path
):
    folder = tmp_path / "run"
    job = submit(cluster, recipe, folder, *LAYOUT)
    wait_for_steps(folder, 2)
    if way == "preempted":
        cluster.run("scontrol", "requeue", job)
        number = "SIGTERM"
    else:
        # SLURM looks at time limits twice a minute: this is what it sends then.
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


def test_wrong_sizes_are_one_line_and_no_requeue(cluster, recipe, tmp_path):
    folder = tmp_path / "run"
    job = submit(cluster, recipe, folder, "parallel.tensor_model_parallel_size=3")
    assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert cluster.field(job, "Restarts") == "0"
    (line,) = [line for line in log_of(folder, job).splitlines() if "error" in line.lower()]
    assert line.startswith("error: parallel.tensor_model_parallel_size=3 does not divide ")
    assert not folder.exists()
    assert not list(tmp_path.glob("*-node*"))


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
