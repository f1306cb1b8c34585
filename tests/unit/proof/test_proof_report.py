from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_json_whole
from megatron_mdm.studies.proof.report import tabulate_medians, write_report
from megatron_mdm.studies.proof.running import record_path


def summary(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value, "spread": 0.0}


def write_stage(folder: Path, stage: str, *commands: dict) -> None:
    record = {"stage": stage, "is_done": True, "chosen": {}, "commands": list(commands)}
    write_json_whole(record_path(folder, stage), record)


def command(words: str, results: dict | None, settings: dict | None = None) -> dict:
    found = {"words": words.split(), "status": "done", "seconds": 1.0}
    if results is None:
        return found | {"status": "failed", "error": "status 2\nerror: no such GPU."}
    machine = {"processor": "p", "cores": 16, "platform": "Linux", "versions": {"torch": "2"}}
    return found | {"report": {"settings": settings or {}, "machine": machine, "results": results}}


ENVIRONMENT = {
    "device": {"kind": "cuda", "name": "NVIDIA H100", "memory_bytes": 85e9},
    "packages": {"apex": None, "triton": "3.6.0"},
    "attention_kernels": {"flash": True, "cudnn": False},
    "matmul_flops_per_second": {"bf16": 788e12, "fp32": 51e12},
    "copied_bytes_per_second": 3e12,
    "written_bytes_per_second": 2e9,
}
TRAINED = {
    "ours": {
        "tokens_per_second": summary(90_000),
        "share_of_matmul": summary(0.75),
        "share_of_peak": summary(0.6),
        "peak_bytes": 50_000_000_000,
        "estimated_bytes": 52_000_000_000,
    }
}
SETTINGS = {
    "preset": "smdm-1028M",
    "seq_length": 2048,
    "micro_batch_size": 16,
    "overrides": ["parallel.recompute=none"],
    "cases": ["ours"],
}


def test_figures_stand_where_the_pages_keep_a_place(tmp_path: Path) -> None:
    out, docs = tmp_path / "out", tmp_path / "docs"
    for folder in (out, docs):
        folder.mkdir()
    write_stage(out, "environment", command("environment", ENVIRONMENT))
    write_stage(
        out,
        "train",
        command("train", TRAINED, SETTINGS),
        command("train --cases plain", None),
    )
    place = "<!-- measured on a GPU: begin -->\nold\n<!-- measured on a GPU: end -->"
    for name in ("performance", "scaling"):
        (docs / f"{name}.md").write_text(f"# Before\n{place}\n# After\n")
    write_report(out, docs)
    speed, memory = ((docs / f"{name}.md").read_text() for name in ("performance", "scaling"))
    for page in (speed, memory):
        assert page.startswith("# Before\n")
        assert page.endswith("\n# After\n")
        assert "old" not in page
    row = next(line for line in speed.splitlines() if "smdm-1028M ours" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["smdm-1028M ours, S 2,048", "16", "parallel.recompute=none", "90,000",
                     "60.0%", "50.00 GB"]  # fmt: skip
    assert "NVIDIA H100" in speed
    assert "bf16 788 TFLOP/s" in speed
    assert "failed: error: no such GPU." in speed
    assert "+4.0%" in memory
    # What was not reached is said.
    assert "Not measured." in speed


def test_a_page_without_a_place_is_left_alone(tmp_path: Path) -> None:
    write_stage(tmp_path, "environment", command("environment", ENVIRONMENT))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/performance.md"
    page.write_text("# Figures\n")
    with pytest.raises(ConfigError, match=r"performance\.md has no place for the figures: add"):
        write_report(tmp_path, tmp_path / "docs")
    assert page.read_text() == "# Figures\n"


def test_a_folder_without_a_proof_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no environment\.json: measure with"):
        write_report(tmp_path, None)


def test_cases_with_the_same_figures_share_a_table() -> None:
    results = {
        "rate": summary(2e12),
        "ours": {"seconds": summary(0.5), "peak_bytes": summary(2e9), "loss": 3.0},
        "theirs": {"seconds": summary(1500.0), "peak_bytes": summary(4e9)},
        "ratios": {"ours_over_theirs": {"seconds": summary(0.25), "peak_bytes": summary(0.5)}},
        "tasks": {"one": {"seconds": summary(1.0), "peak_bytes": summary(1.0)}},
    }
    whole, cases = tabulate_medians(results)
    assert whole.rows == [("-", "2,000,000,000,000")]
    assert cases.heads == ("Case", "seconds", "peak bytes")
    assert cases.rows == [
        ("ours", "0.5", "2 GB"),
        ("theirs", "1,500", "4 GB"),
        ("ratios, ours over theirs", "0.25x", "0.50x"),
    ]
