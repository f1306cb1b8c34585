"""The repetition ledger: how often every token of every source is seen, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
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


def repetition_ledger(
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
    for index, visits in enumerate(order.counts(samples)):
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
    header = ("source", "unique tokens", "epochs", "tokens seen", "windows x visits", "predictions")
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
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )


def format_visits(windows_by_visits: dict[int, int]) -> str:
    """Shows how the visits of a source's windows are distributed.

    Args:
        windows_by_visits: For a number of visits, how many windows.

    Returns:
        For example `120 x 3, 77 x 4`: 120 windows three times and 77 windows four times.
    """
    return ", ".join(f"{count:,} x {visits}" for visits, count in windows_by_visits.items())


def build_ledger_rows(ledger: Mapping[str, Any]) -> list[Sequence[str]]:
    """Turns what a run wrote into `ledger.json` into the cells of a table.

    Args:
        ledger: The file's content; empty where a run has left none.

    Returns:
        For each source: path, unique tokens, epochs seen (of those planned, where more are),
        tokens seen, how many windows were seen how often, and predictions per token, counted and
        expected.

    Raises:
        DataError: The file is not the ledger of a run.
    """
    if not ledger:
        return []
    try:
        pairs = zip(ledger["seen"], ledger["planned"], strict=True)
        return [_ledger_row(seen, planned) for seen, planned in pairs]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"ledger.json of the run is not a ledger ({type(error).__name__}: {error}): remove it, "
            "or let the run save a checkpoint again."
        ) from error


def _format_predictions(ledger: SourceLedger) -> str:
    if ledger.predictions_per_token is None:
        return f"{ledger.expected_predictions_per_token:.4f} a token expected"
    return f"{ledger.predictions_per_token:.4f} a token"


def _ledger_row(seen: Mapping[str, Any], planned: Mapping[str, Any]) -> Sequence[str]:
    visits = seen["windows_by_visits"].items()
    epochs, whole = f"{seen['epochs']:.4g}", f"{planned['epochs']:.4g}"
    return (
        str(seen["path"]),
        f"{seen['unique_tokens']:,}",
        epochs if epochs == whole else f"{epochs} of {whole}",
        f"{seen['tokens_seen']:,}",
        ", ".join(f"{count:,} \u00d7 {times}" for times, count in visits),
        f"{seen['predictions_per_token']:.4f}",
        f"{seen['expected_predictions_per_token']:.4f}",
    )
