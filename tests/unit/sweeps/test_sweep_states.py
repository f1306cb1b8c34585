"""What a run's folder says of it, and the table made of such folders."""

from __future__ import annotations

import csv
import fcntl
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import parquet
from sweep_examples import BATCH, SEQ, begin, state_of, write_sweep

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.studies.laws.runs import read_runs
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import check_same_run, is_running, read_attempt
from megatron_mdm.studies.sweeps.run_table import build_rows, write_table
from megatron_mdm.studies.sweeps.sweep_command import submit_runs
from megatron_mdm.studies.sweeps.sweeping import MachineShare, claim_run, divide_machine

VALID, VALID_ERROR = "valid/nll_nats_per_token", "valid/nll_standard_error"


@pytest.fixture
def sweep_of(tmp_path):
    return functools.partial(write_sweep, tmp_path)


def test_sizes_follow_from_the_config_and_the_shards(sweep_of):
    (run,) = sweep_of().runs
    (size,) = size_runs([run])
    assert (size.num_windows, size.num_steps, size.unique_tokens) == (10, 6, 80)
    assert size.num_tokens(6) == 6 * BATCH * SEQ == 192
    assert size.epochs(6) == 2.4
    # Two layers of 4 * 16^2 + 3 * 16 * 24 + 2 * 16, and the last norm; 101 tied rows.
    assert size.num_parameters == 2 * (1024 + 1152 + 32) + 16
    assert size.total_parameters == size.num_parameters + 101 * 16
    assert size.flops(6) == 6 * size.num_parameters * 192
    # As the data-constrained family counts: 6 x 16 a layer beside its matrices, 100 rows, no norm.
    assert size.num_parameters_with_embeddings == 2 * (1024 + 1152 + 96) + 100 * 16
    assert size.flops_with_embeddings(6) == pytest.approx(
        6 * size.num_parameters_with_embeddings * 192
    )
    # A token: 6 FLOPs a weight of a matrix, 12 S a of attention a layer, 6 d a row of the head,
    # which has 128 rows, for the (1 + eps) / 2 of positions that are masked.
    matrices, attention = 6 * 2 * (1024 + 1152), 2 * 12 * SEQ * 16
    head = 6 * 16 * 128 * 0.5005
    assert size.exact_flops(6) == pytest.approx((matrices + attention + head) * 192, rel=1e-12)


def test_tokens_of_samples_that_are_cut_short_are_counted_by_their_mean(sweep_of):
    (run,) = sweep_of(set={"objective.stochastic_length_ratio": 0.5}).runs
    (size,) = size_runs([run])
    # Half of the samples are 4.5 tokens long in the mean.
    assert size.num_tokens(6) == 24 * (0.5 * 8 + 0.5 * 4.5) == 150
    assert size.flops(6) == 6 * size.num_parameters * 150


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"data.train.0.max_unique_tokens": 84}, ConfigError, "=84 is more than the 83 tokens of"),
        ({"data.train.0.max_unique_tokens": 7}, DataError, "less than one window"),
        ({"data.train.0.path": "nowhere"}, DataError, "nowhere"),
        ({"data.valid": [{"path": "gone"}]}, DataError, "gone.idx does not exist"),
        ({"data.train.0.max_epochs": 2}, ConfigError, "max_epochs=2.0 does not let"),
        ({"batch.micro_batch_size": 3}, ConfigError, "batch.global_batch_size=4 is not a multiple"),
    ],
)
def test_a_run_that_cannot_start_is_named_before_any_does(sweep_of, fields, kind, said):
    sweep = sweep_of(axes={"point": {"good": {"run.seed": 1}, "bad": fields}})
    with pytest.raises(kind) as caught:
        size_runs(sweep.runs)
    assert str(caught.value).startswith("run bad: ")
    assert said in str(caught.value)


def test_results_are_read_where_the_shards_are_not(sweep_of, tmp_path):
    (run,) = sweep_of().runs
    begin(run, [{"step": 6, VALID: 3.0}], saved=6)
    (size,) = size_runs([run])
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match="run seed-0: "):
        size_runs([run])
    assert size_runs([run], from_ledgers=True) == [size]
    (run.folder / "ledger.json").write_text(json.dumps({"step": 6}))
    with pytest.raises(DataError, match=r"ledger\.json is not the ledger of a run"):
        size_runs([run], from_ledgers=True)


LOGGED = [{"step": 3, "train/loss_nats_per_token": 4.0, "perf/step_seconds": 2.0}]


