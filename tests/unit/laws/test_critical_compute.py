"""The critical compute: the published law's unit, laws and curves with crossings worked by hand."""

from __future__ import annotations

import math

import pytest

from megatron_mdm.config import CONVENTIONS, ModelConfig, ModelSize
from megatron_mdm.core.errors import DataError
from megatron_mdm.model.accounting import model_size
from megatron_mdm.studies.laws.critical import (
    LossCurve,
    critical_flops_of_curves,
    critical_flops_of_laws,
)
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw
from megatron_mdm.studies.laws.power_law import fit_power_law
from megatron_mdm.studies.laws.published import (
    CRITICAL_FACTOR,
    CROSSOVERS,
    MDM_SIZES_AT_FLOPS,
    critical_band,
    critical_flops,
    mdm_optimal_size,
)


def scaled(scale: float, irreducible: float) -> ChinchillaLaw:
    """Equal exponents of 1/2: the best N and D are sqrt(C / 6), L = E + 2 scale / (C / 6)^(1/4)."""
    return ChinchillaLaw(scale, scale, irreducible, 0.5, 0.5)


# AR: 2 + 200 / (C / 6)^(1/4). MDM: 1.9 + 220 / the same. Equal where 20 / x = 0.1: C = 6 * 200^4.
AR, MDM = scaled(100, 2.0), scaled(110, 1.9)
CROSSING = 6 * 200.0**4


def test_the_published_law_takes_tokens_and_gives_flops():
    assert critical_flops(unique_tokens=5e6) == pytest.approx(7.0e16, rel=0.01)
    # At 100 million it lies between the best AR run there (144.8M parameters, 50 epochs) and the
    # best MDM run (416.9M, 500 epochs).
    at_100m = critical_flops(unique_tokens=100e6)
    assert 6 * 144.8e6 * 50 * 99_952_399 < at_100m < 6 * 416.9e6 * 500 * 99_952_399
    assert at_100m == pytest.approx(2.12 * 10**1.956 * 1e8**2.174)
    with pytest.raises(TypeError):
        critical_flops(5e6)  # the unit has to be said


def test_the_published_law_is_good_to_a_factor_of_1_8_against_the_paper_s_own_crossings():
    # Digitised from its figure: 3.6e18, 1.3e19 and 2.6e19. By hand: 2.32e18, times 2^2.174 = 4.513
    # for each doubling of U.
    by_hand = {25e6: 2.32e18, 50e6: 1.047e19, 100e6: 4.725e19}
    ratios = []
    for unique, value in by_hand.items():
        assert critical_flops(unique_tokens=unique) == pytest.approx(value, rel=1e-3)
        ratios.append(abs(math.log(value / CROSSOVERS[unique])))
    assert math.exp(max(ratios)) == pytest.approx(CRITICAL_FACTOR, abs=0.05)
    assert critical_band(critical_flops(unique_tokens=25e6)) == pytest.approx(
        (2.32e18 / 1.8, 2.32e18 * 1.8), rel=1e-3
    )


def test_the_published_sizes_are_those_of_the_presets_in_both_counts():
    for (flops, size), name in zip(
        MDM_SIZES_AT_FLOPS.items(), ("dc-117M", "dc-217M", "dc-425M"), strict=True
    ):
        assert size == model_size(ModelConfig(preset=name))
        # The line passes within 2% of each, in either count of both axes.
        for parameters in CONVENTIONS:
            budget = size.convert_flops(flops, "with_embeddings", parameters)
            found = mdm_optimal_size(parameters).at(budget)
            assert found == pytest.approx(size.count_in(parameters), rel=0.02)
    # Of 1e19 FLOPs with embeddings 84,953,856 / 123,587,328 are without.
    low = ModelSize(123_587_328, 84_953_856).convert_flops(
        1e19, "with_embeddings", "without_embeddings"
    )
    assert low == pytest.approx(6.874e18, rel=1e-4)


def test_laws_cross_where_worked_by_hand():
    found = critical_flops_of_laws(AR, MDM, unique_tokens=1e20, lowest_flops=1e6)
    assert found.verdict == "crosses"
    assert found.flops == pytest.approx(CROSSING, rel=1e-6)
    assert found.interval is None


def test_repetition_alone_makes_a_crossing():
    """AR's tokens are worth nothing when repeated, MDM's all: AR needs more than all of U."""
    ar = DataConstrainedLaw(1.0, 100.0, 1.0, 0.5, 0.5, token_reuse=1e-3)
    mdm = DataConstrainedLaw(1.0, 121.0, 1.0, 0.5, 0.5)
    small, large = (
        critical_flops_of_laws(ar, mdm, unique_tokens=unique, highest_flops=1e25)
        for unique in (1e9, 1e10)
    )
    assert small.verdict == large.verdict == "crosses"
    # The term of N is a hundredth of that of D or less here; then D' = U and N = C / (6 D).
    assert 10 < large.flops / small.flops < 1000
    law = fit_power_law([1e9, 1e10], [small.flops, large.flops])
    assert law.at(1e9) == pytest.approx(small.flops)


