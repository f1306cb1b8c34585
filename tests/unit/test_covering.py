from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CASES = """
import pytest

@pytest.mark.parametrize("layout", ["one", "two", "three"])
@pytest.mark.parametrize("recipe", [1, 2])
def test_a_product(layout, recipe): ...

def test_alone(): ...

@pytest.mark.slow
def test_for_minutes(): ...
"""


def chosen(folder: Path, *options: str, name: str = "distributed") -> set[str]:
    """Names of the tests that are run, of a folder with one file."""
    place = folder / "tests" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "test_cases.py").write_text(CASES)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "covering", *options],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(TESTS), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}


def test_every_value_of_each_parameter_is_covered_and_slow_tests_are_left_out(tmp_path):
    names = chosen(tmp_path)
    assert "test_alone" in names
    assert "test_for_minutes" not in names
    cases = [name for name in names if name.startswith("test_a_product")]
    assert len(cases) < 6
    for value in ("one", "two", "three", "1", "2"):
        assert any(value in case.split("[")[1] for case in cases)


def test_all_cases_run_on_demand_and_where_a_file_or_word_is_named(tmp_path):
    file = "tests/distributed/test_cases.py"
    for options in (["--all"], [file], ["-k", "test"]):
        assert len(chosen(tmp_path, *options)) == 8


def test_cheap_cases_all_run(tmp_path):
    assert len(chosen(tmp_path, name="unit")) == 7


def test_slow_tests_run_on_demand_with_a_covering_set_of_cases(tmp_path):
    assert chosen(tmp_path, "--slow") == {*chosen(tmp_path), "test_for_minutes"}
