from __future__ import annotations

import re

from commands import run

LINE = re.compile(
    r"(?P<name>.+): (?P<kills>\d+) kills, (?P<during_a_save>\d+) of them during a save, "
    r"(?P<resumes>\d+) resumes, (?P<lost>\d+) samples lost, (?P<repeated>\d+) repeated, "
    r"metrics and last checkpoint equal those of a run never killed, \d+ s"
)


def test_runs_killed_at_random_moments_end_as_if_never_killed():
    output = run("tools/crash_drill.py", "--kills", 8, "--seed", 1).succeeded().output
    one_process, two_ranks = (LINE.fullmatch(line) for line in output.splitlines())
    assert [one_process["kills"], two_ranks["kills"]] == ["7", "1"]
    assert int(one_process["during_a_save"]) > 0
    for report in (one_process, two_ranks):
        assert report["lost"] == report["repeated"] == "0"
