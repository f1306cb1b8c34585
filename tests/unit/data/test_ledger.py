from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_objectives import build_objective

from megatron_mdm.config import TrainSourceConfig
from megatron_mdm.data.ledger import count_predictions, count_repetition, format_ledger
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.mixture import SampleOrder, share_visits
from megatron_mdm.diffusion.samples import TextWindow

SEQ, MASK = 8, 9_999


class NamedWindows:
    """Every token of a window names its source and its place in the stream."""

    def __init__(self, source: int, num_windows: int) -> None:
        self.source, self.num_windows = source, num_windows

    def read_window(self, window, shift=0, document_key=None) -> TextWindow:
        size = self.num_windows * SEQ
        return TextWindow(1000 * self.source + (window * SEQ + shift + np.arange(SEQ)) % size)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 12)),
    st.sampled_from(["shuffle", "fixed", "shifted", "documents"]),
    st.data(),
)
def test_the_ledger_equals_a_recount_of_what_all_ranks_were_given(plan, layout, kind, data):
    micro, replicas, num_micro, steps = layout
    batch = micro * replicas * num_micro
    windows = [count for count, _ in plan]
    given = [TrainSourceConfig(path=f"s{i}", weight=w) for i, (_, w) in enumerate(plan)]
    visits = share_visits(given, windows, batch * steps)
    order = SampleOrder(visits, windows, seq_length=SEQ, kind=kind, seed=5)
    objective = build_objective(seed=5, global_batch_size=batch, mask_token_id=MASK)
    stop = data.draw(st.integers(0, steps))

    tokens, predicted, shown = Counter(), Counter(), Counter()
    counted = np.zeros(len(windows), dtype=np.int64)
    for rank in range(replicas):
        batches = TrainingBatches(
            [NamedWindows(source, count) for source, count in enumerate(windows)],
            order,
            objective,
            global_batch_size=batch,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=replicas,
        )
        for step in range(stop):
            made = batches.read_step(step)
            counted += count_predictions(made, len(windows))
            for one in made:
                for row in range(micro):
                    source = int(one.targets_BS[row, 0]) // 1000
                    tokens[source] += SEQ
                    predicted[source] += int((one.inputs_BS[row] == MASK).sum())
                    shown.update((source, int(token)) for token in one.targets_BS[row])

    ledgers = count_repetition(
        [source.path for source in given],
        order,
        stop * batch,
        seq_length=SEQ,
        predicted_shares=[0.5] * len(given),
        predictions=counted.tolist(),
    )
    for source, ledger in enumerate(ledgers):
        assert ledger.tokens_seen == tokens[source]
        assert ledger.unique_tokens == windows[source] * SEQ
        assert ledger.predictions == predicted[source]
        assert ledger.epochs == ledger.visits / windows[source]
        # The whole stream is a multiple of the window here, so any shift shows each token once.
        times = Counter(
            shown[source, 1000 * source + place] for place in range(windows[source] * SEQ)
        )
        assert {times_: count / SEQ for times_, count in times.items()} == ledger.windows_by_visits


def ledgers_of(samples: int, predictions=None):
    order = SampleOrder([50, 150], [20, 100], seq_length=SEQ, kind="shuffle", seed=0)
    return count_repetition(
        ["web", "code"],
        order,
        samples,
        seq_length=SEQ,
        predicted_shares=[0.25, 0.25],
        predictions=predictions,
    )


def test_visits_are_distributed_over_whole_passes_and_a_begun_one():
    web, code = ledgers_of(200)
    assert (web.visits, web.epochs, web.windows_by_visits) == (50, 2.5, {2: 10, 3: 10})
    assert (code.visits, code.epochs, code.windows_by_visits) == (150, 1.5, {1: 50, 2: 50})
    assert web.expected_predictions_per_token == 2.5 * 0.25
    assert ledgers_of(0)[0].windows_by_visits == {0: 20}


def test_a_ledger_can_be_kept_as_json():
    record = ledgers_of(200, [400, 0])[0].as_record()
    assert json.loads(json.dumps(record))["windows_by_visits"] == {"2": 10, "3": 10}
    assert record["predictions_per_token"] == 400 / (20 * SEQ)


def test_the_table_shows_every_source():
    lines = format_ledger(ledgers_of(200)).splitlines()
    assert lines[0].split()[0] == "source"
    assert lines[1].split()[:4] == ["web", "160", "2.5000", "400"]
    assert "10 x 2, 10 x 3" in lines[1]
    assert lines[1].endswith("0.6250 per token expected")
    assert format_ledger(ledgers_of(200, [400, 0])).splitlines()[1].endswith("2.5000 per token")


def test_the_ledger_of_a_trillion_tokens_takes_no_time():
    order = SampleOrder([10**11], [10**9], seq_length=1000, kind="shuffle", seed=0)
    (ledger,) = count_repetition(
        ["web"], order, 10**11 - 1, seq_length=1000, predicted_shares=[0.5]
    )
    assert ledger.windows_by_visits == {99: 1, 100: 10**9 - 1}
    assert ledger.epochs == pytest.approx(100)
