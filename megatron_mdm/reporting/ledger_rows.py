"""The ledger that a run leaves, as the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mdm.core.errors import DataError


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
        return [_build_ledger_row(seen, planned) for seen, planned in pairs]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"ledger.json of the run is not a ledger ({type(error).__name__}: {error}): remove it, "
            "or let the run save a checkpoint again."
        ) from error


def _build_ledger_row(seen: Mapping[str, Any], planned: Mapping[str, Any]) -> Sequence[str]:
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
