from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting import curves
from megatron_mdm.reporting.comparison import write_comparison
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.reporting.report import write_report

REPOSITORY = Path(__file__).resolve().parents[3]


def _validation(epoch, nll, train, tokens_per_epoch=1000):
    return {
        "step": 10 * epoch,
        "epoch": float(epoch),
        "consumed_tokens": tokens_per_epoch * epoch,
        "consumed_flops_6nd": 6e6 * tokens_per_epoch * epoch,
        "valid/nll_nats_per_token": nll,
        "valid/nll_standard_error": 0.02,
        "valid/num_tokens": 640,
        "valid/noise_seed": 0,
        "train/nll_nats_per_token": train,
        "train/nll_standard_error": 0.015,
        "valid/gap_nats_per_token": nll - train,
        "valid/gap_standard_error": 0.025,
        "train/epoch_loss_nats_per_token": train + 0.1,
    }


def _write_run(run_dir, kind, losses, **options):
    logger = MetricsLogger(run_dir, resume_step=None)
    for epoch, (nll, train) in enumerate(losses, start=1):
        logger.log({"step": 10 * epoch, "train/loss_nats_per_token": train})
        logger.log(_validation(epoch, nll, train, **options))
    logger.close()
    config = {"run": {"dir": str(run_dir)}, "objective": {"kind": kind}, "optimizer": {"lr": 0.001}}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    (run_dir / "run_info.json").write_text(json.dumps({"parameters_without_embeddings": 10**6}))
    return run_dir


@pytest.fixture
def pair(tmp_path):
    ar = [(4.0, 3.9), (3.25, 2.9), (3.5, 2.0)]
    mdm = [(4.5, 4.4), (4.0, 3.9), (3.75, 3.6), (3.5, 3.4)]
    return [
        _write_run(tmp_path / "ar", "ar", ar),
        _write_run(tmp_path / "mdm", "mdm", mdm),
    ]


def _text(html):
    """What a reader sees outside of the plots."""
    html = re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def _svgs(html):
    return re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)


def test_what_counting_gives_is_drawn_where_all_runs_have_the_same(pair):
    def count(run_dir, identity):
        counting = {"unigram": 4.25, "bigram": 3.5}
        tree = {"identity": identity, "counted_tokens": 7, "nll": counting}
        of_rest = {"unigram": 4.75, "bigram": 0.5}
        (run_dir / "baselines.json").write_text(json.dumps(tree | {"nll_given_first": of_rest}))

    for run_dir in pair:
        assert "unigram" not in write_comparison(pair).read_text()
        count(run_dir, "a")
    html = write_comparison(pair).read_text()
    # Over the tokens that both predict; the other line would lie far below the curves.
    assert "unigram 4.75" in html
    assert "bigram 0.50" not in html
    count(pair[0], "b")
    assert "unigram" not in write_comparison(pair).read_text()


def test_a_pair_is_compared_by_its_losses_and_by_the_settings_that_differ(pair, tmp_path):
    page = write_comparison(pair)
    assert page == tmp_path / "comparison.html"
    html = page.read_text(encoding="utf-8")
    text = _text(html)
    ar = "ar AR 1M 3k 3.00 1.80 \u00d7 10¹⁰ 3.5000 ± 0.0200 3.2500 ± 0.0200 2.00 1.5000 ± 0.0250"
    mdm = "mdm MDM 1M 4k 4.00 2.40 \u00d7 10¹⁰ 3.5000 ± 0.0200 3.5000 ± 0.0200 4.00 0.1000 ± 0.0250"
    assert ar in text
    assert mdm in text
    assert "that of MDM an upper bound on one" in text
    assert "Setting ar mdm objective.kind ar mdm" in text
    assert "optimizer.lr" not in text
    assert "cannot be compared" not in text
    # An epoch is as many tokens in both, so tokens have no plot of their own.
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert titles == ["Loss against epochs", "Loss against compute"]
    for svg in _svgs(html):
        assert {"ar, lowest 3.250", "mdm, lowest 3.500"} <= set(
            re.findall(r">(\w+, lowest \S+)</text>", svg)
        )


