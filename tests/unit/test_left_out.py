from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
HEADING = "left out on this machine"


def session(folder: Path, *options: str, **files: str) -> str:
    """What pytest prints at the end of a session on files by the name of their folder."""
    for name, text in files.items():
        (folder / "tests" / name).mkdir(parents=True)
        (folder / "tests" / name / f"test_{name}.py").write_text(f"import pytest\n{text}\n")
    (folder / "pytest.ini").touch()
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "left_out", *options],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(TESTS), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SKIPPED_BY_A_FIXTURE = """
@pytest.fixture(scope="module")
def cluster():
    pytest.skip("no cluster: slurmd not installed\\nand a long log")

def test_one(cluster): ...
def test_two(cluster): ...
"""
SKIPPED = "def test_one(): pytest.skip('no chromium')"


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_the_end_says_what_was_left_out_and_how_to_get_it(tmp_path, options):
    printed = session(tmp_path, *options, slurm=SKIPPED_BY_A_FIXTURE, browser=SKIPPED, unit=SKIPPED)
    after_the_summary = printed.partition("short test summary info")[2]
    lines = after_the_summary.partition(HEADING)[2].splitlines()
    assert lines[1:-1] == [
        "2 of tests/slurm for want of a SLURM cluster (no cluster: slurmd not installed); "
        "as root: make cluster-packages test-cluster",
        "1 of tests/browser for want of a browser (no chromium); "
        "as root: make browser-packages test-browser",
    ]


def test_nothing_is_said_where_nothing_was_left_out(tmp_path):
    files = {"slurm": "def test_one(): ...", "unit": SKIPPED}
    assert HEADING not in session(tmp_path, **files)


def test_the_commands_exist():
    from left_out import _NEEDS

    makefile = (TESTS.parent / "Makefile").read_text()
    for folder, (_, command) in _NEEDS.items():
        assert (TESTS.parent / folder).is_dir()
        for target in command.partition("make ")[2].split():
            assert f"\n{target}:" in makefile
