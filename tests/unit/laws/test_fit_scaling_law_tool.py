"""tools/fit_scaling_law.py end to end on the public runs, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mdm.cli.studies import fit
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json
from megatron_mdm.studies.laws.command import analyze_table, fit_and_report
from megatron_mdm.studies.laws.forms import ChinchillaLaw
from megatron_mdm.studies.laws.overfitting import OverfittingLaw
from megatron_mdm.studies.laws.request import FitSettings
from megatron_mdm.studies.laws.storage import read_law

ROOT = Path(__file__).parents[3]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/fit_scaling_law.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def named(option: str, pairs: dict[str, object]) -> list[str]:
    return [part for name, value in pairs.items() for part in (option, f"{name}={value}")]


def test_the_public_runs_from_table_to_law_and_plots(tmp_path, public_table, published):
    table, columns = public_table
    held = dict(zip(published.names()[:5], published.values(), strict=False))
    done = run_tool(
        str(table),
        *named("--column", columns),
        *["--form", "data_constrained", "--fit", "token_reuse,parameter_reuse"],
        *named("--hold", held),
        *["--bootstrap", "20", "--profile", "token_reuse=5:200", "--objective", "ar"],
        *["--parameters", "with_embeddings", "--out", str(tmp_path / "law")],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"182 runs of {table}: N 7.1e+06 to 8.67e+09, ")
    assert "data_constrained, 2 constants from 25 starts: objective 0.0158047" in done.stdout
    assert "another minimum: objective 0.0158259 at token_reuse 15.37" in done.stdout
    assert "token_reuse is weakly identified" in done.stdout
    assert "; N with embeddings\n" in done.stdout
    stored = read_law(tmp_path / "law" / "law.json")
    assert stored.parameters == "with_embeddings"
    assert stored.law.token_reuse == pytest.approx(95.4, rel=0.01)
    assert (stored.num_runs, len(stored.bootstrap), stored.objective) == (182, 20, "ar")
    assert stored.ranges["num_tokens"] == (1e8, 9e11)
    assert stored.fitted == ("token_reuse", "parameter_reuse")
    plots = {path.name for path in (tmp_path / "law").glob("*.png")}
    assert plots == {
        "predictions.png",
        "compute.png",
        "effective_data.png",
        "profile_token_reuse.png",
    }
    for name in plots:
        with Image.open(tmp_path / "law" / name) as image:
            assert min(image.size) > 400
            # Lines, points and text of several colors, not an empty page.
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_isoflops_alone(tmp_path):
    law = ChinchillaLaw(406.4, 410.7, 1.69, 0.34, 0.28)
    rows = ["num_parameters,num_tokens,unique_tokens,loss,status"]
    for flops in (1e18, 1e19, 1e20):
        for factor in (0.3, 0.6, 1.0, 1.6, 3.0):
            n = factor * 0.12 * flops**0.4516
            d = flops / 6 / n
            loss = law.loss(num_parameters=n, num_tokens=d, unique_tokens=d)
            rows.append(f"{float(n)},{float(d)},{float(d)},{float(loss)},done")
    rows.append("1e6,1e8,1e8,,running")
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    lines = fit_and_report(tmp_path / "runs.csv", FitSettings(isoflop=True, out=tmp_path))
    assert lines[0].startswith("15 runs of ")
    assert lines[1] == "left out: 1 status running"
    (size_line,) = (line for line in lines if "best N = " in line)
    assert float(size_line.split("C^")[1].split()[0]) == pytest.approx(0.4516, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "isoflops.png"}


@pytest.fixture
def overfitting_table(tmp_path) -> Path:
    """Two sizes on two amounts of data, from one epoch to far beyond the best number."""
    law = OverfittingLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.0233, 1.0, 1.5)
    rows = ["run,num_parameters,num_tokens,unique_tokens,loss,objective"]
    noise = iter(np.random.default_rng(0).standard_normal(100))
    for n in (1e8, 3e8):
        for u in (3e8, 1e9, 3e9):
            for e in (1, 2, 4, 8, 12, 16, 24, 32):
                loss = law.loss(num_parameters=n, num_tokens=u * e, unique_tokens=u)
                seen = float(loss) * (1 + 1e-3 * next(noise))
                rows.append(f"run-{len(rows)},{n},{u * e},{u},{seen},mdm")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(rows))
    return path


def test_best_epochs_of_a_fit_and_of_curves_and_forms_by_held_out_runs(overfitting_table, tmp_path):
    held = ("irreducible_loss=1.7", "parameter_exponent=0.34", "token_exponent=0.31")
    settings = FitSettings(
        form="overfitting",
        hold=held,
        bootstrap=20,
        best_epochs=("3e8,1e9",),
        compare="chinchilla,overfitting",
        held_out="pairs",
        curves=True,
        column=("num_parameters=num_parameters",),
        parameters="with_embeddings",
        out=tmp_path / "law",
    )
    report = analyze_table(overfitting_table, settings)
    text = "\n".join(report.lines)
    assert "this form counts as new" not in text
    (exponents,) = (line for line in report.lines if "around N=" in line)
    assert float(exponents.split("U^")[1].split()[0]) == pytest.approx(0.381, abs=0.01)
    assert "held out in turn: all 48 runs, one size and data set at a time" in text
    assert "overfitting predicts the held-out runs best; worse than it: chinchilla." in text
    assert " of 6 curves; scatter of " in text
    tree = json.loads(format_json(report.tree), parse_constant=pytest.fail)
    best, *others = tree["best_epochs"]["points"]
    low, high = best["profile"]["interval"]
    assert low < 8.005 < high
    assert best["epochs"] == pytest.approx(8.005, rel=0.03)
    assert len(others) == 5  # the profiled one is one of the six
    assert all(one["interval"][0] <= one["epochs"] <= one["interval"][1] for one in others)
    low, high = tree["curves"]["law"]["parameter_exponent"]["interval"]
    assert low < 0.5525 < high
    assert [one["form"] for one in tree["comparison"]["forms"]] == ["overfitting", "chinchilla"]
    assert set(tree["comparison"]["runs"]) == {f"run-{place}" for place in range(1, 49)}
    assert {path.name for path in (tmp_path / "law").glob("*.png")} == {
        *("predictions.png", "compute.png", "epochs.png", "best_epochs.png"),
        "profile_best_epochs_0.png",
    }
    for path in (tmp_path / "law").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert read_law(tmp_path / "law" / "law.json").law.form == "overfitting"


def test_json_is_all_that_is_printed(overfitting_table, capsys):
    fit(overfitting_table, settings=FitSettings(curves=True, json=True))
    tree = json.loads(capsys.readouterr().out)
    assert tree["table"]["objective"] == "mdm"
    assert len(tree["curves"]["curves"]) == 6
    assert tree["curves"]["reason"] is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"form": None}, "Nothing is asked for: give --form"),
        ({"form": "cubic"}, "--form=cubic is not a known name.*chinchilla"),
        ({"hold": ("token_scale",)}, "--hold token_scale is not valid: give NAME=VALUE"),
        ({"hold": ["token_scale=x"]}, "--hold token_scale=x is not valid: give a number"),
        ({"fit": "speed"}, "speed is no constant of the form chinchilla: use parameter_scale"),
        ({"fit": "token_scale"}, "parameter_scale is neither fitted nor held"),
        ({"fit": "token_scale", "hold": ["token_scale=1"]}, "parameter_scale is neither"),
        ({"profile": ["token_scale=3"]}, "give NAME=LOW:HIGH"),
        ({"profile": ["token_reuse"]}, "token_reuse is no constant of the form chinchilla"),
        ({"bootstrap": -1}, "--bootstrap -1 is not valid"),
        ({"best_epochs": ("1e8,1e9",)}, "--best-epochs 1e8,1e9 needs a form whose loss has a min"),
        ({"form": "overfitting", "best_epochs": ("1e8",)}, "--best-epochs 1e8 is not valid: give"),
        ({"form": "overfitting", "best_epochs": ("0,inf",)}, "--best-epochs 0,inf is not valid"),
        ({"compare": "chinchilla"}, "--compare chinchilla is not valid: give two or more"),
        ({"compare": "chinchilla,cubic"}, "--compare=cubic is not a known name"),
        ({"form": None, "compare": "chinchilla,overfitting", "hold": ("x=1",)}, "x is no constant"),
        ({"folders": Path("runs")}, "--folders runs is for curves: give --curves with it"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(
    wishes, message, tmp_path, public_table
):
    settings = {"form": "chinchilla", "out": tmp_path / "law"} | wishes
    with pytest.raises(ConfigError, match=message):
        fit_and_report(public_table[0], FitSettings(**settings))
    assert not (tmp_path / "law").exists()


def test_a_failed_run_is_named_or_left_out(tmp_path, public_table):
    table, columns = public_table
    text = table.read_text().splitlines()
    text[3] = text[3].rsplit(",", 1)[0] + ",nan"
    (tmp_path / "runs.csv").write_text("\n".join(text))
    pairs = named("--column", columns)
    done = run_tool(str(tmp_path / "runs.csv"), *pairs, "--form", "chinchilla")
    assert done.returncode == 2
    assert "row 4: val_loss is nan, not a positive, finite number" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    lines = fit_and_report(
        tmp_path / "runs.csv",
        FitSettings(
            form="chinchilla", column=tuple(pairs[1::2]), tie_exponents=True, skip_failed=True
        ),
    )
    assert lines[0].startswith("181 runs of")
    assert lines[1] == "left out: 1 without a usable loss"
    assert any(line.startswith("chinchilla, 4 constants") for line in lines)
    assert any("runs repeat data, which this form counts as new" in line for line in lines)


def test_law_files_are_json_without_infinities(tmp_path, public_table):
    table, columns = public_table
    settings = FitSettings(
        form="data_constrained",
        hold=("parameter_reuse=inf",),
        column=tuple(f"{name}={column}" for name, column in columns.items()),
        out=tmp_path,
    )
    fit_and_report(table, settings)
    tree = json.loads((tmp_path / "law.json").read_text(), parse_constant=pytest.fail)
    assert tree["constants"]["parameter_reuse"] is None
    assert "parameter_reuse" not in tree["fitted"]
