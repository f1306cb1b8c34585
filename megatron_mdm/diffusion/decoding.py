"""Every option of generation, described once, and the schedules that follow from them.

The tools' options, the defaults of an export and the samplers all read this one description. The
file travels with every Hugging Face export, so it imports nothing of ours.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

DECODING_FILE = "mdm_generation_config.json"
"""Name in an export. transformers gives another meaning to generation_config.json."""

PLANNED_ORDERS = ("random", "left_to_right", "ancestral")
"""Orders that are known before the first forward pass."""

SCORED_ORDERS = ("confidence", "entropy", "margin")
"""Orders that look at the logits of each step and unmask the surest positions first."""

NOISE_ORDERS = ("ancestral", "adaptive")
"""Orders of models whose noise is hybrid or uniform."""

ORDERS = (*SCORED_ORDERS, *PLANNED_ORDERS, "adaptive")

WRITING_TEMPERATURE = 0.8
"""Where a text goes on and no temperature is given: measured, see docs/generation.md."""

_LEAST_1 = (
    "num_steps",
    "top_k",
    "block_length",
    "max_new_tokens",
    "cache_refresh_steps",
    "correction_steps",
)
_MASKED_DIFFUSION_ALONE = (
    "num_steps",
    "order",
    "threshold",
    "remasking",
    "block_length",
    "guidance_scale",
    "cache_refresh_steps",
    "correction_steps",
)
_MASKS_ALONE = ("threshold", "remasking", "block_length", "use_cache", "cache_refresh_steps")


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Attributes:
        num_steps: Most steps per sequence; None: one per mask. With k masks a sequence takes
            min(num_steps, k) steps, and none is wasted. "ancestral" reads it as the number of grid
            intervals of t from 1 to 0 and skips those in which nothing is unmasked. With
            `remasking` there may be more steps than masks.
        order: Which positions come first: confidence, entropy, margin, random, left_to_right or
            ancestral, or, where the noise is hybrid or uniform, ancestral or adaptive. None: see
            `resolve` and `resolve_noise`. "confidence": the highest probability of the token
            picked, at temperature 1; "entropy": the lowest; "margin": the widest gap between the
            two best probabilities; "random": a uniform order; "ancestral": each mask is unmasked
            with probability 1 - s/t when t falls to s, and hybrid or uniform noise is taken back by
            the law of the process; "adaptive": each position is drawn once, first where the token
            that stands there falls farthest behind the likeliest.
        temperature: 0 takes the best token; above 0 samples from softmax(logits / temperature).
            None: see `resolve`.
        top_k: Sample from the k most probable tokens only; None: from all.
        top_p: Sample from the smallest set of tokens whose probability at this temperature is at
            least p, only; None: from all.
        threshold: Parallel decoding: a step also unmasks every position beyond its scheduled ones
            that is at least this sure. In the unit of the order: the probability of the token
            picked (confidence), the entropy in nats, at most (entropy), or the gap (margin).
        remasking: Share of the block's unmasked tokens that is masked again before each further
            step. At least one where the step would have nothing to unmask: those that were unmasked
            with the lowest probability, or random ones under the order "random". 0: what is
            unmasked stays.
        block_length: Unmask blocks of this many masked positions from left to right. Semi-
            autoregressive: the steps are shared among the blocks. None: one block.
        correction_steps: Where the noise is hybrid or uniform: most passes after the last step in
            which the worst position gets a better token. None: none.
        guidance_scale: Weight w of classifier-free guidance; 0 is off.
        end_token_id: After the first generated token of this id every generated position becomes
            it too, at no further cost. None: no token ends a sequence.
        forbidden_token_ids: Tokens that are never chosen.
        stop_at_end: Where `end_token_id` is None and no suffix follows, the model's end of text is
            taken for it.
        use_cache: Keep keys and values between the passes of a block. An approximation for masked
            diffusion (see `caching_mdm.MdmDenoiser`); a causal model always keeps them, exactly.
        cache_refresh_steps: With a cache, compute all columns at every so many steps of a block.
            At least 1, which is exact; None: only at its first step.
        max_new_tokens: Tokens that are added to a prompt, at least 1.
        seed: Decides all random numbers. Sequence i draws from a stream of (seed, i), whatever the
            batch size.

    Raises:
        ValueError: An option has the wrong type, is out of its range or has no effect.

    Source:
        Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 7
        (ancestral); Chang et al. 2022, "MaskGIT", section 3.2 (confidence); Wang et al. 2025,
        "Remasking Discrete Diffusion Models with Inference-Time Scaling", section 4 (remasking by
        the probability at the time of unmasking); Wu et al. 2025, "Fast-dLLM" (threshold).
    """

    num_steps: int | None = None
    order: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    remasking: float = 0.0
    block_length: int | None = None
    guidance_scale: float = 0.0
    end_token_id: int | None = None
    forbidden_token_ids: tuple[int, ...] = ()
    max_new_tokens: int = 64
    seed: int = 0
    correction_steps: int | None = None
    use_cache: bool = False
    cache_refresh_steps: int | None = None
    stop_at_end: bool = True

    def __post_init__(self) -> None:
        """Checks every option."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                wanted = str(getattr(hint, "__name__", hint)).replace("NoneType", "None")
                raise ValueError(f"{name}={value!r} has the wrong type: it must be {wanted}.")
        self._check_ranges()
        self._check_effects()

    def _check_ranges(self) -> None:
        if self.order is not None and self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is unknown: use one of {', '.join(ORDERS)}.")
        for name in _LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.temperature is not None and not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and 0 or above.")
        if not -math.inf < self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be finite; 0 is off.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None.")
        if self.threshold is not None and not 0.0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold} must be finite and 0 or above, or None.")
        if not 0.0 <= self.remasking < 1.0:
            raise ValueError(f"remasking={self.remasking} must be 0 or above and below 1.")

    def _check_effects(self) -> None:
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0.0:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0, which takes "
                    "the best token: raise the temperature."
                )
        if self.threshold is not None and self.order in PLANNED_ORDERS:
            raise ValueError(
                f"threshold={self.threshold} needs an order that looks at the logits, not "
                f"order={self.order!r}: use one of {', '.join(SCORED_ORDERS)}."
            )
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
        if self.cache_refresh_steps is not None and not self.use_cache:
            raise ValueError(
                f"cache_refresh_steps={self.cache_refresh_steps} has no effect without a cache: "
                "set use_cache=True or leave it out."
            )
        if self.end_token_id is not None and not self.stop_at_end:
            raise ValueError(
                f"end_token_id={self.end_token_id} contradicts stop_at_end=False: keep one."
            )

    def resolve(self, *, continues: bool) -> Decoding:
        """Decides what was left open.

        A gap has few right fillings and gets the likeliest tokens, the surest first; a text can go
        on in many ways, and the likeliest tokens repeat themselves.

        Args:
            continues: The text is continued; False: its masks stand between other tokens.

        Returns:
            Options with a temperature and an order. Temperature: `WRITING_TEMPERATURE` where the
            text is continued, or top_k or top_p is set; else 0. Order: "random" where the text is
            continued with a temperature above 0 and without a threshold; else "confidence".

        Raises:
            ValueError: An option is for hybrid or uniform noise.
        """
        if self.order == "adaptive" or self.correction_steps is not None:
            name = "order" if self.order == "adaptive" else "correction_steps"
            raise ValueError(
                f"{name}={getattr(self, name)!r} revises random tokens, and this model's noise is "
                "masks alone: leave it out."
            )
        samples = continues or self.top_k is not None or self.top_p is not None
        temperature = self.temperature
        if temperature is None:
            temperature = WRITING_TEMPERATURE if samples else 0.0
        order = self.order
        if order is None:
            is_random = continues and temperature > 0.0 and self.threshold is None
            order = "random" if is_random else "confidence"
        return replace(self, temperature=temperature, order=order)

    def resolve_noise(self, *, has_masks: bool) -> Decoding:
        """Decides what was left open where the noise is hybrid or uniform.

        Args:
            has_masks: Is some of the noise masks?

        Returns:
            Options with a temperature, 1 if none is given, and an order, "ancestral" if none is.

        Raises:
            ValueError: An option is for noise of masks alone.
        """
        for name in _MASKS_ALONE:
            value = getattr(self, name)
            if value not in (None, False, 0):
                raise ValueError(
                    f"{name}={value!r} is for noise of masks alone, and this model's is hybrid or "
                    "uniform: leave it out."
                )
        if self.order not in (None, *NOISE_ORDERS):
            raise ValueError(
                f"order={self.order!r} is for noise of masks alone, and this model's is hybrid or "
                f"uniform: use {' or '.join(NOISE_ORDERS)}."
            )
        if self.guidance_scale and not has_masks:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs a pass with the prompt masked, and "
                "this model's noise is uniform, without masks: leave it out."
            )
        temperature = 1.0 if self.temperature is None else self.temperature
        return replace(self, temperature=temperature, order=self.order or "ancestral")

    def check_autoregressive(self) -> None:
        """Checks that no option is set that a causal model ignores.

        Raises:
            ValueError: Such an option differs from its default.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _MASKED_DIFFUSION_ALONE and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} is for masked diffusion, and this model is "
                    "autoregressive: leave it out."
                )

    def override(self, changes: Mapping[str, Any]) -> Decoding:
        """Replaces options.

        Args:
            changes: New values by name; a list stands for a tuple.

        Returns:
            New, checked options.

        Raises:
            ValueError: A name is unknown or a value is wrong.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}."
                raise ValueError(f"{name} is no option of generation: {remedy}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in changes.items()
        }
        return replace(self, **values)

    def save(self, folder: Path) -> None:
        """Writes the options into a folder, as `mdm_generation_config.json`."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        (folder / DECODING_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Decoding:
        """Reads a file that `save` wrote or a person did.

        Args:
            path: The file.

        Returns:
            The options; what is left out keeps its default.

        Raises:
            ValueError: The file holds no JSON object of options.
        """
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(options, dict):
                raise ValueError("it is no JSON object.")
            return cls().override(options)
        except ValueError as error:
            raise ValueError(f"{path} holds no options of generation: {error}") from error


def _fits(value: object, hint: Any) -> bool:
    """Is a value of a type? An int passes as a float, a bool not as a number."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def derive_seeds(seed: int, num_sequences: int) -> list[int]:
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
