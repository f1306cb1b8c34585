from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.config import Config, ModelConfig, list_presets
from megatron_mdm.config.reference import (
    format_heading,
    format_reference,
    list_sections,
)
from megatron_mdm.model.accounting import model_size

REPO = Path(__file__).parents[3]


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its two head lines."""
    below = format_reference().split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = [line for line in below.split("\n### ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_is_what_the_schema_generates():
    page = (REPO / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == format_reference(), "run tools/document_config.py"


def test_every_section_has_a_table_of_all_its_fields():
    documented = dict.fromkeys(name for names, _ in list_sections() for name in names)
    assert [name for name in documented if "." not in name] == list(Config.model_fields)
    assert {"data.train.0", "data.valid.0"} <= set(documented)
    for names, section in list_sections():
        rows = rows_below(format_heading(names, section))
        assert [row[0] for row in rows] == [f"`{field}`" for field in section.model_fields]
        assert all(len(row) == 4 and all(row) for row in rows)


@pytest.mark.parametrize(
    ("section", "field", "shape", "default"),
    [
        ("run", "dir", "text", "required"),
        ("run", "device", "`auto`, `cpu`, `cuda`", "`auto`"),
        ("model", "num_layers", "whole number above 0", "required without a preset"),
        ("model", "tie_embeddings", "`true` or `false`", "`false`"),
        ("model", "head_dim", "whole number above 0 or `null`", "`null`"),
        ("data", "train", "list of sections, at least 1", "required"),
        ("parallel", "zero_stage", "`0`, `1`, `2`, `3`", "`1`"),
        ("optimizer", "beta1", "number in [0, 1)", "`0.9`"),
        ("schedule", "warmup_fraction", "number in [0, 1) or `null`", "`null`"),
    ],
)
def test_types_and_defaults_are_told_in_the_words_of_yaml(section, field, shape, default):
    heading = next(
        format_heading(names, found) for names, found in list_sections() if names == [section]
    )
    rows = {row[0]: row[1:3] for row in rows_below(heading)}
    assert rows[f"`{field}`"] == [shape, default]


def test_every_preset_is_listed_with_its_number_of_parameters():
    rows = {row[0].strip("`"): row for row in rows_below("## Presets")}
    assert list(rows) == list_presets()
    for name, row in rows.items():
        size = model_size(ModelConfig(preset=name))
        assert row[-2:] == [f"{size.with_embeddings:,}", f"{size.without_embeddings:,}"]


def test_the_tool_finds_the_page_up_to_date():
    command = [sys.executable, REPO / "tools" / "document_config.py", "--check"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
