"""Tasks that a run evaluated, as a plot of each metric and a table."""

from __future__ import annotations

from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.reporting.report import write_report
from megatron_mdm.reporting.task_curves import build_task_table, list_task_metrics, plot_tasks

RECORDS = [
    {"step": 1, "train/lr": 0.1},
    {
        "step": 5,
        "downstream/one/acc": 0.25,
        "downstream/one/acc_standard_error": 0.125,
        "downstream/one/acc_noise": 0.01,
        "downstream/two/acc": 0.5,
        "downstream/two/word_perplexity": 12345.6,
    },
    {"step": 1000, "downstream/one/acc": float("nan"), "downstream/two/acc": 0.625},
]


def test_errors_and_noise_are_no_figures_of_their_own():
    names = ["downstream/one/acc", "downstream/two/acc", "downstream/two/word_perplexity"]
    assert list_task_metrics(RECORDS) == names


def test_each_metric_has_a_plot_and_each_evaluation_a_row():
    plots = plot_tasks(RECORDS)
    assert list(plots) == ["acc", "word_perplexity"]
    assert ">one<" in plots["acc"]
    assert ">two<" in plots["acc"]
    assert ">one<" not in plots["word_perplexity"]
    assert ">word perplexity<" in plots["word_perplexity"]
    assert build_task_table(RECORDS) == {
        "columns": ["Step", "one acc", "two acc", "two word_perplexity"],
        "rows": [
            ["5", "0.25 ± 0.12", "0.5", "1.235e+04"],
            ["1,000", "nan", "0.625", ""],
        ],
    }


def test_a_report_has_them_only_where_there_are_some(tmp_path):
    for name, records in (("with", RECORDS), ("without", RECORDS[:1])):
        logger = MetricsLogger(tmp_path / name, resume_step=None)
        for record in records:
            logger.log(record)
        logger.close()
        html = write_report(tmp_path / name).read_text("utf-8")
        assert ("<h2>Tasks</h2>" in html) == (name == "with")
        assert ("<td>0.25 ± 0.12</td>" in html) == (name == "with")
