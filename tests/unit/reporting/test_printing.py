from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mdm.reporting.printing import Printer

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys, time
from megatron_mdm.reporting.printing import Printer

with Printer() as printer:
    for number in range(int(sys.argv[1])):
        printer.say(f"line {number} \u00b1 1")
print("what libraries print")
print("the run came to its end", file=sys.stderr)
"""


def run(number, stdout, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(number)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        timeout=60,
        check=False,
    )


def test_lines_come_out_in_order():
    result = run(500, subprocess.PIPE)
    *lines, last = result.stdout.decode().splitlines()
    assert last == "what libraries print"
    assert lines == [f"line {number} \u00b1 1" for number in range(500)]
    assert result.stderr == b"the run came to its end\n"


def test_characters_that_a_terminal_lacks_are_written_out():
    result = run(1, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert result.stdout == b"line 0 \\xb1 1\nwhat libraries print\n"
    assert result.returncode == 0


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("broken", ["full", "closed"])
def test_an_output_that_fails_is_warned_of_once(broken):
    out = os.open("/dev/full", os.O_WRONLY) if broken == "full" else closed_pipe()
    result = run(50, out)
    os.close(out)
    assert result.returncode == 0
    warning, last = result.stderr.decode().splitlines()
    assert warning.startswith("warning: standard output cannot be written (")
    assert last == "the run came to its end"


@pytest.mark.slow
def test_nobody_who_reads_holds_nobody_up():
    reader, writer = os.pipe()
    since = time.monotonic()
    result = run(20_000, writer)
    assert result.returncode == 0
    assert b"the run came to its end" in result.stderr
    assert time.monotonic() - since < 40
    os.close(reader)
    os.close(writer)


def test_a_stream_without_a_file_is_written_to(capsys):
    with Printer() as printer:
        printer.say("one")
        printer.say("two")
    assert capsys.readouterr().out == "one\ntwo\n"
