"""What a run learns: the section `objective`, whose class is the one that its kind names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast

from pydantic import Field, ValidationError, model_validator

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.data import DataConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.registry import Registry

# How a model runs: fill in masks, or next token.
ObjectiveKind = Literal["ar", "mdm"]
# prefix: next token too, with attention in both directions within the prompt.
RunWay = Literal["ar", "mdm", "prefix"]


class RunWays(NamedTuple):
    """How models run that learned more than one thing.

    Attributes:
        ways: All that they learned, the usual one first.
        is_shifted: Does the hidden state before a mask predict the token there, not the one at it?
    """

    ways: tuple[RunWay, ...]
    is_shifted: bool


def check_way(way: RunWay | None, known: Sequence[str], name: str) -> RunWay:
    """Chooses a way to run a model.

    Args:
        way: Which; None: the usual one.
        known: What it learned, the usual one first.
        name: What to call it.

    Raises:
        ConfigError: It did not learn that.
    """
    if way is not None and way not in known:
        raise ConfigError(
            f"--run-as={way} is not how {name} was trained to run: use {' or '.join(known)}, or "
            "leave it out."
        )
    return way or cast(RunWay, known[0])


class RunFacts(NamedTuple):
    """What an objective is told of its run, besides its own section.

    Attributes:
        seed: The run's seed.
        global_batch_size: Samples per optimizer step, over which times are stratified.
        mask_token_id: Input id that hides a token.
        vocab_size: Ids of text.
        finetuning: Whether responses alone are learned, and how.
        time_embedding: Are models told the log-SNR of the noise?
    """

    seed: int
    global_batch_size: int
    mask_token_id: int
    vocab_size: int
    finetuning: FinetuningConfig = FinetuningConfig()
    time_embedding: bool = False


class LossHeadConfig(Component):
    """What is computed at the positions that count: section of a loss head.

    The kinds of `LOSS_HEADS` stand in `megatron_mdm/model/loss_heads.py`.

    Attributes:
        is_bound: Is it a bound on the negative log-likelihood, of the noise that it is made for?
        num_reductions: All-reduces over the tensor-parallel ranks, for estimates.
        num_reduced: Numbers that those take of each position, in float32.
    """

    is_bound: ClassVar[bool] = False
    # Of a softmax: the greatest logit, then the target's and the sum.
    num_reductions: ClassVar[int] = 2
    num_reduced: ClassVar[int] = 3

    def build(self, run: RunFacts) -> Any:
        """Makes the loss head, a `LossHead` of `megatron_mdm/model/loss_heads.py`."""
        raise NotImplementedError


LOSS_HEADS = Registry(
    "a loss head",
    LossHeadConfig,
    {
        "cross_entropy": "megatron_mdm.model.loss_heads:CrossEntropyConfig",
        "interpolating": "megatron_mdm.model.interpolating_head:InterpolatingHeadConfig",
    },
)
_CHOSEN_HEAD = ChosenFrom(LOSS_HEADS, "objective.loss_head", "cross_entropy")


class ObjectiveConfig(Component):
    """Section of an objective: its fields, what else of a run it goes with, how it is made.

    Attributes:
        trains: What it trains, in the words of reports.
        learns_responses: Can a run of it be fine-tuned on responses alone?
        fills_responses: Does fine-tuning fill responses up to a number of tokens, all learned?
    """

    loss_head: Annotated[LossHeadConfig, _CHOSEN_HEAD] = Field(
        default_factory=_CHOSEN_HEAD.read_default,
        description="What the training loss is at each position that counts.",
    )

    trains: ClassVar[str] = "a language model"
    learns_responses: ClassVar[bool] = False
    fills_responses: ClassVar[bool] = False

    @property
    def nll_is_exact(self) -> bool:
        """Is its held-out loss the negative log-likelihood itself, not an upper bound?"""
        return False

    @property
    def held_out_head(self) -> str:
        """The kind of loss head that computes the held-out loss."""
        return "cross_entropy"

    @property
    def remark(self) -> str | None:
        """What a reader of the run's losses has to know, in a sentence."""
        return None

    def find_noise(self, num_tokens: int) -> Any:
        """The noise of its models, an `Interpolation` of `megatron_mdm/diffusion/interpolation.py`.

        Args:
            num_tokens: Tokens of text.

        Returns:
            None where the noise is masks alone, or there is none.
        """
        del num_tokens
        return None

    @property
    def runs_as(self) -> ObjectiveKind | None:
        """How exports and generation run its models: fill in masks, next token; None: neither."""
        return None

    @property
    def run_ways(self) -> RunWays | None:
        """How its models run besides, and where they predict; None: as `runs_as` says alone."""
        return None

    def build(self, run: RunFacts) -> Any:
        """Makes the objective, an `Objective` of `megatron_mdm/diffusion/samples.py`."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_loss_head(self) -> Self:
        if self.loss_head.is_bound and self.loss_head.kind != self.held_out_head:
            raise ValueError(
                f"objective.loss_head.kind={self.loss_head.kind} is no bound of what "
                f"objective.kind={self.kind} learns here: leave objective.loss_head out, or use "
                f"{self.held_out_head}."
            )
        return self

    def check(self, data: DataConfig, finetuning: FinetuningConfig) -> None:
        """Refuses data and fine-tuning settings that the objective cannot be used with.

        Args:
            data: The run's windows.
            finetuning: Whether responses alone are learned, and how.

        Raises:
            ValueError: With the sentence that the user reads.
        """
        del data
        if finetuning.enabled and not self.learns_responses:
            raise ValueError(
                f"objective.kind={self.kind} cannot learn responses alone: use objective.kind=mdm "
                "or ar, or leave finetuning.enabled out."
            )

    def complete(self, micro_batch_size: int) -> Self:
        """Decides what the batch leaves open, so that every copy of the configuration says so.

        Args:
            micro_batch_size: Samples of a forward pass.

        Returns:
            The section, perhaps with more fields than were given.
        """
        del micro_batch_size
        return self

    def check_batch(self, micro_batch_size: int, global_batch_size: int) -> None:
        """Refuses batches that the objective cannot be used with.

        Args:
            micro_batch_size: Samples of a forward pass.
            global_batch_size: Samples of a step.

        Raises:
            ValueError: With the sentence that the user reads.
        """
        del micro_batch_size, global_batch_size

    def check_num_steps(self, num_steps: int) -> None:
        """Refuses a run that is too short.

        Args:
            num_steps: Optimizer steps of the run.

        Raises:
            ConfigError: With the sentence that the user reads.
        """
        del num_steps


OBJECTIVES = Registry(
    "an objective",
    ObjectiveConfig,
    {
        "mdm": "megatron_mdm.diffusion.masked_diffusion:MaskedDiffusionConfig",
        "ar": "megatron_mdm.diffusion.autoregression:AutoregressionConfig",
        "mixture": "megatron_mdm.diffusion.mixed_objective:MixtureConfig",
    },
)
CHOSEN_OBJECTIVE = ChosenFrom(OBJECTIVES, "objective", "mdm")


def find_recorded_objective(config: Mapping[str, Any]) -> ObjectiveConfig:
    """Finds the objective of a run from its files.

    Args:
        config: The run's configuration, as it was written.

    Returns:
        Its section. One that this version cannot read is left at its defaults, and one whose class
        cannot be loaded is that of the base class, which promises least.
    """
    section = config.get("objective")
    kind = section.get("kind") if isinstance(section, Mapping) else None
    if not isinstance(kind, str):
        return ObjectiveConfig.model_construct(kind="")
    try:
        return CHOSEN_OBJECTIVE.read(section)
    except (ConfigError, ValidationError):
        return _find_class(kind).model_construct(kind=kind)


def _find_class(kind: str) -> type[ObjectiveConfig]:
    try:
        return OBJECTIVES.find(kind, "objective.kind")
    except ConfigError:
        return ObjectiveConfig


def find_recorded_remark(config: Mapping[str, Any]) -> str | None:
    """Finds what a reader of a run's losses has to know, from its files.

    Args:
        config: The run's configuration, as it was written.

    Returns:
        A sentence; None if there is nothing to know, or the objective cannot be loaded.
    """
    try:
        return CHOSEN_OBJECTIVE.read(config.get("objective", {})).remark
    except (ConfigError, ValueError):
        return None


def refuse_with_responses(kind: str, fields: Mapping[str, tuple[object, object]]) -> None:
    """Refuses fields that have no effect where responses are learned.

    Args:
        kind: The objective.
        fields: Value and default by dotted name.

    Raises:
        ValueError: One is not its default.
    """
    for name, (value, default) in fields.items():
        if value != default:
            raise ValueError(
                f"{name}={value} has no meaning where responses are learned (finetuning.enabled, "
                f"objective.kind={kind}): leave it out."
            )