def test_runs_on_other_data_are_drawn_against_tokens_too(pair, tmp_path):
    other = _write_run(tmp_path / "more", "mdm", [(4.0, 3.9), (3.9, 3.8)], tokens_per_epoch=5000)
    html = write_comparison([*pair, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h3>Loss against tokens</h3>" in html
    assert "<h1>3 runs</h1>" in html


def test_runs_that_were_judged_differently_are_said_to_be(pair):
    config = {"objective": {"kind": "mdm"}, "validation": {"noise_seed": 7}}
    (pair[1] / "config.yaml").write_text(json.dumps(config))
    text = _text(write_comparison(pair).read_text(encoding="utf-8"))
    assert "cannot be compared: the runs differ in validation.noise_seed." in text


def _judge(run_dir, steps, is_ar, windows="the same"):
    """Windows of two documents; the run's losses are those of `steps`."""
    logger = MetricsLogger(run_dir, resume_step=10**6)
    for step, losses in steps.items():
        losses_N = np.array(losses)
        documents = np.array([0, 0, 1, 1])
        noise = None if is_ar else 0
        own_N = losses_N if is_ar else losses_N + 9
        judged = JudgedWindows(step, windows, documents, noise, 1, own_N, losses_N)
        logger.log_windows(judged.as_record())
    logger.close()


def test_runs_that_judged_the_same_windows_are_compared_window_by_window(pair):
    _judge(pair[0], {20: [1.0, 2.0, 3.0, 4.0], 30: [2.0, 2.0, 2.0, 2.0]}, is_ar=True)
    _judge(pair[1], {40: [1.5, 2.5, 3.0, 4.2]}, is_ar=False)
    text = _text(write_comparison(pair).read_text(encoding="utf-8"))
    # Last: -0.5, 0.5, 1 and 2.2. Best: 0.5, 0.5, 0 and 0.2; 0.5 and 0.1 in documents.
    assert "mdm ar +0.8000 ± 0.5612 ± 0.8000 +0.3000 ± 0.1225 ± 0.2000" in text
    assert "It says nothing about other seeds." in text


def test_runs_that_judged_other_windows_are_not(pair):
    _judge(pair[0], {20: [1.0, 2.0, 3.0, 4.0], 30: [2.0, 2.0, 2.0, 2.0]}, is_ar=True)
    _judge(pair[1], {40: [1.5, 2.5, 3.0, 4.2]}, is_ar=False, windows="others")
    assert "window by window" not in _text(write_comparison(pair).read_text(encoding="utf-8"))


def test_both_objectives_are_compared_over_the_tokens_that_both_predict(pair):
    """An MDM run logs the loss of all tokens beside that of all but the first of each text."""
    page = _text(write_comparison(pair).read_text(encoding="utf-8"))
    assert "mdm: logged before losses were matched token for token" in page
    path = pair[1] / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if "valid/nll_nats_per_token" in record:
            record["valid/nll_given_first_nats_per_token"] = record["valid/nll_nats_per_token"] - 1
            record["valid/nll_given_first_standard_error"] = 0.04
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    html = write_comparison(pair).read_text(encoding="utf-8")
    assert "2.5000 ± 0.0400 2.5000 ± 0.0400 4.00" in _text(html)
    assert "logged before" not in _text(html)
    assert "over the tokens that both objectives predict" in _text(html)
    assert all("mdm, lowest 2.500" in svg for svg in _svgs(html))


def test_a_run_without_validation_cannot_be_compared(pair, tmp_path):
    (tmp_path / "young").mkdir()
    with pytest.raises(DataError, match="young has no held-out loss to compare: "):
        write_comparison([pair[0], tmp_path / "young"])


def test_a_page_holds_no_id_twice_and_loads_nothing(pair):
    html = write_comparison(pair).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert not re.search(r"<(script|link|img)|https?:|@import", html)


def test_the_report_of_one_run_draws_its_gap_against_epochs(pair):
    html = write_report(pair[0]).read_text(encoding="utf-8")
    text = _text(html)
    assert "Loss against epochs" in text
    assert "Gap: held-out less training windows." in text
    assert "Training report of an autoregressive language model" in text
    assert "best 3.250 at step 20" in text
    assert "Perplexity bound" not in text
    assert "Training windows Gap Tokens 10 1.00 4.0000 0.0200 54.6 3.9000 ± 0.0150" in text
    svg = curves.plot_epochs([_validation(1, 4.0, 3.9), _validation(2, 3.25, 2.9)], "mdm")
    for label in (
        "held-out windows, lowest 3.250",
        "training windows",
        "mean of an epoch, as trained",
        ">gap<",
    ):
        assert label in svg


def test_without_a_second_epoch_there_is_nothing_to_draw_against_epochs():
    records = [_validation(1, 4.0, 3.9), _validation(2, 3.25, 2.9)]
    assert curves.has_epoch_curve(records)
    assert not curves.has_epoch_curve(records[1:])
    within = [record | {"epoch": record["epoch"] / 2} for record in records]
    assert not curves.has_epoch_curve(within)
    assert not curves.has_epoch_curve([])


def test_the_tool_compares_several_runs_and_refuses_samples_for_them(pair, tmp_path):
    tool = [sys.executable, str(REPOSITORY / "tools" / "report.py"), "--run", *map(str, pair)]
    done = subprocess.run(tool, capture_output=True, text=True, check=True, timeout=60)
    assert Path(done.stdout.strip()) == tmp_path / "comparison.html"
    failed = subprocess.run(
        [*tool, "--samples", "x.json"], capture_output=True, text=True, check=False, timeout=60
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "belongs to the report of one run" in failed.stderr
