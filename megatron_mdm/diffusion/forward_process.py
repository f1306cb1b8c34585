"""Forward processes: how a text is corrupted at a time, and how one step back is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.objective import RunFacts
from megatron_mdm.core.registry import Registry
from megatron_mdm.diffusion.interpolation import Interpolation
from megatron_mdm.diffusion.noise import FloatArray, IntArray


class Corruption(NamedTuple):
    """A corrupted text.

    Attributes:
        xt_L: int64 [L], tokens that the model sees.
        weights_L: float64 [L], weight of the loss at each token, such that the weighted losses, of
            which the cross-entropy is one, sum to a bound on the text's negative log-likelihood in
            nats.
        loss_inputs: What else the loss needs of each token, by name: float64 [L].
        model_inputs: What else the model is told of the text, by name: float32 [1]. `log_snr`: of
            the noise, for models with `model.time_embedding`.
    """

    xt_L: IntArray
    weights_L: FloatArray
    loss_inputs: Mapping[str, FloatArray] = MappingProxyType({})
    model_inputs: Mapping[str, NDArray[np.float32]] = MappingProxyType({})


class ForwardProcess(ABC):
    """How tokens are corrupted. Pure functions of the text, the time and uniform draws.

    Attributes:
        uniforms_per_token: Draws from U[0, 1) that a token takes.
        uses_mask_token: Is there a token in what the model sees that text must not hold?
    """

    uniforms_per_token: ClassVar[int] = 1
    uses_mask_token: ClassVar[bool] = True

    @abstractmethod
    def corrupt(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Corrupts a text, to be trained on.

        Args:
            x0_L: Clean tokens, int64 [L].
            t: Time in (0, 1], uniform over samples.
            uniforms_N: float64 [uniforms_per_token * L].

        Returns:
            What the model sees, and weights.
        """

    def corrupt_held_out(self, x0_L: IntArray, t: float, uniforms_N: FloatArray) -> Corruption:
        """Corrupts a text, to be judged on: the same expectation, less variance where possible."""
        return self.corrupt(x0_L, t, uniforms_N)

    @abstractmethod
    def mean_share(self) -> float:
        """Mean share of a long text's tokens whose weight is not 0."""

    def mean_count(self, length: float) -> float:
        """Mean number of a text's tokens whose weight is not 0, of `length`."""
        return self.mean_share() * length

    @abstractmethod
    def draw_prior(self, uniforms_L: FloatArray) -> IntArray:
        """Draws a text at time 1, which tells nothing of the clean one.

        Args:
            uniforms_L: float64 [L].

        Returns:
            Tokens, int64 [L].
        """

    @abstractmethod
    def step_back(
        self,
        xt_L: IntArray,
        probabilities_LV: NDArray[np.float64],
        t: float,
        s: float,
        uniforms_N: FloatArray,
    ) -> IntArray:
        """Draws the text at an earlier time, given what the model says of the clean one.

        Args:
            xt_L: Tokens at time t, int64 [L].
            probabilities_LV: Of each clean token, float64 [L, V]; 0 for what is no text.
            t: Time in (0, 1].
            s: Earlier time, in [0, t); at 0 the text is clean.
            uniforms_N: float64 [2 * L]: one draw decides whether a token changes, one what it
                becomes.

        Returns:
            Tokens at time s, int64 [L].
        """


class ForwardProcessConfig(Component):
    """Section of a forward process.

    Attributes:
        hides_tokens: Does a model of it unmask mask tokens, as exports and generation have it do?
        loss_head: The kind of loss head whose weighted losses are its bound.
    """

    hides_tokens: ClassVar[bool] = False
    loss_head: ClassVar[str] = "cross_entropy"

    def find_noise(self, num_tokens: int) -> Interpolation | None:
        """The noise for so many tokens of text, where exports and generation take that back."""
        del num_tokens
        return None

    @property
    def remark(self) -> str | None:
        """What a reader of the run's losses has to know, in a sentence."""
        return None

    def build(self, run: RunFacts) -> ForwardProcess:
        """Makes the process of a run."""
        raise NotImplementedError


PROCESSES = Registry(
    "a forward process",
    ForwardProcessConfig,
    {
        "absorbing": "megatron_mdm.diffusion.absorbing:AbsorbingConfig",
        "hybrid": "megatron_mdm.diffusion.interpolating:HybridConfig",
        "uniform": "megatron_mdm.diffusion.interpolating:UniformConfig",
    },
)
CHOSEN_PROCESS = ChosenFrom(PROCESSES, "objective.process", "absorbing")


def draw_tokens(probabilities_LV: NDArray[np.float64], uniforms_L: FloatArray) -> IntArray:
    """Draws a token of each distribution.

    Args:
        probabilities_LV: float64 [L, V]; each row sums to 1.
        uniforms_L: float64 [L], from U[0, 1).

    Returns:
        int64 [L].
    """
    sums_LV = np.cumsum(probabilities_LV, axis=1)
    # Rounding may leave the last sum below 1, and a draw that is scaled by it equal to it.
    drawn_L = (uniforms_L[:, None] * sums_LV[:, -1:] >= sums_LV).sum(axis=1)
    last: IntArray = np.minimum(drawn_L, probabilities_LV.shape[1] - 1)
    return last
