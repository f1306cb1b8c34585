"""Pages of reports in a real browser: nothing sticks out of the window, and text can be read."""

from __future__ import annotations

import json

import pytest

from megatron_mdm.reporting.comparison import write_comparison
from megatron_mdm.reporting.figures import open_figure
from megatron_mdm.reporting.pages import Frame, Heading, Paragraph, Picture, Report, Sample, Table
from megatron_mdm.reporting.report import write_report

# Elements that reach beyond the window and do not lie in one that scrolls.
STICKING_OUT = """
[...document.querySelectorAll("table, figure, svg, iframe, p, h1, h2, pre")].filter((one) =>
  !one.parentElement.closest(".wide, svg") && !one.matches(".wide > table") &&
  one.getBoundingClientRect().right > innerWidth).map((one) => one.outerHTML.slice(0, 80)).concat(
  document.documentElement.scrollWidth > innerWidth ? ["the page scrolls sideways"] : [])
"""
# Text, its colour and contrast with the page, where that is below a number (WCAG 2.2, 1.4.3).
FAINT_TEXT = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = parse(color).map((byte) => {
      const c = byte / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (parse(color)[3] !== 0) return color;
    }
  };
  const found = [];
  for (const one of document.querySelectorAll("main *")) {
    if (![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (one.matches("style")) continue;
    const drawn = one.matches("svg *"), style = getComputedStyle(one);
    const color = drawn ? style.fill : style.color;
    const [low, high] = [luminance(color), luminance(behind(one))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (drawn ? 3 : 4.5)) found.push([one.textContent.slice(0, 30), color, contrast]);
  }
  return found;
})()
"""


def write_run(folder, kind):
    folder.mkdir(parents=True)
    config = {"objective": {"kind": kind}, "model": {"vocab_size": 300}, "a": {"b" * 60: kind}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "run_info.json").write_text(json.dumps({"vocab_size": 300, "wall_seconds": 9.0}))
    lines = []
    for step in range(1, 5):
        record = {"step": step, "epoch": 2.0 * step, "consumed_tokens": 10**9 * step}
        record |= {"consumed_flops_6nd": 6e15 * step, "train/loss_nats_per_token": 5.0 / step}
        record |= {"train/lr": 1e-3, "valid/nll_nats_per_token": 4.0 / step}
        record |= {"valid/nll_standard_error": 0.1, "valid/nll_clustered_error": 0.2}
        record |= {"train/nll_nats_per_token": 3.0 / step, "valid/gap_nats_per_token": 0.1}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    names = [f"{kind}_{'learning_rate-0.001_' * 3}{n}" for kind in ("ar", "mdm") for n in (0, 1)]
    runs = [write_run(folder / name, name.split("_")[0]) for name in names]
    with open_figure(10, 3) as (figure, (axes,)):
        axes.plot([1, 2], label="x" * 30)
        axes.set(title="a title", xlabel="x", ylabel="y")
        axes.legend()
    heads = [f"a column of numbers {number}" for number in range(14)]
    parts = [
        Paragraph("A warning.", is_warning=True),
        Table(heads, [["long_name_" * 9, *["12,345.6789 ± 0.1234"] * 13]], "A note."),
        Picture(figure, "A caption."),
        Heading("More"),
        Table(["Question", "Right"], [["word " * 60, "word " * 60]]),
        Sample("a sample", "given", "written"),
        Frame("<p>a page</p>", "a frame", 100),
    ]
    return {
        "run": write_report(runs[2], folder / "report.html"),
        "comparison": write_comparison(runs, folder / "comparison.html"),
        "study": Report("study", "A study", "of pages", parts).write(folder)["html"],
    }


@pytest.mark.parametrize("width", [1280, 700])
@pytest.mark.parametrize("name", ["run", "comparison", "study"])
def test_nothing_sticks_out_of_the_window(page, files, name, width):
    page.resize(width)
    page.open(files[name].as_uri())
    assert page.evaluate(STICKING_OUT) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "comparison", "study"])
def test_text_and_labels_of_plots_stand_out_from_the_page(page, files, name, theme):
    page.emulate("prefers-color-scheme", theme)
    page.open(files[name].as_uri())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(24, 28, 34)"}[theme]
    assert page.evaluate(FAINT_TEXT) == []
