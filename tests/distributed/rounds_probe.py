"""Training where an optimizer gets whole parameters a few at a time, as of a large model."""

from __future__ import annotations

from cases import Overrides, train

from megatron_mdm.training import whole_parameters


def train_in_rounds(overrides: Overrides, round_elements: int) -> dict[str, list[float]]:
    """Trains with many rounds.

    Args:
        overrides: As for `cases.config_of`.
        round_elements: Of whole parameters that a rank has at a time.

    Returns:
        What `cases.train` does.
    """
    before = whole_parameters.ROUND_ELEMENTS
    whole_parameters.ROUND_ELEMENTS = round_elements
    try:
        return train(overrides)
    finally:
        whole_parameters.ROUND_ELEMENTS = before
