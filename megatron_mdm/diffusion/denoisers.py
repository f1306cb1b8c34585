"""What a sampler asks of a model: logits, of all positions or of those that a step needs.

The file travels with every Hugging Face export, so it imports nothing of ours.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Window(NamedTuple):
    """What has changed since the pass before.

    Attributes:
        start: First column that the current block may change.
        stop: The column after the last one.
        step: Passes since the block began. At 0 anything may have changed, later only the window.
    """

    start: int
    stop: int
    step: int


Denoiser = Callable[[Tensor], Tensor]
"""Maps tokens [B, S] (int64, with mask tokens) to logits [B, S, V]; padding is its own affair."""


@runtime_checkable
class WindowedDenoiser(Protocol):
    """A denoiser that computes only what a step needs, and may reuse what it has computed."""

    def logits_at(self, x_BS: Tensor, needed_BS: Tensor, window: Window) -> Tensor:
        """Logits [T, V] of the T needed positions, sequence by sequence, from left to right."""
        ...


@runtime_checkable
class GuidedDenoiser(Protocol):
    """A windowed denoiser that combines the two passes of guidance before its output layer.

    The layer is linear, so the logits are the same but for rounding, at half the work in it.
    """

    def guided_logits_at(
        self, x_2BS: Tensor, needed_2BS: Tensor, window: Window, guidance_scale: float
    ) -> Tensor:
        """Guided logits [T, V]; the first B sequences saw the prompt, the others did not."""
        ...


def needed_logits(
    denoiser: Denoiser | WindowedDenoiser, x_BS: Tensor, needed_BS: Tensor, window: Window
) -> Tensor:
    """Asks for the logits of some positions.

    Args:
        denoiser: Of either kind.
        x_BS: Tokens [B, S], int64.
        needed_BS: Bool [B, S], T of them True.
        window: What has changed since the pass before.

    Returns:
        float [T, V].
    """
    if isinstance(denoiser, WindowedDenoiser):
        return denoiser.logits_at(x_BS, needed_BS, window)
    return denoiser(x_BS)[needed_BS]


def next_logits(denoiser: Denoiser | WindowedDenoiser, x_BS: Tensor, window: Window) -> Tensor:
    """Asks a causal model for the logits of the token at column `window.stop`.

    Args:
        denoiser: Of either kind.
        x_BS: Tokens [B, S], int64; those from column `window.stop` on do not count.
        window: What has changed since the pass before.

    Returns:
        float [B, V].
    """
    if isinstance(denoiser, WindowedDenoiser):
        needed_BS = torch.zeros_like(x_BS, dtype=torch.bool)
        needed_BS[:, window.stop - 1] = True
        return denoiser.logits_at(x_BS, needed_BS, window)
    return denoiser(x_BS[:, : window.stop])[:, -1]
