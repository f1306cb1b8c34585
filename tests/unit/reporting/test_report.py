from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.reporting.plots import extract_series, plot_loss, smooth, thin_out
from megatron_mdm.reporting.report import write_report

REPOSITORY = Path(__file__).resolve().parents[3]


class _Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def _log_run(run_dir, num_steps=40, valid_every=10):
    logger = MetricsLogger(run_dir, resume_step=None)
    for step in range(1, num_steps + 1):
        loss = 4 + 6 * math.exp(-step / 10)
        progress = {"step": step, "consumed_samples": 8 * step, "epoch": step / 20}
        logger.log(
            progress
            | {
                "consumed_tokens": 8192 * step,
                "train/loss_nats_per_token": loss,
                "train/grad_norm": 1.0,
                "train/lr": 3e-4,
                "perf/tokens_per_second": 8.1e3,
            }
        )
        if valid_every and step % valid_every == 0:
            logger.log(
                progress
                | {
                    "valid/nll_nats_per_token": loss + 0.1,
                    "valid/nll_standard_error": 0.02,
                    "valid/num_tokens": 10_000,
                    "valid/noise_seed": 1,
                }
            )
    logger.close()


@pytest.fixture
def run_dir(tmp_path):
    run_dir = tmp_path / "demo-run"
    _log_run(run_dir)
    (run_dir / "config.yaml").write_text(
        "name: demo\nmodel: {num_layers: 12, rope: {base: 10000}}\n"
        "optimizer: {betas: [0.9, 0.95]}\n"
    )
    run_info = {"vocab_size": 1000, "peak_memory_bytes": 3 * 2**30, "wall_seconds": 250.0}
    (run_dir / "run_info.json").write_text(json.dumps(run_info | {"versions": {"torch": "2.13"}}))
    return run_dir


@pytest.fixture
def samples_path(tmp_path):
    path = tmp_path / "samples.json"
    samples = [
        {
            "kind": "infill",
            "prompt": "\n  before <b>",
            "suffix": " after & done",
            "completions": ["<script>alert(1)</script>", "two\n    lines"],
            "settings": {"temperature": 0.8},
        },
        {"kind": "prompt", "prompt": "Once", "completions": [" upon a time"]},
    ]
    path.write_text(json.dumps(samples))
    return path


def test_report_loads_nothing_from_outside(run_dir, samples_path):
    html = write_report(run_dir, samples_path=samples_path).read_text()
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    targets = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert "http" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}


def test_what_counting_gives_is_drawn_beside_the_curves(run_dir):
    assert "unigram" not in write_report(run_dir).read_text()
    counting = {"unigram": 6.25, "bigram": 4.5}
    of_rest = {"unigram": 6.0, "bigram": 99.0}
    tree = {"identity": "a", "counted_tokens": 7, "nll": counting, "nll_given_first": of_rest}
    (run_dir / "baselines.json").write_text(json.dumps(tree))
    page = _Page(write_report(run_dir).read_text())
    assert "unigram 6.25" in page.text
    assert "bigram 4.50" in page.text
    assert "what counts of single tokens (unigram)" in page.text
    # A file that is cut off is as none.
    (run_dir / "baselines.json").write_text(json.dumps(tree)[:40])
    assert "unigram" not in write_report(run_dir).read_text()


def test_training_windows_are_drawn_as_held_out_ones_are(run_dir):
    assert "Squares" not in _Page(write_report(run_dir).read_text()).text
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "valid/nll_nats_per_token" in record:
            judged = {"nats_per_token": record["valid/nll_nats_per_token"], "standard_error": 0.03}
            record |= {f"train/nll_{name}": value for name, value in judged.items()}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(text)
    page = _Page(write_report(run_dir).read_text())
    assert "training windows" in page.text
    assert "Squares: of training windows, judged in the same way." in page.text


def test_ids_are_unique_and_references_resolve(run_dir):
    page = _Page(write_report(run_dir).read_text())
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    for _, name, value in page.attributes:
        if name == "clip-path":
            targets.add(value.removeprefix("url(#").removesuffix(")"))
    assert targets <= set(ids)


def test_samples_are_shown_as_text_with_their_whitespace(run_dir, samples_path):
    html = write_report(run_dir, samples_path=samples_path).read_text()
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark> after &amp; done</pre>" in html
    assert "<pre>\n\n  before &lt;b&gt;<mark>two\n    lines</mark>" in html
    assert "temperature = 0.8" in _Page(html).text


