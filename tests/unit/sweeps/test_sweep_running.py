"""Several runs at a time with a stand-in for training: order, limits, ends, signals, cores."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time

import pytest
from sweep_examples import STAND_IN, begin, state_of, write_sweep

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.sweeps import sweep_command
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import read_attempt
from megatron_mdm.studies.sweeps.sweep_display import Display
from megatron_mdm.studies.sweeps.sweeping import LocalSweep, claim_run


class Started:
    """A sweep over seeds that was run: its exit status, lines and runs."""

    def __init__(self, root, seeds, **options):
        script = root / "stand_in.py"
        script.write_text(STAND_IN)
        self.runs = write_sweep(root, axes={"run.seed": seeds}).runs
        stream = io.StringIO()
        command = [sys.executable, script]
        self.status = LocalSweep(size_runs(self.runs), command, Display(stream), **options).run()
        # Without the times.
        self.lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]

    @property
    def states(self):
        return [state_of(run).status for run in self.runs]

    def seen(self, name):
        return [json.loads((run.folder / "seen.json").read_text())[name] for run in self.runs]


def test_the_others_go_on_when_runs_fail_and_all_of_it_is_told(tmp_path):
    first = Started(tmp_path, [1, 2, 0])
    assert first.status == 1
    assert first.states == ["failed", "stopped", "done"]
    assert first.lines == [
        "3 runs, 0 of them done or left out",
        "seed-1: started",
        "seed-1: failed, step 0 of 6, bad luck: try again.",
        "seed-2: started",
        "seed-2: stopped, step 0 of 6, killed by SIGKILL",
        "seed-0: started",
        "seed-0: done",
        "2 of 3 runs are not done:",
        "  seed-1: failed, step 0 of 6, bad luck: try again.",
        "  seed-2: stopped, step 0 of 6, killed by SIGKILL",
    ]
    again = Started(tmp_path, [1, 2, 0])
    assert [line for line in again.lines if line.endswith("started")] == [
        "seed-1: started",
        "seed-2: started",
    ]
    without = Started(tmp_path, [1, 2, 0], retry_failed=False)
    assert "seed-1: started" not in without.lines
    assert without.status == 1
    # What earlier attempts printed stays.
    log = (without.runs[0].folder / "console.log").read_text()
    assert log == "error: bad luck: try again.\n" * 2


def test_a_limit_bounds_what_is_started(tmp_path):
    first = Started(tmp_path, [0, 4, 5], limit=2)
    assert (first.status, first.states) == (0, ["done", "done", "waiting"])
    second = Started(tmp_path, [0, 4, 5], limit=2)
    assert (second.status, second.states) == (0, ["done", "done", "done"])
    assert second.lines == [
        "3 runs, 2 of them done or left out",
        "seed-5: started",
        "seed-5: done",
        "all done",
    ]


def test_jobs_share_cores_and_gpus_and_do_not_hear_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    cores = sorted(os.sched_getaffinity(0))
    started = Started(tmp_path, [0, 4], jobs=2)
    assert started.status == 0
    assert started.seen("device") == ["3", "5"]
    assert started.seen("hears") == [False, False]
    if len(cores) > 1:
        assert sorted(core for mine in started.seen("cores") for core in mine) == cores


def test_what_another_process_runs_is_passed_over(tmp_path):
    run = write_sweep(tmp_path, axes={"run.seed": [0, 4]}).runs[0]
    claimed = claim_run(run.folder)
    started = Started(tmp_path, [0, 4])
    assert started.states == ["running", "done"]
    claimed.release()
    assert started.status == 1
    assert "seed-0: another process is running it" in started.lines
    assert "seed-0: started" not in started.lines


def test_a_run_that_does_not_stop_is_killed_and_nothing_else_is_started(tmp_path):
    deaf = tmp_path / "runs/seed-3/deaf"

    def stop():
        while not deaf.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    started = Started(tmp_path, [3, 0], save_seconds=0.3)
    assert (started.status, started.states) == (75, ["stopped", "waiting"])
    attempt = read_attempt(started.runs[0].folder)
    assert (attempt.exit_status, attempt.was_asked_to_stop) == (-signal.SIGKILL, True)
    assert "stopped by SIGTERM: start the same command again to go on" in started.lines
    assert signal.getsignal(signal.SIGTERM) is before


def run_files(root, monkeypatch, *files):
    script = root / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sweep_command, "own_command", lambda *words: [sys.executable, script])
    return run_command(sweep_command.COMMANDS, "", ["run", *map(str, files)])


def test_runs_of_several_files_are_one_pool_in_the_order_of_the_files(
    tmp_path, monkeypatch, capsys
):
    # Both call their run seed-0.
    sweeps = [write_sweep(tmp_path, name, dir=str(tmp_path / name)) for name in ("second", "first")]
    assert run_files(tmp_path, monkeypatch, *(sweep.path for sweep in sweeps)) == 0
    started = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if "started" in line
    ]
    assert started == ["second/seed-0:", "first/seed-0:"]
    assert [state_of(sweep.runs[0]).status for sweep in sweeps] == ["done", "done"]


@pytest.mark.parametrize("names", [("one", "one"), ("one", "two")])
def test_files_that_would_run_the_same_twice_are_refused(tmp_path, monkeypatch, names):
    files = [write_sweep(tmp_path, name).path for name in names]
    with pytest.raises(ConfigError, match=r"/seed-0 would be run twice, in .*/runs/seed-0: "):
        run_files(tmp_path, monkeypatch, *files)


def test_a_folder_of_another_run_is_refused_before_any_starts(tmp_path):
    (other,) = write_sweep(tmp_path, axes={"run.seed": [4]}, set={"optimizer.lr": 1e-3}).runs
    begin(other)
    with pytest.raises(ConfigError, match=r"seed-4 holds a run with optimizer\.lr=0\.001, "):
        Started(tmp_path, [0, 4])
    assert not (tmp_path / "runs/seed-0").exists()
