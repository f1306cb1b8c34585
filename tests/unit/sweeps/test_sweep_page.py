"""The page of a sweep says how far each run is, and stays up to date while runs go on."""

from __future__ import annotations

import io
import os
import re

import pytest
import sweep_examples

from megatron_mdm.core.locks import HeldLock
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.studies.sweeps.sweep_display import Display
from megatron_mdm.studies.sweeps.sweep_page import LivePage, write_sweep_page

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture
def sweep(tmp_path):
    """Four runs: done, failed, half way, not begun."""
    sweep = sweep_examples.write_sweep(tmp_path, axes={"run.seed": [0, 1, 2, 3]})
    losses = {"consumed_tokens": 64, "epoch": 0.5, "valid/nll_standard_error": 0.01}
    begun = [{"step": step, **losses, NLL: 4.0 - step / 8} for step in (1, 2, 3)]
    ended = [*begun, {"step": 6, **losses, NLL: 3.25}]
    failed = {"exit_status": 1, "ended": 2.0, "last_line": "it is <broken>: mend it."}
    sweep_examples.begin(sweep.runs[0], ended, saved=6)
    sweep_examples.begin(sweep.runs[1], begun[:1], attempt=failed)
    sweep_examples.begin(sweep.runs[2], begun)
    return sweep


def read_rows(page):
    """Cells of the tables by the name of the run, in the page's order."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    return [row for row in cells if row]


def test_the_page_tells_states_curves_and_the_best(sweep, tmp_path):
    page = tmp_path / "page.html"
    write_sweep_page(sweep, page)
    html = page.read_text(encoding="utf-8")
    assert "1 done, 1 stopped, 1 waiting, 1 failed" in html
    assert "Best so far: seed-0, with 3.2500 ± 0.0100 nats per token at step 6." in html
    rows = read_rows(page)
    assert [row[:4] for row in rows[:4]] == [
        ["seed-0", "done", "6 of 6", "100%"],
        ["seed-1", "failed", "1 of 6", "17%"],
        ["seed-2", "stopped", "3 of 6", "50%"],
        ["seed-3", "waiting", "0 of 6", "0%"],
    ]
    assert rows[1][-1] == "it is &lt;broken&gt;: mend it."
    assert [row[0] for row in rows[4:]] == ["seed-0", "seed-2", "seed-1", "seed-3"]
    assert "seed-2, lowest 3.625" in html
    assert REFRESH not in html


def test_it_refreshes_itself_while_a_run_goes_on(sweep, tmp_path):
    page = tmp_path / "page.html"
    held = HeldLock(sweep.runs[2].folder / "lock")
    states = write_sweep_page(sweep, page)
    held.release()
    assert states["seed-2"].status == "running"
    assert REFRESH in page.read_text(encoding="utf-8")


def test_a_sweep_writes_it_rarely_and_at_its_end(sweep):
    page = sweep.dir / "sweep.html"
    live = LivePage(sweep, Display(io.StringIO()))
    live.update()
    assert REFRESH in page.read_text(encoding="utf-8")
    # Another process has just written it, or this one has.
    page.write_text("of late")
    live.update()
    assert page.read_text() == "of late"
    os.utime(page, (1.0, 1.0))
    live.update()
    assert REFRESH in page.read_text(encoding="utf-8")
    live.update(is_last=True)
    assert REFRESH not in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(sweep):
    told = io.StringIO()
    live = LivePage(sweep, Display(told))
    (sweep.dir / "sweep.html").mkdir()
    live.update(is_last=True)
    live.update(is_last=True)
    assert told.getvalue().count("is not written any more") == 1