def test_headlines_come_from_the_last_lines(run_dir):
    text = _Page(write_report(run_dir).read_text()).text
    nll = 4 + 6 * math.exp(-4) + 0.1
    assert f"{nll:.3f} ± 0.020" in text
    assert f"≤ {math.exp(nll):.1f}" in text
    assert "327,680 by step 40" in text
    assert "4m10s" in text


def test_settings_and_facts_are_tables(run_dir):
    text = re.sub(r"\s+", " ", _Page(write_report(run_dir).read_text()).text)
    for shown in ("general", "rope.base", "[0.9, 0.95]", "3.00 GiB", "Versions: torch"):
        assert shown in text
    assert "ln 1,000 = 6.91" in text


def test_report_of_the_same_run_is_the_same_bytes(run_dir, tmp_path):
    first = write_report(run_dir, tmp_path / "first.html").read_bytes()
    assert write_report(run_dir, tmp_path / "new" / "second.html").read_bytes() == first


def test_empty_run_directory_gives_a_page_that_says_so(tmp_path):
    text = _Page(write_report(tmp_path).read_text()).text
    for sentence in (
        "No metrics have been logged yet.",
        "No validation has been run yet.",
        "No samples were given",
        "no run_info.json",
        "no config.yaml",
    ):
        assert sentence in text


def test_run_without_validation_shows_its_training_loss(tmp_path):
    _log_run(tmp_path, num_steps=3, valid_every=0)
    text = _Page(write_report(tmp_path).read_text()).text
    assert "Training loss" in text
    assert "This run has no validation yet." in text


def test_non_finite_values_are_counted_and_not_drawn(tmp_path):
    logger = MetricsLogger(tmp_path, resume_step=None)
    for step, loss in enumerate((5.0, math.nan, math.inf, 4.0), start=1):
        logger.log({"step": step, "train/loss_nats_per_token": loss})
    logger.log({"step": 4, "valid/nll_nats_per_token": math.inf, "valid/nll_standard_error": 1.0})
    logger.close()
    text = _Page(write_report(tmp_path).read_text()).text
    assert "3 non-finite values are not drawn." in text
    assert "≤ inf" in text


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "no valid JSON"),
        ("{}", "must be a list"),
        ("[1]", "sample 1 is int"),
        ('[{"kind": "poem", "completions": []}]', "kind='poem'"),
        ('[{"kind": "prompt", "completions": "a"}]', "completions='a'"),
        ('[{"kind": "prompt", "completions": [1]}]', r"completions=\[1\]"),
        ('[{"kind": "prompt", "completions": [], "settings": 1}]', "settings=1"),
    ],
)
def test_bad_samples_file_is_a_data_error(run_dir, samples_path, content, rule):
    samples_path.write_text(content)
    with pytest.raises(DataError, match=rule):
        write_report(run_dir, samples_path=samples_path)


@pytest.mark.parametrize(
    ("name", "content"), [("config.yaml", "a: ["), ("config.yaml", "- a"), ("run_info.json", "{")]
)
def test_damaged_run_file_is_named(run_dir, name, content):
    (run_dir / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run_dir)


def test_the_ledger_is_a_table_with_what_was_counted(run_dir):
    entry = {
        "path": "data/<web>",
        "unique_tokens": 1_234_567,
        "epochs": 2.25,
        "tokens_seen": 2_777_776,
        "windows_by_visits": {"2": 900, "3": 300},
        "predictions_per_token": 1.1234,
        "expected_predictions_per_token": 1.125,
    }
    ledger = {"seen": [entry], "planned": [entry | {"epochs": 4.0}]}
    (run_dir / "ledger.json").write_text(json.dumps(ledger))
    text = _Page(write_report(run_dir).read_text("utf-8")).text
    for cell in ("data/<web>", "1,234,567", "2.25 of 4", "900 \u00d7 2, 300 \u00d7 3", "1.1234"):
        assert cell in text


@pytest.mark.parametrize("content", ['{"seen": [{}], "planned": [{}]}', '{"seen": 3}'])
def test_a_damaged_ledger_is_named(run_dir, content):
    (run_dir / "ledger.json").write_text(content)
    with pytest.raises(DataError, match=r"ledger\.json of the run is not a ledger"):
        write_report(run_dir)


