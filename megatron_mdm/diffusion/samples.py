"""Samples: what a window of text becomes before a model sees it.

Every objective makes `Sample`s, so the trainer does not know which objective it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import DataError
from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, FullAttention
from megatron_mdm.diffusion.forward_process import Corruption
from megatron_mdm.diffusion.noise import FloatArray, IntArray

SegmentArray = NDArray[np.int32]
ModelInputs = Mapping[str, NDArray[Any]]

# Model inputs that the model itself knows. Others are for the attention rule of an objective.
SEGMENT_IDS = "segment_ids"
POSITION_IDS = "position_ids"
BLOCK_SCALES = "block_scales"
LOG_SNR = "log_snr"
_NOTHING: ModelInputs = MappingProxyType({})


class PromptResponseSpan(NamedTuple):
    """A prompt and the response to it, as places in a window.

    Attributes:
        start: The first token of the prompt.
        response: The first token of the response.
        learned_stop: One past the last token that is learned.
        stop: One past the last token that the pair sees.
    """

    start: int
    response: int
    learned_stop: int
    stop: int


class TextWindow(NamedTuple):
    """What the data path reads.

    Attributes:
        tokens_S: int64 [S], clean tokens.
        segment_ids_S: int32 [S], number of each token's document within the window; attention does
            not cross documents. None: attention spans the window.
        pairs: Prompts and responses, one after the other; none in pre-training.
        pairs_per_window: How many a window of this source holds on average.
    """

    tokens_S: IntArray
    segment_ids_S: SegmentArray | None = None
    pairs: tuple[PromptResponseSpan, ...] = ()
    pairs_per_window: float = 1.0


class Sample(NamedTuple):
    """What one sample contributes to a step.

    Attributes:
        inputs_S: int64 [S], tokens that the model sees.
        targets_S: int64 [S], tokens that it should predict.
        weights_S: float32 [S]; `sum(weights * cross_entropy)` is the loss in nats per token.
        length: Tokens that count; the rest of the window is neither attended to nor predicted.
        model_inputs: Further inputs of the model, by name; loader, batch and engine pass them on
            unread. `segment_ids`: int32 [S], equal for tokens that see each other.
            `position_ids`: int64 [S], where in the text each token stands. `block_scales`: float32
            [layers], what each layer's change of the residual stream is multiplied with.
            `log_snr`: float32 [1], of the noise; [S] in a window of several texts, each with noise
            of its own.
        loss_inputs: What else the loss head needs of each position, by name, float32 [S]; passed
            on unread too.
        attention: Which tokens see which, the same object for all samples of a micro batch; None:
            as the objective says.
    """

    inputs_S: IntArray
    targets_S: IntArray
    weights_S: NDArray[np.float32]
    length: int
    model_inputs: ModelInputs = _NOTHING
    loss_inputs: ModelInputs = _NOTHING
    attention: FullAttention | None = None


# The tokens of a held-out loss: all that the objective predicts (nll), or those that AR predicts
# too, all but the first of each text (nll_given_first).
LossKind = Literal["nll", "nll_given_first"]


class HeldOutDraw(Protocol):
    """Noise of a held-out sample: always the same for the same sample."""

    @property
    def time(self) -> float:
        """In (0, 1], stratified over all draws."""
        ...

    def uniforms(self, size: int) -> FloatArray:
        """Independent draws from U[0, 1), float64 [size]."""
        ...


class Objective(ABC):
    """What is learned of windows: pure functions of the window and of noise.

    Attributes:
        has_noise: Does a held-out loss depend on draws of noise?
        loss_kinds: Held-out losses; the first is the objective's own, the last is compared with
            other objectives.
    """

    has_noise: ClassVar[bool] = False
    loss_kinds: ClassVar[tuple[LossKind, ...]] = ("nll",)

    @property
    def attention(self) -> FullAttention:
        """Which tokens see which."""
        return FULL_ATTENTION

    @property
    def causal_share(self) -> float:
        """Share of samples whose attention is causal."""
        return float(self.attention.is_causal)

    @property
    def judges(self) -> Mapping[str, Objective]:
        """Objectives that judge held-out windows, by name; the first gives the run's own loss."""
        return {"own": self}

    @property
    def uses_mask_token(self) -> bool:
        """Do its inputs hold a mask token, which text must not hold?"""
        return False

    @property
    def repeats_noise(self) -> bool:
        """Is the noise of a window keyed by its number among all, the same at each visit?"""
        return False

    @abstractmethod
    def sample(self, window: TextWindow, position: int) -> Sample:
        """Prepares the sample at a position of the global order.

        Args:
            window: Clean tokens, and perhaps their documents or pairs.
            position: From 0; the key of all draws.

        Returns:
            The sample.

        Raises:
            DataError: The window holds what cannot be learned.
        """

    @abstractmethod
    def held_out_sample(self, window: TextWindow, kind: LossKind, draw: HeldOutDraw) -> Sample:
        """Prepares a held-out sample, whose only randomness is the draw.

        Args:
            window: As for `sample`.
            kind: One of `loss_kinds`.
            draw: Noise.

        Returns:
            The sample; weights are 0 where nothing is predicted.
        """

    @abstractmethod
    def count_predictions(self, window: TextWindow) -> int:
        """Number of tokens in the objective's own held-out loss."""

    @abstractmethod
    def predicted_share(self, seq_length: int, learned_share: float = 1.0) -> float:
        """Expected share of a window's positions whose logits the loss needs.

        Args:
            seq_length: Tokens of a window, S.
            learned_share: Share of tokens that are learned, below 1 where responses alone are.
        """

    def mean_length(self, seq_length: int) -> float:
        """Expected number of tokens of a sample that count, of the S of a window."""
        return seq_length


