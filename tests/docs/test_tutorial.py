"""docs/tutorial.md from its first line to its last, on less text and for fewer passes."""

from __future__ import annotations

import re

import pytest
from documented import REPO, list_blocks

# The smaller modules of the standard library, and runs of seconds.
CHEAPER = {
    "--output corpus": "--output corpus --root sources",
    "--hours 0.1": "--epochs 0.02",
    "--tokens 25000": "--tokens 25000 --seed 1",
    "--epochs 16": "--epochs 0.5",
    "schedule.epochs: 64, validation.every_epochs: 4": "schedule.epochs: 1, model.num_layers: 1",
    "schedule.epochs: 16, validation.every_epochs: 1": "schedule.epochs: 1, model.num_layers: 1",
    "--length 24": "--length 24 --steps 2",
}


@pytest.mark.slow
def test_the_tutorial_runs_as_printed(world):
    blocks = list_blocks(REPO / "docs/tutorial.md")
    assert [block.needs for block in blocks] == [None] * len(blocks)
    prepared, first, looked, pair, figure = world.run_blocks(blocks, CHEAPER)
    assert re.search(r"data/text-valid: \d+ documents", prepared)
    assert "next: train" in first
    assert "runs/first/report.html" in looked
    assert "def " in looked
    assert "all done" in pair
    assert "runs/pair/comparison.html" in figure
    for page in ("comparison.html", "crossover.html", "crossover.png"):
        assert (world.root / "runs/pair" / page).stat().st_size > 0
    # What is said to be next works as printed, in a fresh shell.
    assert "report.html" in world.run(re.search(r"next: [^/]*?  +(\S+ report .*)", first)[1])