@pytest.mark.parametrize(
    ("left", "status", "note"),
    [
        ({"saved": 6}, "done", ""),
        # The end counts, however it was reached.
        ({"saved": 6, "attempt": {"ended": 2.0, "exit_status": 2}}, "done", ""),
        ({"records": [{"step": 6, VALID: float("nan")}], "saved": 6}, "failed", "loss is nan"),
        ({"saved": 5}, "stopped", ""),
        ({"attempt": {}}, "stopped", "killed"),
        ({"attempt": {"ended": 2.0, "exit_status": -9}}, "stopped", "killed by SIGKILL"),
        ({"attempt": {"ended": 2.0, "exit_status": 75}}, "stopped", ""),
        (
            {"attempt": {"ended": 2.0, "exit_status": -15, "was_asked_to_stop": True}},
            "stopped",
            "",
        ),
        ({"attempt": {"ended": 2.0, "exit_status": 0}}, "stopped", "without its last checkpoint"),
        (
            {"attempt": {"ended": 2.0, "exit_status": 2, "last_line": "no disk: free some."}},
            "failed",
            "no disk: free some.",
        ),
        ({"attempt": {"ended": 2.0, "exit_status": 1}}, "failed", "ended with status 1"),
    ],
)
def test_the_state_follows_from_the_folder(sweep_of, left, status, note):
    (run,) = sweep_of().runs
    assert state_of(run).status == "waiting"
    begin(run, **{"records": LOGGED, **left})
    state = state_of(run)
    assert state.status == status
    assert note in state.note
    assert bool(state.note) == bool(note)
    assert state.has_ended == (left.get("saved") == 6)
    assert state.step == (6 if "records" in left else 3)
    assert state.eta_seconds is None


