from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.proof.running import (
    Stage,
    read_record,
    record_path,
    run_command_of_proof,
    run_stages,
)

QUICK = ("environment", "--device", "cpu")
WRONG = ("environment", "--device", "abacus")
# Minutes of work in several processes.
LONG = ("attention", "--device", "cpu", "--repeats", 1000)


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_stage_costs_only_itself_and_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    lines: list[str] = []
    found: list[object] = []

    def fails(ask) -> None:
        found.append(ask(*WRONG))
        ask.choose(best={"size": 2})

    def works(ask) -> None:
        found.append(ask(*QUICK))

    stages = [Stage("first", 1, fails), Stage("second", 1, works)]
    assert not run_stages(stages, tmp_path, 2, say=lines.append)
    assert found[0] is None
    assert found[1]["results"]["device"] == {"kind": "cpu"}
    first, second = (read_record(tmp_path, name) for name in ("first", "second"))
    assert first.chosen == {"best": {"size": 2}}
    assert [one.status for one in first.commands + second.commands] == ["failed", "done"]
    assert "abacus" in first.commands[0].error
    # The files hold JSON that any program reads.
    assert json.loads(record_path(tmp_path, "second").read_text())["is_done"] is True

    seconds = second.commands[0].seconds
    assert not run_stages(stages, tmp_path, 2, say=lines.append)
    assert lines[-2:] == ["first: done before", "second: done before"]
    assert read_record(tmp_path, "second").commands[0].seconds == seconds

    # What failed is tried again on demand, and with better words is whole.
    mended = [Stage("first", 1, works), stages[1]]
    assert run_stages(mended, tmp_path, 2, say=lines.append, again=True)
    assert read_record(tmp_path, "first").commands[0].status == "done"


def test_a_stage_at_its_limit_is_done_and_one_at_the_proofs_goes_on(tmp_path: Path) -> None:
    def measure(ask) -> None:
        ask(*LONG)
        raise AssertionError("a command that was ended has no successor")

    def quick(ask) -> None:
        ask(*QUICK)

    before = descendants()
    stages = [Stage("long", 3 / 60, measure), Stage("after", 1, quick)]
    assert not run_stages(stages, tmp_path, 1, say=print)
    record = read_record(tmp_path, "long")
    assert record.is_done
    assert [one.status for one in record.commands] == ["over_time"]
    assert read_record(tmp_path, "after").is_done
    assert descendants() <= before

    other = tmp_path / "other"
    assert not run_stages([stages[0]._replace(minutes=9)], other, 3 / 60, say=print)
    record = read_record(other, "long")
    assert not record.is_done
    assert [one.status for one in record.commands] == ["broken_off"]
    assert run_stages([Stage("long", 1, quick)], other, 1, say=print)
    assert [one.status for one in read_record(other, "long").commands] == ["done"]


def test_a_command_without_time_is_not_started() -> None:
    command = run_command_of_proof(list(QUICK), 0.5, "broken_off", os.environ)
    assert (command.status, command.seconds, command.report) == ("broken_off", 0.0, None)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    record_path(tmp_path, "train").write_text('{"stage": "train", "commands": [{"words": 1}]}')
    with pytest.raises(ConfigError, match=r"train\.json is no file of a proof: remove it"):
        read_record(tmp_path, "train")
