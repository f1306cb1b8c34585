"""All stages of a proof with the smallest sizes: what keeps half an hour on a GPU from an error."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import REPO, run

from megatron_mdm.studies.benchmarks.parity_cases import list_cases

pytestmark = pytest.mark.slow

STAGES = ("environment", "parity", "train", "profile", "head", "attention", "memory", "sample",
          "score", "loader", "checkpoint")  # fmt: skip


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """The folder of a proof, and the one that would have travelled."""
    folder = tmp_path_factory.mktemp("proof")
    run("tools/gpu_proof.py", "pack", "--out", folder / "pack", "--no-wheels").succeeded()
    options = ("--out", folder / "out", "--pack", folder / "pack", "--device", "cpu", "--tiny")
    run("tools/gpu_proof.py", "run", *options, "--minutes", 4.5).succeeded()
    return folder


def test_every_stage_has_a_report_of_each_command(proof):
    for stage in STAGES:
        record = json.loads((proof / "out" / f"{stage}.json").read_text())
        assert record["is_done"], stage
        assert record["commands"], stage
        assert all(one["report"]["results"] for one in record["commands"]), stage


def test_this_machine_equals_itself(proof):
    (command,) = json.loads((proof / "out/parity.json").read_text())["commands"]
    results = command["report"]["results"]
    assert results["num_failed"] == 0
    names = {case.name for case in list_cases(tiny=True)} | {"resume_here", "resume_on_cpu"}
    assert results["cases"].keys() == names
    for name, case in results["cases"].items():
        if not name.endswith("bf16"):
            assert set(case["deviations"].values()) == {0.0}, name


def test_a_second_call_measures_nothing_and_the_crossover_is_for_a_call_of_its_own(proof):
    options = ("--out", proof / "out", "--pack", proof / "pack", "--device", "cpu", "--tiny")
    output = run("tools/gpu_proof.py", "run", *options).succeeded().output
    assert output.splitlines()[:-1] == [f"{stage}: done before" for stage in STAGES]
    output = run("tools/gpu_proof.py", "run", *options, "--stages", "crossover").succeeded().output
    assert "crossover: 2 done" in output


def test_pages_get_tables_and_plots(proof, tmp_path):
    for name in ("performance", "scaling"):
        shutil.copy(REPO / f"docs/{name}.md", tmp_path)
    run("tools/gpu_proof.py", "report", proof / "out", "--docs", tmp_path).succeeded()
    page = (tmp_path / "performance.md").read_text()
    original = (REPO / "docs/performance.md").read_text()
    for text in ("demo ours", "aten::mm", "mdm_whole_fp32", "resume_on_cpu", "AR reaches"):
        assert text in page, text
    # All else is as it was.
    before, _, rest = page.partition("<!-- measured on a GPU: begin -->")
    after = rest.partition("<!-- measured on a GPU: end -->")[2]
    assert original.startswith(before)
    assert original.endswith(after)
    for picture in ("gpu_speed.png", "gpu_memory.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    written = {file.name: file.read_bytes() for file in tmp_path.glob("*.md")}
    run("tools/gpu_proof.py", "report", proof / "out", "--docs", tmp_path).succeeded()
    assert written == {file.name: file.read_bytes() for file in tmp_path.glob("*.md")}