@pytest.mark.parametrize("name", ["lock", "attempt.lock"])
def test_a_run_is_running_while_a_lock_of_it_is_held(sweep_of, name):
    (run,) = sweep_of().runs
    begin(run, LOGGED, attempt={})
    with (run.folder / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = state_of(run)
    assert (state.status, state.eta_seconds) == ("running", 6.0)
    assert state_of(run).status == "stopped"


CLAIMS = """
import subprocess, sys
from pathlib import Path
from megatron_mdm.studies.sweeps.sweeping import claim_run
claimed = claim_run(Path(sys.argv[1]))
child = subprocess.Popen(["cat"], pass_fds=claimed.descriptors)
print(child.pid, flush=True)
child.wait()
"""


def test_a_claim_lasts_as_long_as_the_child_of_a_sweep_that_was_killed(tmp_path):
    folder = tmp_path / "new/run"
    command = [sys.executable, "-c", CLAIMS, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as sweep:
        sweep.stdout.readline()
        sweep.kill()
        sweep.wait()
        assert is_running(folder)
        assert claim_run(folder) is None
        # Its end of the pipe is what the child waits for.
        sweep.stdin.close()
        sweep.stdout.read()
    claimed = claim_run(folder)
    assert claim_run(folder) is None
    claimed.release()
    assert not is_running(folder)


def test_a_damaged_attempt_is_told(sweep_of):
    (run,) = sweep_of().runs
    begin(run, attempt={"status": 0})
    with pytest.raises(DataError, match=r"attempt\.json is not an attempt: status: "):
        read_attempt(run.folder)


def test_cores_and_gpus_are_divided():
    assert divide_machine(1, [0, 1, 2], []) == [MachineShare((0, 1, 2))]
    assert divide_machine(2, [0, 1, 2, 5], []) == [MachineShare((0, 1)), MachineShare((2, 5))]
    assert divide_machine(2, [3, 4, 5], []) == [MachineShare((3,)), MachineShare((4, 5))]
    # More runs than cores: each still has one.
    assert divide_machine(3, [0, 1], []) == [
        MachineShare((0,)),
        MachineShare((0,)),
        MachineShare((1,)),
    ]
    slots = divide_machine(3, [0, 1, 2], ["4", "GPU-a"])
    assert [slot.device for slot in slots] == ["4", "GPU-a", "4"]


def test_a_folder_of_another_run_is_refused(sweep_of):
    (run,) = sweep_of().runs
    begin(run)
    check_same_run(run)
    (same,) = sweep_of(
        set={"checkpoint.every_steps": 2, "batch.micro_batch_size": 1, "run.device": "cpu"}
    ).runs
    check_same_run(same)
    for field, value in (("optimizer.lr", 1e-3), ("validation.noise_seed", 1)):
        (other,) = sweep_of(set={field: value}).runs
        with pytest.raises(ConfigError, match=rf"holds a run with {field}=.* sweep has {value}: "):
            check_same_run(other)


COLUMNS = [
    *("run", "status", "objective", "num_parameters", "num_parameters_with_embeddings"),
    *("total_parameters", "num_tokens", "unique_tokens", "epochs", "flops"),
    *("flops_with_embeddings", "exact_flops", "loss", "loss_standard_error"),
    *("best_loss", "best_loss_standard_error", "difference", "difference_standard_error"),
    *("difference_clustered_error", "best_step", "best_tokens", "train_loss"),
    *("learning_rate", "seed", "seconds"),
]


def test_the_table_is_the_same_in_csv_and_parquet(sweep_of, tmp_path):
    sweep = sweep_of(
        axes={
            "run.seed": [0, 1],
            "kind": {
                "ar": {"objective.kind": "ar", "model.tie_embeddings": False},
                "short": {"data.train.0.max_unique_tokens": 40, "data.train.0.epochs": None},
            },
        }
    )
    run = sweep.runs[0]
    # Ten windows per pass and four a step: the last pass begins after 3.5 of the six steps.
    records = [
        {"step": step, "train/loss_nats_per_token": 10.0 - step}
        | ({VALID: loss, VALID_ERROR: 0.1 * step} if (loss := losses.get(step)) else {})
        for losses in [{2: float("nan"), 3: 2.5, 4: 2.25, 6: 2.75}]
        for step in range(1, 7)
    ]
    begin(run, records, saved=6)
    (run.folder / "run_info.json").write_text(json.dumps({"wall_seconds": 12.5}))
    states = {one.name: state_of(one) for one in sweep.runs}
    rows = build_rows(size_runs(sweep.runs), states)
    for ending in (".csv", ".parquet"):
        write_table(tmp_path / f"new/table{ending}", sweep, rows)

    found = parquet.read_table(tmp_path / "new/table.parquet").to_pylist()
    fields = ["run.seed", "objective.kind", "model.tie_embeddings"]
    fields += ["data.train.0.max_unique_tokens", "data.train.0.epochs"]
    assert list(found[0]) == [*COLUMNS, *fields]
    first = found[0]
    assert first["run"] == "seed-0_ar"
    assert (first["loss"], first["loss_standard_error"]) == (2.75, 0.1 * 6)
    assert (first["best_loss"], first["best_loss_standard_error"]) == (2.25, 0.1 * 4)
    assert (first["best_step"], first["best_tokens"]) == (4, 4 * BATCH * SEQ)
    assert first["train_loss"] == (6.0 + 5.0 + 4.0) / 3
    assert (first["epochs"], first["seconds"], first["num_tokens"]) == (2.4, 12.5, 192)
    assert [row["unique_tokens"] for row in found] == [80, 40, 80, 40]
    assert [row["status"] for row in found] == ["done", "waiting", "waiting", "waiting"]
    assert [row["num_tokens"] for row in found] == [192, 0, 0, 0]
    assert [row["model.tie_embeddings"] for row in found] == [False, True, False, True]
    with (tmp_path / "new/table.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    texts = {None: "", True: "true", False: "false"}
    for row, text in zip(found, written, strict=True):
        assert text == {
            name: texts[value] if value is None or isinstance(value, bool) else str(value)
            for name, value in row.items()
        }
    # Fits take from it what is done.
    for ending in (".csv", ".parquet"):
        read = read_runs(tmp_path / f"new/table{ending}", objective="ar")
        assert read.names == ("seed-0_ar",)
        numbers = [float(values[0]) for values in vars(read.runs).values()]
        assert numbers == [first["num_parameters"], 192, 80, 2.75]
    with pytest.raises(ConfigError, match=r"--out=x\.json is neither"):
        write_table(tmp_path.joinpath("x.json").relative_to(tmp_path), sweep, rows)


def test_the_table_compares_runs_by_what_both_objectives_predict_window_by_window(sweep_of):
    sweep = sweep_of(axes={"objective.kind": ["ar", "mdm"], "run.seed": [0, 1]})
    documents = np.array([0, 0, 1, 1])
    losses = [[2.0, 3.0, 4.0, 5.0], [2.5, 3.5, 4.0, 5.2], [2.1, 3.3, 4.2, 5.4], None]
    for run, values in zip(sweep.runs, losses, strict=True):
        if values is None:
            continue
        is_ar = run.config.objective.kind == "ar"
        values_N = np.array(values)
        judged = JudgedWindows(
            6, "the same", documents, None if is_ar else 0, 1, values_N + (not is_ar), values_N
        )
        record = {
            "step": 6,
            VALID: float(judged.nll_N.mean()),
            "valid/nll_given_first_nats_per_token": float(values_N.mean()),
        }
        begin(run, [record], saved=6, windows=[judged])
    states = {one.name: state_of(one) for one in sweep.runs}
    rows = build_rows(size_runs(sweep.runs), states)
    assert [row["best_loss"] for row in rows] == [3.5, 3.8, pytest.approx(3.75), None]
    assert [row["difference"] for row in rows] == [
        0.0,
        pytest.approx(0.3),
        pytest.approx(0.25),
        None,
    ]
    # Differences 0.5, 0.5, 0 and 0.2; 0.5 and 0.1 in documents.
    assert rows[1]["difference_standard_error"] == pytest.approx(
        np.std([0.5, 0.5, 0, 0.2]) / 3**0.5
    )
    assert rows[1]["difference_clustered_error"] == pytest.approx(0.2)
    assert rows[3]["difference_standard_error"] is None


def test_where_there_is_no_slurm_the_sentence_says_so(sweep_of, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = sweep_of()
    with pytest.raises(ConfigError, match="sbatch cannot be found: "):
        submit_runs(sweep, sweep.runs, script=tmp_path, command=[], options=[])
    assert not (tmp_path / "runs").exists()
