from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mdm.config import TrainSourceConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.mixture import (
    Interleaving,
    SampleOrder,
    apportion,
    check_caps,
    count_stated_samples,
    share_visits,
)

weights = st.lists(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000), min_size=1, max_size=6
)
visit_counts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def sources(*fields) -> list[TrainSourceConfig]:
    return [TrainSourceConfig(path=f"s{index}", **given) for index, given in enumerate(fields)]


@given(st.integers(0, 10**15), weights)
def test_shares_sum_up_and_are_less_than_one_from_exact(total, weights):
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


def test_the_largest_remainders_get_the_rest():
    # Exact shares 3.5, 2.8, 0.7: the floors leave two, for 0.8 and 0.7.
    assert apportion(7, [Fraction(5), Fraction(4), Fraction(1)]) == [3, 3, 1]
    assert apportion(1, [Fraction(1), Fraction(1)]) == [1, 0]


@given(visit_counts)
def test_every_visit_comes_exactly_once_and_in_turn(visits):
    interleaving = Interleaving(visits)
    located = [interleaving.locate(position) for position in range(interleaving.total)]
    assert interleaving.total == sum(visits)
    for source, count in enumerate(visits):
        assert [number for which, number in located if which == source] == list(range(count))


@given(visit_counts)
def test_counts_are_those_of_the_positions_before(visits):
    interleaving = Interleaving(visits)
    seen = Counter()
    for position in range(interleaving.total):
        assert interleaving.count_visits(position) == [
            seen[source] for source in range(len(visits))
        ]
        seen[interleaving.locate(position)[0]] += 1
    assert interleaving.count_visits(interleaving.total) == visits


@given(visit_counts)
def test_every_prefix_holds_nearly_the_mixture(visits):
    interleaving = Interleaving(visits)
    # Each level of the tree adds at most a half, and what comes from above shrinks on the way.
    bound = Fraction(len([count for count in visits if count]) - 1, 2)
    for position in range(interleaving.total + 1):
        for source, count in enumerate(interleaving.count_visits(position)):
            exact = Fraction(position * visits[source], interleaving.total)
            assert abs(count - exact) <= min(bound, Fraction(3, 2))


def test_two_equal_sources_alternate_and_a_rare_one_is_spread():
    order = [Interleaving([3, 3]).locate(position)[0] for position in range(6)]
    assert order in ([0, 1] * 3, [1, 0] * 3)
    places = [p for p in range(100) if Interleaving([96, 4]).locate(p)[0] == 1]
    assert np.diff(places).tolist() == [25, 25, 25]


def test_a_run_of_exabytes_is_exact():
    visits = [10**17, 3 * 10**16 + 1, 7]
    interleaving = Interleaving(visits)
    assert interleaving.count_visits(interleaving.total) == visits
    source, number = interleaving.locate(interleaving.total - 1)
    assert number == visits[source] - 1


def test_without_weights_all_sources_are_seen_equally_often():
    given = sources({}, {}, {})
    assert share_visits(given, [10, 25, 7], 42 * 5) == [50, 125, 35]
    assert share_visits(given, [10, 25, 7], 21) == [5, 13, 3]  # 5, 12.5, 3.5


def test_weights_share_what_stated_epochs_leave():
    given = sources({"epochs": 2.5}, {"weight": 1}, {"weight": 3})
    assert share_visits(given, [10, 999, 5], 105) == [25, 20, 60]


def test_decimal_weights_and_epochs_are_taken_at_their_word():
    assert share_visits(sources({"weight": 0.1}, {"weight": 0.2}), [9, 9], 30) == [10, 20]
    assert share_visits(sources({"epochs": 0.1}, {}), [30, 50], 13) == [3, 10]


def test_stated_epochs_alone_give_the_length_of_the_run():
    given = sources({"epochs": 2}, {"epochs": 0.5})
    assert count_stated_samples(given, [10, 30]) == 35
    assert share_visits(given, [10, 30], 35) == [20, 15]
    assert sum(share_visits(given, [10, 30], 40)) == 40  # the last step is filled alike
    assert count_stated_samples(sources({"epochs": 2}, {}), [10, 30]) is None


def test_epochs_that_fill_the_whole_run_are_refused():
    with pytest.raises(ConfigError, match="asks for 40 windows by its epochs and the whole run"):
        share_visits(sources({"epochs": 4}, {"weight": 1}), [10, 10], 40)


def test_a_broken_cap_names_what_is_missing_and_a_run_that_fits():
    given = sources({"weight": 3, "max_epochs": 4}, {"weight": 1})
    with pytest.raises(ConfigError) as caught:
        check_caps(given, [10, 100], 80, seq_length=16, global_batch_size=8)
    message = str(caught.value)
    assert "data.train.0.max_epochs=4" in message
    assert "its 10 windows 6 times" in message
    assert f"{20 * 16} tokens are missing" in message
    assert "schedule.steps=6," in message
    check_caps(given, [10, 100], 48, seq_length=16, global_batch_size=8)
    with pytest.raises(ConfigError):
        check_caps(given, [10, 100], 56, seq_length=16, global_batch_size=8)


def test_filling_the_last_step_breaks_no_cap_of_stated_epochs():
    given = sources({"epochs": 4, "max_epochs": 4})
    check_caps(given, [10], 48, seq_length=16, global_batch_size=16)


def test_a_cap_that_no_length_keeps_gives_no_length():
    given = sources({"epochs": 2}, {"weight": 1, "max_epochs": 0.01})
    with pytest.raises(ConfigError) as caught:
        check_caps(given, [10, 10], 24, seq_length=16, global_batch_size=8)
    assert "schedule.steps" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from(["shuffle", "fixed", "shifted", "documents"]),
)
def test_the_caps_and_shares_of_any_plan_are_kept(plan, batch_size, steps, kind):
    windows = [count for count, _ in plan]
    given = sources(*({"weight": weight} for _, weight in plan))
    total = batch_size * steps
    visits = share_visits(given, windows, total)
    order = SampleOrder(visits, windows, seq_length=4, kind=kind, seed=3)
    found = order.find_visits(np.arange(total))
    for source, count in enumerate(windows):
        here = found.source_N == source
        assert here.sum() == visits[source]
        seen = Counter(
            zip(found.epoch_N[here].tolist(), found.window_N[here].tolist(), strict=True)
        )
        assert set(seen.values()) <= {1}
        whole = visits[source] // count
        for epoch in range(whole):
            assert {window for of, window in seen if of == epoch} == set(range(count))
        # Epochs come one after the other.
        assert (np.diff(found.epoch_N[here]) >= 0).all()


@given(visit_counts, st.integers(0, 2**32))
def test_the_order_of_a_source_does_not_depend_on_the_others(visits, seed):
    assume(visits[0] > 0)
    windows = [7] * len(visits)
    alone = SampleOrder([visits[0]], [7], seq_length=4, kind="shuffle", seed=seed)
    mixed = SampleOrder(visits, windows, seq_length=4, kind="shuffle", seed=seed)
    found = mixed.find_visits(np.arange(mixed.total))
    np.testing.assert_array_equal(
        found.window_N[found.source_N == 0], alone.find_visits(np.arange(visits[0])).window_N
    )


def test_positions_may_be_asked_for_in_any_grouping():
    order = SampleOrder([30, 11, 4], [5, 11, 3], seq_length=4, kind="shifted", seed=1)
    whole = np.stack(order.find_visits(np.arange(45)))
    parts = [np.stack(order.find_visits(part)) for part in np.array_split(np.arange(45), 7)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
