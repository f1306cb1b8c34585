"""The repetition ledger: how often every token of every source is seen, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.tables import format_table
from megatron_mdm.data.loader import Batch
from megatron_mdm.data.mixture import SampleOrder


@dataclass(frozen=True)
class SourceLedger:
    """What a run sees of one source up to some step.

    Attributes:
        path: The source.
        unique_tokens: Tokens that a pass shows: windows times their length.
        num_windows: Windows of a pass.
        visits: Windows shown, with repetition.
        tokens_seen: Tokens shown, with repetition.
        epochs: Passes over the source, visits / windows.
        windows_by_visits: For a number of visits, how many windows have been shown so often.
        expected_predictions_per_token: Times that a token is expected to be predicted: the visits
            times the share of a window that the objective predicts (for masked diffusion, masks).
        predictions: Predictions counted in training, None before it.
    """

    path: str
    unique_tokens: int
    num_windows: int
    visits: int
    tokens_seen: int
    epochs: float
    windows_by_visits: dict[int, int]
    expected_predictions_per_token: float
    predictions: int | None = None

    @property
    def predictions_per_token(self) -> float | None:
        """Predictions counted in training over unique tokens."""
        return None if self.predictions is None else self.predictions / self.unique_tokens

    def as_record(self) -> dict[str, Any]:
        """The ledger of the source for a JSON file.

        Returns:
            All fields and `predictions_per_token`, with text as keys.
        """
        record = {**asdict(self), "predictions_per_token": self.predictions_per_token}
        record["windows_by_visits"] = {
            str(visits): windows for visits, windows in self.windows_by_visits.items()
        }
        return record


def count_repetition(
    paths: Sequence[str],
    order: SampleOrder,
    samples: int,
    *,
    seq_length: int,
    predicted_shares: Sequence[float],
    predictions: Sequence[int] | None = None,
) -> list[SourceLedger]:
    """Counts what the first samples of a run show. Takes constant time.

    Args:
        paths: The sources.
        order: The run's global sample order.
        samples: Samples shown, in 0..order.total.
        seq_length: Tokens per window.
        predicted_shares: Expected share of a window's tokens that are predicted, of each source.
        predictions: Predictions counted in training for each source.

    Returns:
        The ledger of each source.
    """
    ledgers = []
    for index, visits in enumerate(order.count_visits(samples)):
        windows = order.windows[index]
        # Passes are whole, so a window has been shown in each finished one and perhaps once more.
        passes, begun = divmod(visits, windows)
        by_visits = {passes: windows - begun, passes + 1: begun}
        ledgers.append(
            SourceLedger(
                path=paths[index],
                unique_tokens=windows * seq_length,
                num_windows=windows,
                visits=visits,
                tokens_seen=visits * seq_length,
                epochs=visits / windows,
                windows_by_visits={times: count for times, count in by_visits.items() if count},
                expected_predictions_per_token=visits / windows * predicted_shares[index],
                predictions=None if predictions is None else predictions[index],
            )
        )
    return ledgers


def count_predictions(batches: Sequence[Batch], num_sources: int) -> NDArray[np.int64]:
    """Counts the predicted tokens of batches by source.

    Args:
        batches: Training batches.
        num_sources: Sources of the run.

    Returns:
        int64 [num_sources].
    """
    counts = np.zeros(num_sources, dtype=np.int64)
    for batch in batches:
        if batch.sources_B is not None:
            np.add.at(counts, batch.sources_B, np.count_nonzero(batch.weights_BS, axis=1))
    return counts


def format_ledger(ledgers: Sequence[SourceLedger]) -> str:
    """Shows a ledger as a table of text.

    Args:
        ledgers: At least one source.

    Returns:
        Lines: a header, then one per source.
    """
    heads = ("source", "unique tokens", "epochs", "tokens seen", "windows x visits", "predictions")
    rows = [
        (
            ledger.path,
            f"{ledger.unique_tokens:,}",
            f"{ledger.epochs:.4f}",
            f"{ledger.tokens_seen:,}",
            format_visits(ledger.windows_by_visits),
            _format_predictions(ledger),
        )
        for ledger in ledgers
    ]
    return "\n".join(format_table(heads, rows, left=(0, 4)))


def format_visits(windows_by_visits: dict[int, int]) -> str:
    """Shows how the visits of a source's windows are distributed.

    Args:
        windows_by_visits: For a number of visits, how many windows.

    Returns:
        For example `120 x 3, 77 x 4`: 120 windows three times and 77 windows four times.
    """
    return ", ".join(f"{count:,} x {visits}" for visits, count in windows_by_visits.items())


def _format_predictions(ledger: SourceLedger) -> str:
    if ledger.predictions_per_token is None:
        return f"{ledger.expected_predictions_per_token:.4f} per token expected"
    return f"{ledger.predictions_per_token:.4f} per token"
