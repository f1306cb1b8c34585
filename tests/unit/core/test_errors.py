from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_mdm.core import errors
from megatron_mdm.core.errors import (
    ConfigError,
    DataError,
    MdmError,
    join_problems,
    note_problem,
    run_entry_point,
)

REPOSITORY = Path(__file__).resolve().parents[3]


def failing(error):
    def main():
        raise error

    return main


def test_an_expected_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_entry_point(failing(MdmError("x=1 is odd: use 2."))) == 2
    assert capsys.readouterr().err == "error: x=1 is odd: use 2.\n"


def test_success_is_status_0():
    assert run_entry_point(lambda: None) == 0


def test_what_the_encoding_of_the_standard_output_lacks_is_printed_as_escapes():
    program = (
        "from megatron_mdm.core.errors import run_entry_point as run; run(lambda: print('a\u20ac'))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (b"a\\u20ac\n", b"", 0)


def test_an_error_of_one_rank_names_the_rank_at_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    error = DataError("a.bin is damaged: copy it again.")
    error.rank = 3
    assert run_entry_point(failing(error)) == 2
    assert capsys.readouterr().err == "error: rank 3: a.bin is damaged: copy it again.\n"


def test_other_ranks_let_the_first_speak(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    assert run_entry_point(failing(MdmError("same everywhere."))) == 2
    assert waited == [10]
    assert capsys.readouterr().err == "error: same everywhere.\n"


def test_a_rank_that_waits_for_the_first_ends_quietly_when_the_launcher_ends_it():
    code = (
        "from megatron_mdm.core.errors import MdmError, run_entry_point\n"
        "def main():\n    print('here', flush=True)\n    raise MdmError('same everywhere.')\n"
        "import sys; sys.exit(run_entry_point(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)  # the handler is there
    process.terminate()
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


def test_the_table_that_torchrun_ends_with_has_the_sentence(capsys, monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.delenv("RANK", raising=False)
    assert run_entry_point(failing(MdmError("x=1 is odd: use 2."))) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert "traceback : error: x=1 is odd: use 2." in str(ChildFailedError("script", {0: failure}))


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_entry_point(failing(ZeroDivisionError()))


def test_each_sentence_of_an_error_is_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    problems = []
    for sentences in ("One is wrong.", "Two is wrong.\nOne is wrong."):
        with note_problem(problems):
            raise ConfigError(sentences)
    assert run_entry_point(failing(ConfigError(join_problems(problems)))) == 2
    assert capsys.readouterr().err == "error: One is wrong.\nerror: Two is wrong.\n"


def test_ctrl_c_is_one_line_and_status_130(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_entry_point(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_output_that_nobody_reads_to_its_end_is_no_error():
    program = (
        "import sys\n"
        "from megatron_mdm.core.errors import run_entry_point\n"
        "def main():\n"
        "    for number in range(int(sys.argv[1])):\n"
        "        print(number)\n"
        "sys.exit(run_entry_point(main))\n"
    )
    for number in ("3", "100000"):
        command = f"{sys.executable} -c '{program}' {number} | head -n 1; exit ${{PIPESTATUS[0]}}"
        result = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
        )
        assert result.stdout == "0\n"
        assert result.stderr == ""
        # A few lines may all be written before the reader has gone.
        assert result.returncode in ((0, 141) if number == "3" else (141,))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "a folder stands where a file should: move it away"),
        (lambda path: None, "check the path"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(make, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "file"
    make(path)
    assert run_entry_point(lambda: print(path.read_text())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} cannot be used (")
    assert said in line


def test_a_failure_of_the_system_without_a_file_is_no_users_error(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OSError, match="no child"):
        run_entry_point(failing(OSError(10, "no child")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EIO])
def test_remedies_fit_the_cause(number):
    words = {errno.ENOSPC: "space", errno.EACCES: "permissions", errno.ENOTDIR: "a file stands"}
    assert words.get(number, "check the storage") in errors.find_remedy(OSError(number, ""))