def refuse_mask_token(tokens_S: IntArray, mask_token_id: int, position: int) -> None:
    """Refuses a window that holds the mask token, which nothing can predict.

    Args:
        tokens_S: Clean tokens, int64 [S].
        mask_token_id: Input id that hides a token.
        position: Place in the global order, for the message.

    Raises:
        DataError: It is there.
    """
    if (tokens_S == mask_token_id).any():
        raise DataError(
            f"The training window at position {position} holds the mask token "
            f"model.mask_token_id={mask_token_id}, which text must not contain: leave "
            "model.mask_token_id out, or preprocess the corpus without that token."
        )


def corrupted_sample(window: TextWindow, corruption: Corruption) -> Sample:
    """Puts a corruption of its first L tokens into a window.

    Args:
        window: Clean tokens, and perhaps their documents.
        corruption: Of L tokens, L at most S.

    Returns:
        The sample, of length L; weights are over L.
    """
    x0_S, length = window.tokens_S, len(corruption.xt_L)
    inputs_S, weights_S = x0_S.copy(), np.zeros(len(x0_S), np.float32)
    inputs_S[:length] = corruption.xt_L
    weights_S[:length] = corruption.weights_L / length
    told = spread_loss_inputs([(corruption, np.arange(length))], len(x0_S))
    model_inputs = {**list_segments(window), **corruption.model_inputs}
    return Sample(inputs_S, x0_S, weights_S, length, model_inputs, told)


def spread_loss_inputs(
    corruptions: Sequence[tuple[Corruption, IntArray]], seq_length: int
) -> ModelInputs:
    """Puts what the loss needs of corrupted tokens where these stand in a window.

    Args:
        corruptions: Each with the places of its tokens, int64 [L].
        seq_length: Tokens of the window, S.

    Returns:
        By name, float32 [S]; 0 elsewhere.
    """
    names = dict.fromkeys(name for one, _ in corruptions for name in one.loss_inputs)
    found = {name: np.zeros(seq_length, np.float32) for name in names}
    for one, places_L in corruptions:
        for name, values_L in one.loss_inputs.items():
            found[name][places_L] = values_L
    return found


def next_token_sample(window: TextWindow, length: int) -> Sample:
    """Shifts a window by one for next-token prediction.

    Args:
        window: Clean tokens, and perhaps their documents, whose last tokens predict nothing; else
            the window is one text.
        length: Tokens that count, 2 to S.

    Returns:
        The sample, with one weight on each of its n predictions, 1/n. A window of documents of one
        token each has none: its weights are all 0.
    """
    x0_S, segment_ids_S = window.tokens_S, window.segment_ids_S
    predicts_S = np.arange(1, len(x0_S) + 1) < length
    if segment_ids_S is not None:
        predicts_S[:-1] &= segment_ids_S[1:] == segment_ids_S[:-1]
    weight = 1.0 / max(int(predicts_S.sum()), 1)
    weights_S = np.where(predicts_S, weight, 0.0).astype(np.float32)
    return Sample(x0_S, shift_tokens(x0_S), weights_S, length, list_segments(window))


def list_segments(window: TextWindow) -> ModelInputs:
    """The documents of a window as a model input, if it has any."""
    return _NOTHING if window.segment_ids_S is None else {SEGMENT_IDS: window.segment_ids_S}


def find_places_after_first(window: TextWindow) -> IntArray:
    """Where next-token prediction predicts a token: all places but the first of each text.

    Args:
        window: Tokens, and perhaps their documents; else the window is one text.

    Returns:
        int64 [n], ascending.
    """
    follows_S = np.ones(len(window.tokens_S), dtype=np.bool_)
    follows_S[0] = False
    if window.segment_ids_S is not None:
        follows_S[1:] = window.segment_ids_S[1:] == window.segment_ids_S[:-1]
    return np.flatnonzero(follows_S)


def shift_tokens(tokens_S: IntArray) -> IntArray:
    """The token after each.

    Args:
        tokens_S: int64 [S].

    Returns:
        int64 [S]; the last one, which has no successor, gets the first.
    """
    return np.append(tokens_S[1:], tokens_S[:1])
