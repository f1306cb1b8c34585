"""Which tokens see which: what an objective asks of attention, whatever kernel computes it.

Within its document, and within a sample's length, a query sees the keys that stand at most `reach`
places after it and for which `pair` holds. Without a rule for pairs, kernels that take no mask use
the reach alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# From indices of sequence, head, query and key to whether the query sees the key.
PairRule = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
ModelTensors = Mapping[str, "Tensor"]


class FullAttention:
    """Every token sees all others: masked diffusion. Other rules derive from this one.

    Attributes:
        is_causal: Does a query see no key after it, at any step? Kernels have a fast path for that.
    """

    is_causal = False

    def step_inputs(self, step: int, seq_length: int) -> dict[str, int]:
        """Model inputs that depend on the step of training alone.

        Args:
            step: Optimizer step, from 0.
            seq_length: Tokens of a window, S.

        Returns:
            Numbers by name, each of which the model gets as an int64 scalar.
        """
        del step, seq_length
        return {}

    def reach(self, model_inputs: ModelTensors) -> Tensor | int | None:
        """How many places after itself a query may see.

        Args:
            model_inputs: Of the batch, and of the step while the model trains.

        Returns:
            0 for causal attention; an int64 scalar where it changes with steps; None: all.
        """
        del model_inputs
        return None

    def pair(self, model_inputs: ModelTensors, seq_length: int) -> PairRule | None:
        """What else decides whether a query sees a key; a token has to see itself.

        Args:
            model_inputs: As for `reach`.
            seq_length: Tokens of a window, S.

        Returns:
            The rule, which holds tensors and nothing else, so that a compiled kernel serves every
            batch; None: nothing.
        """
        del model_inputs, seq_length
        return None


FULL_ATTENTION = FullAttention()


class CausalAttention(FullAttention):
    """Every token sees itself and what stands before it: AR."""

    is_causal = True

    def reach(self, model_inputs: ModelTensors) -> Tensor | int | None:
        """0, at every step."""
        del model_inputs
        return 0


CAUSAL_ATTENTION = CausalAttention()
