from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.options import check_at_least, run_command
from megatron_mdm.studies.benchmarks.commands import report_alone_on_stdout
from megatron_mdm.studies.benchmarks.harness import (
    Measurement,
    draw_documents,
    interleave,
    make_report,
    run_isolated,
    summarize,
)
from megatron_mdm.studies.benchmarks.settings import (
    BENCHMARKS,
    ConversionSettings,
    DataSettings,
    ScoreSettings,
)


def test_summary_of_known_numbers():
    assert summarize([3.0, 1.0, 2.0, 10.0]) == {
        "median": 2.5,
        "min": 1.0,
        "max": 10.0,
        "spread": 3.6,
    }
    assert summarize([2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "spread": 0.0}
    assert summarize([0.0, 0.0])["spread"] == 0.0


def test_what_is_less_than_one_keeps_its_digits():
    found = summarize([1.23456e-4, 2e-4, 123.45678])
    assert (found["median"], found["min"], found["max"]) == (2e-4, 1.235e-4, 123.4568)


def test_documents_end_at_random_places():
    documents_BS = draw_documents((3, 50_000), 100)
    assert documents_BS.dtype == np.int32
    assert (documents_BS[:, 0] == 0).all()
    assert set(np.unique(np.diff(documents_BS))) == {0, 1}
    assert 3 * 450 < documents_BS[:, -1].sum() < 3 * 550


def test_cases_take_turns():
    order = []

    def case(name):
        order.append(name)
        return Measurement(1.0, 1.0, 0, 0, len(order))

    measured = interleave({"a": lambda: case("a"), "b": lambda: case("b")}, 3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [run.value for run in measured["b"]] == [2, 4, 6]


def hold_memory(num_bytes):
    block = bytearray(num_bytes)
    # Every page has to be touched to be resident.
    block[::4096] = b"x" * len(block[::4096])
    return os.getpid()


def sleep_and_work(seconds):
    time.sleep(seconds)
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def refuse():
    raise DataError("a bad input.")


def test_isolated_run_measures_time_and_memory_of_its_own_process():
    small = run_isolated(hold_memory, 1 << 10)
    large = run_isolated(hold_memory, 200 << 20)
    assert len({os.getpid(), small.value, large.value}) == 3
    assert 180 << 20 < large.peak_bytes - small.peak_bytes < 220 << 20
    assert large.child_peak_bytes == 0
    timed = run_isolated(sleep_and_work, 0.2)
    # Sleeping takes time and no processor; starting the process counts for neither.
    assert timed.seconds >= 0.4
    assert 0.2 <= timed.cpu_seconds < 0.35


def test_error_of_an_isolated_run_arrives():
    with pytest.raises(DataError, match="a bad input"):
        run_isolated(refuse)


def test_report_is_json_and_names_machine_and_versions():
    settings = ConversionSettings(preset="smdm-6M")
    report = json.loads(json.dumps(make_report("convert", settings, {"x": 1})))
    assert (report["benchmark"], report["settings"], report["results"]) == (
        "convert",
        {"preset": "smdm-6M", "repeats": 1},
        {"x": 1},
    )
    machine = report["machine"]
    assert machine["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 1 << 28


def test_what_engines_and_their_processes_print_is_no_part_of_a_report(capfd):
    with report_alone_on_stdout():
        print("engine")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print("report")
    out, err = capfd.readouterr()
    assert out == "report\n"
    assert sorted(err.split()) == ["child", "engine"]


def test_least_values():
    settings = DataSettings(workers=1, megabytes=0.5)
    check_at_least(settings)
    check_at_least(settings, megabytes=0.5)
    with pytest.raises(ConfigError, match=r"--megabytes=0\.5 has to be at least 1"):
        check_at_least(settings, megabytes=1)
    with pytest.raises(ConfigError, match="--megabytes=nan"):
        check_at_least(replace(settings, megabytes=math.nan), megabytes=1)
    for bad in (0, -1):
        with pytest.raises(ConfigError, match=rf"--workers={bad} has to be at least 1"):
            check_at_least(replace(settings, workers=bad))


def test_options_of_a_benchmark_are_its_settings():
    line = ["score", "--tasks", "piqa", "boolq", "--draws", "8"]
    assert run_command(BENCHMARKS, "", line) == ScoreSettings(tasks=("piqa", "boolq"), draws=8)
    with pytest.raises(ConfigError, match="--num-processes"):
        run_command(BENCHMARKS, "", ["score", "--num-processes", "2"])
