from __future__ import annotations

import re
import time

import pytest
from commands import REPO, TIMEOUT_SECONDS, Process, run

pytestmark = pytest.mark.slow


LINE = re.compile(
    r"(?P<name>.+): (?P<kills>\d+) kills, (?P<during_a_save>\d+) of them during a save, "
    r"(?P<resumes>\d+) resumes, (?P<lost>\d+) samples lost, (?P<repeated>\d+) repeated, "
    r"0 temporary files left, metrics and last checkpoint equal those of a run never killed, \d+ s"
)


def test_runs_killed_at_random_moments_end_as_if_never_killed():
    output = run("tools/crash_drill.py", "--kills", 8, "--seed", 1).succeeded().output
    one_process, two_ranks = (LINE.fullmatch(line) for line in output.splitlines())
    assert [one_process["kills"], two_ranks["kills"]] == ["7", "1"]
    assert int(one_process["during_a_save"]) > 0
    for report in (one_process, two_ranks):
        assert report["lost"] == report["repeated"] == "0"


def test_a_drill_that_breaks_off_tells_what_it_has(tmp_path):
    """Its data is taken away while the drill runs, once the killed run has begun."""
    folder = tmp_path / "drill"
    drill = Process(
        ["tools/crash_drill.py", "--kills", 50, "--seed", 1, "--folder", folder], None, REPO
    )
    place = folder / "one_process"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not list((place / "killed" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (place / "tokens.bin").unlink()
    result = drill.wait(deadline)
    assert result.status == 1
    report, reason = result.output.splitlines()
    assert re.match(
        r"one process: \d+ kills, .* 0 samples lost, 0 repeated, \d+ temporary files left, "
        r"metrics so far equal those of a run never killed, \d+ s$",
        report,
    )
    assert reason.startswith(
        "The drill broke off before its last kill: The drill's run of one process ended with "
        "status 2 before it was killed: see "
    )