def test_missing_run_directory_ends_the_tool_with_one_line(tmp_path):
    tool = [sys.executable, str(REPOSITORY / "tools" / "report.py"), "--run"]
    failed = subprocess.run(
        [*tool, str(tmp_path / "none")], capture_output=True, text=True, check=False, timeout=60
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "is not a directory" in failed.stderr
    done = subprocess.run(
        [*tool, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert Path(done.stdout.strip()) == tmp_path / "report.html"


def test_long_run_gives_a_small_svg():
    noise = np.random.default_rng(0).normal(4, 0.1, size=50_000)
    records = [{"step": i, "train/loss_nats_per_token": loss} for i, loss in enumerate(noise)]
    assert len(plot_loss(records, "mdm")) < 250_000


def test_thinned_curve_keeps_its_spikes_and_ends():
    steps, values = np.arange(100_000), np.full(100_000, 4.0)
    values[[55_555, 55_556]] = 5.0, 3.0
    thin_steps, thin_values = thin_out(steps, values)
    assert len(thin_steps) <= 2002
    assert {0, 55_555, 55_556, 99_999} <= set(thin_steps.tolist())
    assert (thin_values == values[thin_steps]).all()


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothed_curve_stays_within_the_values(values):
    smoothed = smooth(np.array(values))
    assert len(smoothed) == len(values)
    assert smoothed[0] == pytest.approx(values[0], abs=1e-9)
    assert min(values) - 1e-9 <= smoothed.min()
    assert smoothed.max() <= max(values) + 1e-9


def test_series_takes_only_records_with_the_metric():
    records = [{"step": 1, "a": 1}, {"step": 2, "b": 2.0}, {"step": 3, "a": math.nan}]
    series = extract_series(records, "a")
    assert (series.steps.tolist(), series.values.tolist()) == ([1], [1.0])
    assert series.num_non_finite == 1


@pytest.mark.parametrize(
    ("kind", "title", "column"),
    [
        ("ar", "an autoregressive language model", "NLL, nats"),
        ("mdm", "a masked-diffusion language model", "NLL bound, nats"),
        # Nothing is promised of an objective whose class is not there.
        ("lost.module:Objective", "a language model", "NLL bound, nats"),
    ],
)
def test_the_page_says_what_the_objective_says_of_itself(tmp_path, kind, title, column):
    _log_run(tmp_path)
    (tmp_path / "config.yaml").write_text(f"objective:\n  kind: {kind}\n", "utf-8")
    page = _Page(write_report(tmp_path).read_text("utf-8"))
    assert f"Training report of {title}" in page.text
    assert column in page.text


def test_a_run_of_several_losses_has_columns_and_curves_of_each(run_dir):
    logger = MetricsLogger(run_dir, resume_step=40)
    judged = {"valid/nll_nats_per_token": 4.0, "valid/num_tokens": 9, "valid/noise_seed": 1}
    for step, epoch in ((50, 2.5), (60, 3.0)):
        for name, loss in (("ar", 4.0), ("mdm", 4.3)):
            judged |= {f"valid/as_{name}_nll_nats_per_token": loss}
            judged |= {f"valid/as_{name}_nll_standard_error": 0.02}
        logger.log({"step": step, "epoch": epoch, **judged})
    logger.close()
    text = _Page(write_report(run_dir).read_text("utf-8")).text
    for column in ("NLL as AR", "NLL as MDM", "4.3000 ± 0.0200"):
        assert column in text
    assert text.count("held out, as MDM") == 2


@pytest.mark.parametrize(
    ("own_loss", "column"), [("ar", "NLL, nats/token"), ("mdm", "NLL bound, nats/token")]
)
def test_a_mixture_says_whether_its_own_loss_is_a_bound(run_dir, own_loss, column):
    section = f"objective:\n  kind: mixture\n  own_loss: {own_loss}\n"
    (run_dir / "config.yaml").write_text(section, "utf-8")
    assert column in _Page(write_report(run_dir).read_text("utf-8")).text


def test_averages_of_the_weights_have_columns_and_curves(run_dir):
    logger = MetricsLogger(run_dir, resume_step=40)
    judged = {"valid/nll_nats_per_token": 4.0, "valid/num_tokens": 9, "valid/noise_seed": 1}
    for step, epoch in ((50, 2.5), (60, 3.0)):
        average = {"nll_nats_per_token": 3.9, "nll_standard_error": 0.02}
        average |= {"less_raw_nats_per_token": -0.1, "less_raw_standard_error": 0.004}
        named = {f"valid_ema/{name}": value for name, value in average.items()}
        logger.log({"step": step, "epoch": epoch, **judged, **named})
    logger.close()
    text = _Page(write_report(run_dir).read_text("utf-8")).text
    assert "Average ema (less raw)" in text
    assert "3.9000 ± 0.0200 (-0.1000 ± 0.0040)" in text
    # In the legends of both plots of losses.
    assert text.count("average ema") == 2
    assert "average swa" not in text