def test_never_and_always_are_answers():
    never = critical_flops_of_laws(AR, scaled(110, 2.0), unique_tokens=1e20)
    assert (never.verdict, never.flops) == ("never", None)
    # Nor within a range that ends too early.
    early = critical_flops_of_laws(
        AR, MDM, unique_tokens=1e20, lowest_flops=1e6, highest_flops=CROSSING / 2
    )
    assert early.verdict == "never"
    tie = critical_flops_of_laws(AR, AR, unique_tokens=1e20, ar_bootstrap=[AR], mdm_bootstrap=[AR])
    assert (tie.verdict, tie.flops, tie.interval) == ("tie", None, None)
    always = critical_flops_of_laws(AR, scaled(90, 1.9), unique_tokens=1e20)
    assert (always.verdict, always.flops) == ("always", None)


def test_resamples_give_the_interval():
    # Crossings at 6 (2 d / 0.1)^4 for d = 10 + i / 10: ascending, so percentiles are by hand.
    mdms = [scaled(110 + i / 10, 1.9) for i in range(41)]
    found = critical_flops_of_laws(
        AR, MDM, unique_tokens=1e20, lowest_flops=1e6, ar_bootstrap=[AR] * 41, mdm_bootstrap=mdms
    )
    assert found.interval.low == pytest.approx(6 * (20 * 10.1) ** 4, rel=1e-5)
    assert found.interval.high == pytest.approx(6 * (20 * 13.9) ** 4, rel=1e-5)
    assert found.share_crossing == 1
    # A tenth of them never cross: the upper end is open.
    mdms[-3:] = [scaled(110, 2.0)] * 3
    open_ended = critical_flops_of_laws(
        AR, MDM, unique_tokens=1e20, lowest_flops=1e6, ar_bootstrap=[AR] * 41, mdm_bootstrap=mdms
    )
    assert open_ended.interval.high == math.inf
    assert open_ended.share_crossing == pytest.approx(38 / 41)
    with pytest.raises(DataError, match="resamples of both laws"):
        critical_flops_of_laws(AR, MDM, unique_tokens=1e20, mdm_bootstrap=mdms)


def test_budgets_out_of_range_are_refused():
    with pytest.raises(DataError, match="unique_tokens=0"):
        critical_flops_of_laws(AR, MDM, unique_tokens=0)
    with pytest.raises(DataError, match="highest_flops=10"):
        critical_flops_of_laws(AR, MDM, unique_tokens=1e9, lowest_flops=1e12, highest_flops=10)


def test_curves_cross_between_their_points():
    # In log10 of FLOPs: AR falls from 3 at 1 to 2 at 2 and stays; MDM from 4 at 1 to 1 at 4.
    ar = LossCurve([10, 100], [3.0, 2.0])
    mdm = LossCurve([10, 10_000], [4.0, 1.0])
    found = critical_flops_of_curves([(ar, mdm)])
    assert found.flops == pytest.approx(1000)  # where MDM is at 2
    assert found.interval is None
    # A loss that rises again is not the best so far.
    worse = LossCurve([10, 100, 1000], [3.0, 2.0, 9.0])
    assert critical_flops_of_curves([(worse, mdm)]).flops == pytest.approx(1000)


def test_curves_that_do_not_cross_say_so():
    low, high = LossCurve([10, 100], [2.0, 1.0]), LossCurve([10, 100], [3.0, 1.5])
    assert critical_flops_of_curves([(low, high)]).verdict == "never"
    assert critical_flops_of_curves([(high, low)]).verdict == "always"


def test_seeds_give_an_interval():
    ar = LossCurve([10, 100], [3.0, 2.0])
    # At 1e3, 1e4 and 1e5.
    mdms = [LossCurve([10, 10**k * 10], [4.0, 2 - 2 / (k - 1)]) for k in (3, 4, 5)]
    found = critical_flops_of_curves([(ar, mdm) for mdm in mdms])
    assert found.flops == pytest.approx(1e4)
    # Standard deviation of 1 in log10; t of 2 degrees at 97.5% is 4.30265.
    assert math.log10(found.interval.high) == pytest.approx(4 + 4.30265 / math.sqrt(3), rel=1e-5)
    # With seeds that never cross there is no upper end, and the median may still be known.
    never = LossCurve([10, 1e6], [4.0, 3.0])
    some = critical_flops_of_curves([(ar, mdms[0]), (ar, mdms[1]), (ar, never)])
    assert (some.flops, some.interval.high) == (pytest.approx(1e4), math.inf)
    assert some.share_crossing == pytest.approx(2 / 3)
    most = critical_flops_of_curves([(ar, mdms[0]), (ar, never), (ar, never)])
    assert (most.verdict, most.flops) == ("never", None)


def test_bad_curves_are_refused():
    good = LossCurve([10, 100], [2.0, 1.0])
    for bad in (LossCurve([], []), LossCurve([100, 10], [2.0, 1.0]),
                LossCurve([10, 100], [2.0, math.nan]), LossCurve([10], [2.0, 1.0])):  # fmt: skip
        with pytest.raises(DataError, match="The MDM curve is not valid"):
            critical_flops_of_curves([(good, bad)])
    with pytest.raises(DataError, match="at least one seed"):
        critical_flops_of_curves([])
