"""Best epochs read off curves: exact ones, paired windows, what is open, and the power law."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.laws.epoch_curves import (
    EpochCurve,
    find_minima,
    gather_table_curves,
    read_folder_curves,
)
from megatron_mdm.studies.laws.epochs_law import fit_epochs_law
from megatron_mdm.studies.laws.overfitting import OverfittingLaw
from megatron_mdm.studies.laws.runs import Runs, RunsTable

LAW = OverfittingLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.0233, 1.0, 1.5)
EXPONENTS = OverfittingLaw.best_epochs_exponents(np.array(LAW.values()), 1e8, 1e9)
EPOCHS = np.arange(1.0, 41.0)


def make_curve(
    parameters: float, unique: float, rng: np.random.Generator | None = None, epochs=EPOCHS
) -> EpochCurve:
    """Windows that differ by half a nat, and by how fast they are learned, with little noise."""
    place = {"num_parameters": parameters, "unique_tokens": unique}
    losses = LAW.loss(**place, num_tokens=unique * epochs)
    if rng is None:
        return EpochCurve("exact", parameters, unique, epochs, losses)
    hard, slope = 0.5 * rng.standard_normal(200), 0.05 * rng.standard_normal(200)
    windows = losses[:, None] + hard + slope * np.log(epochs)[:, None]
    windows += 0.02 * rng.standard_normal(windows.shape)
    return EpochCurve("noisy", parameters, unique, epochs, windows.mean(1), windows, np.arange(200))


def test_a_parabola_has_its_own_lowest_point():
    epochs = np.array([2.0, 4.0, 8.0, 16.0])
    losses = 3 + 0.1 * (np.log(epochs) - math.log(7)) ** 2
    (found,) = find_minima([EpochCurve("parabola", 1e8, 1e9, epochs, losses)])
    assert found.epochs == pytest.approx(7, rel=1e-9)
    assert found.loss == pytest.approx(3, rel=1e-12)
    assert found.interval == pytest.approx((7, 7), rel=1e-6)
    assert found.is_found


@pytest.mark.parametrize("place", [(2e8, 1e9), (5e8, 3e9), (1e8, 1e9)])
def test_the_minimum_of_an_exact_curve_is_that_of_its_law(place):
    (found,) = find_minima([make_curve(*place)])
    best = LAW.best_epochs(num_parameters=place[0], unique_tokens=place[1])
    assert found.epochs == pytest.approx(float(best), rel=0.03)


def test_intervals_over_windows_cover_and_pairing_is_what_makes_them_narrow():
    rng = np.random.default_rng(0)
    best = float(LAW.best_epochs(num_parameters=2e8, unique_tokens=3e9))
    covered = 0
    for _ in range(40):
        (found,) = find_minima([make_curve(2e8, 3e9, rng)])
        covered += found.interval.low <= best <= found.interval.high
    assert covered >= int(binom.ppf(0.001, 40, 0.95))
    # The same windows in another order at each validation: what they have in common is lost.
    curve = found.curve
    mixed = np.stack([rng.permutation(row) for row in curve.windows_KN])
    (unpaired,) = find_minima([replace(curve, windows_KN=mixed)])
    assert unpaired.epochs == pytest.approx(found.epochs, rel=1e-9)
    assert unpaired.log_error > 8 * found.log_error


def test_the_error_is_that_of_other_windows():
    """The spread of the lowest places over many draws of windows is the error that one gives."""
    rng = np.random.default_rng(1)
    found = [find_minima([make_curve(2e8, 1e9, rng)])[0] for _ in range(60)]
    spread = float(np.std([math.log(one.epochs) for one in found], ddof=1))
    typical = float(np.median([one.log_error for one in found]))
    assert spread == pytest.approx(typical, rel=0.35)


def test_windows_of_a_document_count_once():
    rng = np.random.default_rng(2)
    curve = make_curve(2e8, 1e9, rng)
    (alone,) = find_minima([curve])
    doubled = EpochCurve(
        "doubled", 2e8, 1e9, curve.epochs, curve.losses,
        np.repeat(curve.windows_KN, 2, axis=1), np.repeat(np.arange(200), 2),
    )  # fmt: skip
    (found,) = find_minima([doubled])
    assert found.epochs == pytest.approx(alone.epochs)
    assert found.log_error == pytest.approx(alone.log_error, rel=0.02)


def test_curves_that_fall_to_their_end_or_hardly_rise_are_open_above():
    falling = make_curve(2e8, 1e9, epochs=np.arange(1.0, 9.0))
    rng = np.random.default_rng(3)
    epochs = np.geomspace(2, 40, 8)
    flat = 3 + 1e-4 * (np.log(epochs) - math.log(12)) ** 2 + 1e-3 * rng.standard_normal(8)
    rising = EpochCurve("rising", 1e8, 1e9, epochs, 3 + 0.1 * np.log(epochs))
    one, two, three = find_minima([falling, EpochCurve("flat", 1e8, 1e9, epochs, flat), rising])
    assert (one.epochs, one.interval) == (None, (8.0, math.inf))
    assert two.interval is None or two.interval.high == math.inf
    assert (three.epochs, three.interval) == (None, (0.0, 2.0))
    assert not any(found.is_found for found in (one, two, three))


def test_the_power_law_of_best_epochs_is_found_again():
    places = [(n, u) for n in (1e8, 2e8, 4e8) for u in (5e8, 1e9, 2e9)]
    epochs = np.geomspace(1, 60, 80)
    exact = fit_epochs_law(find_minima([make_curve(*one, epochs=epochs) for one in places]))
    assert exact.unique_exponent.value == pytest.approx(EXPONENTS[0], abs=0.01)
    assert exact.parameter_exponent.value == pytest.approx(EXPONENTS[1], abs=0.01)
    best = LAW.best_epochs(num_parameters=2e8, unique_tokens=1e9)
    place = {"num_parameters": 2e8, "unique_tokens": 1e9}
    assert exact.at(**place) == pytest.approx(float(best), rel=0.03)
    covered = np.zeros(2)
    for seed in range(15):
        rng = np.random.default_rng(seed)
        law = fit_epochs_law(find_minima([make_curve(*one, rng) for one in places]))
        for index, one in enumerate((law.unique_exponent, law.parameter_exponent)):
            covered[index] += one.interval.low <= EXPONENTS[index] <= one.interval.high
    assert covered.min() >= int(binom.ppf(0.001, 15, 0.95))


def test_scatter_of_seeds_beyond_the_errors_widens_the_intervals():
    rng = np.random.default_rng(0)
    curves = []
    for n in (1e8, 2e8, 4e8, 8e8):
        for u in (5e8, 2e9):
            curve = make_curve(n, u)
            moved = curve.epochs * math.exp(0.1 * rng.standard_normal())
            curves.append(EpochCurve("seed", n, u, moved, curve.losses))
    law = fit_epochs_law(find_minima(curves))
    assert 0.03 < law.scatter < 0.25
    low, high = law.parameter_exponent.interval
    assert low < EXPONENTS[1] < high
    assert high - low > 0.05


def test_one_size_tells_one_exponent_and_equal_steps_none():
    minima = find_minima([make_curve(2e8, u) for u in (5e8, 1e9, 2e9)])
    law = fit_epochs_law(minima)
    assert law.parameter_exponent is None
    assert law.unique_exponent.value == pytest.approx(EXPONENTS[0], abs=0.03)
    together = find_minima([make_curve(u / 5, u) for u in (5e8, 1e9, 2e9)])
    with pytest.raises(DataError, match="U and N of the curves that show a minimum move together"):
        fit_epochs_law(together)
    with pytest.raises(DataError, match="1 of 2 curves show a minimum, too few"):
        fit_epochs_law(find_minima([make_curve(2e8, 1e9), make_curve(2e8, 1e9, epochs=EPOCHS[:6])]))


def test_runs_of_one_size_and_data_set_are_a_curve():
    epochs = np.array([16.0, 1, 4, 8, 32, 1])
    n = np.array([2e8] * 5 + [9e8])
    losses = LAW.loss(num_parameters=n, num_tokens=1e9 * epochs, unique_tokens=1e9)
    runs = Runs(n, 1e9 * epochs, np.full(6, 1e9), losses)
    table = RunsTable(runs, tuple("abcdef"), {}, None)
    (curve,) = gather_table_curves(table)
    assert curve.epochs.tolist() == [1, 4, 8, 16, 32]
    assert (curve.num_parameters, curve.unique_tokens) == (2e8, 1e9)
    few = RunsTable(runs.take(np.array([0, 1, 5])), ("a", "b", "f"), {}, None)
    with pytest.raises(DataError, match="No size has runs of three different numbers of epochs"):
        gather_table_curves(few)


def write_run(folder: Path, curve: EpochCurve, name: str = "windows-1") -> None:
    folder.mkdir(parents=True)
    metrics, judged = [], []
    for step, (epoch, loss) in enumerate(zip(curve.epochs, curve.losses, strict=True), start=1):
        metrics.append({"step": step, "train/loss_nats_per_token": 1.0})
        # What AR does not predict is dearer: the curve is of what both do.
        metrics.append(
            {
                "step": step,
                "epoch": epoch,
                "valid/nll_nats_per_token": loss + 1,
                "valid/nll_given_first_nats_per_token": loss,
            }
        )
        windows = curve.windows_KN[step - 1].tolist()
        judged.append(
            {
                "step": step,
                "windows": name,
                "noise_seed": None,
                "draws_per_sample": 1,
                "documents": list(range(len(windows))),
                "nll_nats_per_token": [one + 1 for one in windows],
                "nll_given_first_nats_per_token": windows,
            }
        )
    for file, records in (("metrics.jsonl", metrics), ("validations.jsonl", judged)):
        (folder / file).write_text("".join(json.dumps(one) + "\n" for one in records))


def test_validations_of_runs_are_read_with_their_windows(tmp_path):
    rng = np.random.default_rng(0)
    made = {"a": make_curve(2e8, 1e9, rng), "b": make_curve(4e8, 1e9, rng)}
    for name, curve in made.items():
        write_run(tmp_path / name, curve)
    runs = Runs(np.array([2e8, 4e8]), np.full(2, 4e10), np.full(2, 1e9), np.array([3.0, 3.0]))
    table = RunsTable(runs, ("a", "b"), {}, None)
    for read, curve in zip(read_folder_curves(table, tmp_path), made.values(), strict=True):
        np.testing.assert_allclose(read.losses, curve.losses)
        np.testing.assert_allclose(read.windows_KN, curve.windows_KN)
        assert find_minima([read])[0].epochs == pytest.approx(find_minima([curve])[0].epochs)
    # Validations on other windows are no curve of differences.
    lines = (tmp_path / "a" / "validations.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("windows-1", "windows-2")
    (tmp_path / "a" / "validations.jsonl").write_text("\n".join(lines) + "\n")
    assert read_folder_curves(table, tmp_path)[0].windows_KN is None
    with pytest.raises(DataError, match="is not a directory: give the directory of a run"):
        read_folder_curves(table, tmp_path / "a")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="b has no finite held-out loss with its epoch"):
        read_folder_curves(table, tmp_path)
