"""How masks are filled: the options of every sampler, and the schedules that follow from them.

The file travels with every Hugging Face export, so it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

PLANNED_ORDERS = ("random", "left_to_right", "ancestral")
"""Orders that are known before the first forward pass."""

SCORED_ORDERS = ("confidence", "entropy", "margin")
"""Orders that look at the logits of each step and reveal the surest positions first."""

ORDERS = (*SCORED_ORDERS, *PLANNED_ORDERS)

_AUTOREGRESSIVE_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "end_token_id",
    "forbidden_token_ids",
)


@dataclass(frozen=True)
class Decoding:
    """How masks are filled.

    Attributes:
        num_steps: Most steps per sequence; None: one per mask. With k masks a sequence takes
            min(num_steps, k) steps, and none is wasted. "ancestral" reads it as the number of grid
            intervals of t from 1 to 0 and skips those in which nothing is revealed. With
            `remasking` there may be more steps than masks.
        order: "confidence" (highest probability of the token picked, at temperature 1),
            "entropy" (lowest entropy), "margin" (widest gap between the two best probabilities),
            "random" (uniform order), "left_to_right", or "ancestral" (each mask is revealed with
            probability 1 - s/t when t falls to s).
        temperature: 0 picks the best token; above 0 samples from softmax(logits / temperature).
        top_k: Sample from the k most probable tokens only; None: from all.
        top_p: Sample from the smallest set of tokens whose probability at this temperature is at
            least p, only; None: from all.
        threshold: Parallel decoding: a step also reveals every position beyond its scheduled ones
            that is at least this sure. In the unit of the order: the probability of the token
            picked (confidence), the entropy in nats, at most (entropy), or the gap (margin).
        remasking: Share of the block's revealed tokens that is masked again before each further
            step, at least one where the step would have nothing to reveal: those that were revealed
            with the lowest probability, or random ones under the order "random". 0: what is
            revealed stays.
        block_length: Fill blocks of this many masked positions from left to right (semi-
            autoregressive); the steps are shared among the blocks. None: one block.
        guidance_scale: Weight w of classifier-free guidance; 0 is off.
        end_token_id: After the first generated token of this id every generated position becomes
            it too, at no further cost. None: no token ends a sequence.
        forbidden_token_ids: Tokens that are never chosen.

    Raises:
        ValueError: An option is out of its range, or has no effect.

    Source:
        Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 7
        (ancestral); Chang et al. 2022, "MaskGIT", section 3.2 (confidence); Wang et al. 2025,
        "Remasking Discrete Diffusion Models with Inference-Time Scaling", section 4 (remasking by
        the probability at the time of the reveal); Wu et al. 2025, "Fast-dLLM" (threshold).
    """

    num_steps: int | None = None
    order: str = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    remasking: float = 0.0
    block_length: int | None = None
    guidance_scale: float = 0.0
    end_token_id: int | None = None
    forbidden_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks every option."""
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is unknown: use one of {', '.join(ORDERS)}.")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and 0 or above.")
        if not -math.inf < self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be finite; 0 is off.")
        for name in ("num_steps", "top_k", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more, or None.")
        self._check_choice()
        self._check_schedule()

    def _check_choice(self) -> None:
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None.")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0.0:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0, which takes "
                    "the best token: raise the temperature."
                )

    def _check_schedule(self) -> None:
        if self.threshold is not None and not 0.0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold} must be finite and 0 or above, or None.")
        if self.threshold is not None and self.order in PLANNED_ORDERS:
            raise ValueError(
                f"threshold={self.threshold} needs an order that looks at the logits, not "
                f"order={self.order!r}: use one of {', '.join(SCORED_ORDERS)}."
            )
        if not 0.0 <= self.remasking < 1.0:
            raise ValueError(f"remasking={self.remasking} must be 0 or above and below 1.")
        if self.remasking and self.order == "ancestral":
            raise ValueError(
                f"remasking={self.remasking} does not go with order='ancestral', whose steps are "
                "drawn beforehand: use order='random'."
            )
        if self.remasking and self.threshold is not None:
            raise ValueError(
                f"remasking={self.remasking} and threshold={self.threshold} contradict each other "
                "on how many tokens a step leaves: keep one."
            )

    def check_autoregressive(self) -> None:
        """Checks that no option is set that a causal model, one token after another, ignores.

        Raises:
            ValueError: Such an option differs from its default.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _AUTOREGRESSIVE_OPTIONS and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} is for masked diffusion, and this model is "
                    "autoregressive: leave it out."
                )


def sequence_seeds(seed: int, num_sequences: int) -> list[int]:
    """Derives one seed per sequence; sequence i gets the same seed in a batch of any size.

    Args:
        seed: Seed of the whole batch.
        num_sequences: Number of sequences, at least 0.

    Returns:
        Seeds in [0, 2^64), one per sequence.
    """
    digests = (
        hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in range(num_sequences)
    )
    return [int.from_bytes(digest[:8], "big") for digest in digests]


def revealed_after(step: int, num_steps: int, num_masks: int) -> int:
    """How many of a block's masks the schedule has revealed after some of its steps.

    Args:
        step: Steps taken, 0 to `num_steps`.
        num_steps: Steps of the block, at least 1.
        num_masks: Masks of the block, at least 0.

    Returns:
        ceil(step * num_masks / num_steps): 0 at the start, all at the end, and with no more steps
        than masks every step reveals one at least, and one more than another at most.
    """
    return -(-step * num_masks // num_steps)


def share_steps(block_sizes: Sequence[int], num_steps: int) -> list[int]:
    """Gives each block one step and shares the others by size.

    Args:
        block_sizes: Masks of each block, each at least 1.
        num_steps: At least the number of blocks.

    Returns:
        Steps of each block; they sum to `num_steps`, and no block has more steps than masks if
        there are no more steps than masks in all.
    """
    spare_steps = num_steps - len(block_sizes)
    spare_tokens = max(sum(block_sizes) - len(block_sizes), 1)
    shares, seen_tokens, given = [], 0, 0
    for size in block_sizes:
        seen_tokens += size - 1
        total = spare_steps * seen_tokens // spare_tokens
        shares.append(1 + total - given)
        given = total
    if block_sizes:
        # Blocks of one mask each leave the shares above at one step; only revision has more.
        shares[-1] += num_steps - sum(shares)
    return shares
