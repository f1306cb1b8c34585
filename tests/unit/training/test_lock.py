from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.training.lock import LOCK_FILE_NAME, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_mdm.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_locked_by_one_process_until_that_ends_however_it_ends(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"run.dir={folder} is in use by another run"):
            RunLock(folder).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(folder) as lock:
        lock.acquire()
        with pytest.raises(ConfigError):
            RunLock(folder).acquire()
    RunLock(folder).acquire()


def test_a_new_folder_is_made_only_when_it_is_acquired(tmp_path):
    folder = tmp_path / "a" / "run"
    with RunLock(folder) as lock:
        assert not folder.parent.exists()
        lock.acquire()
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE_NAME]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_who_only_asks_for_the_state_of_a_run_does_not_keep_it_from_starting(tmp_path):
    path = tmp_path / LOCK_FILE_NAME
    path.touch()
    with path.open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, asking.close)
        timer.start()
        RunLock(tmp_path).acquire()
        timer.join()
