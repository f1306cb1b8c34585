"""The objectives there are, built from a run's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megatron_mdm.config import Config, FinetuningConfig, ObjectiveConfig
from megatron_mdm.diffusion.annealing import WideningAttention
from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, FullAttention
from megatron_mdm.diffusion.autoregression import AutoregressiveObjective
from megatron_mdm.diffusion.key_dropout import KeyDropout
from megatron_mdm.diffusion.left_to_right import LeftToRight
from megatron_mdm.diffusion.lengths import LengthSampler
from megatron_mdm.diffusion.masked_diffusion import MaskedDiffusionObjective
from megatron_mdm.diffusion.masking import ForwardProcess
from megatron_mdm.diffusion.noise import CounterNoise, TimeSampler
from megatron_mdm.diffusion.reading_orders import ReadingOrders
from megatron_mdm.diffusion.responses import (
    ResponseDiffusionObjective,
    ResponsePredictionObjective,
)
from megatron_mdm.diffusion.samples import Objective
from megatron_mdm.diffusion.schedules import NoiseSchedule


class _Run(NamedTuple):
    """What objectives need to know of a run, besides their own settings."""

    seed: int
    noise: CounterNoise
    times: TimeSampler
    mask_token_id: int
    finetuning: FinetuningConfig


def objective_of(config: Config) -> Objective:
    """The objective of a run.

    Args:
        config: The run.

    Returns:
        What its sections `objective` and `finetuning` say.
    """
    return build_objective(
        config.objective,
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        mask_token_id=config.model.mask_id,
        finetuning=config.finetuning,
    )


def build_objective(
    settings: ObjectiveConfig,
    *,
    seed: int,
    global_batch_size: int,
    mask_token_id: int,
    finetuning: FinetuningConfig | None = None,
) -> Objective:
    """Builds an objective.

    Args:
        settings: Kind and details.
        seed: The run's seed.
        global_batch_size: Samples an optimizer step, over which t is stratified.
        mask_token_id: Input id that hides a token.
        finetuning: Whether responses alone are learned, and how; None: they are not.

    Returns:
        Pure functions of windows and noise.
    """
    noise = CounterNoise(seed)
    times = TimeSampler(noise, global_batch_size, settings.time_sampling == "low_discrepancy")
    run = _Run(seed, noise, times, mask_token_id, finetuning or FinetuningConfig())
    of_text, of_responses = _BUILDERS[settings.kind]
    return (of_responses if run.finetuning.enabled else of_text)(settings, run)


def _masked_diffusion(settings: ObjectiveConfig, run: _Run) -> Objective:
    return MaskedDiffusionObjective(
        noise=run.noise,
        times=run.times,
        lengths=LengthSampler(run.noise, settings.stochastic_length_ratio),
        mask_token_id=run.mask_token_id,
        forward=_forward(settings),
        left_to_right=LeftToRight(run.noise, settings.left_to_right_ratio),
        attention=_widening(settings),
    )


def _response_diffusion(settings: ObjectiveConfig, run: _Run) -> Objective:
    return ResponseDiffusionObjective(
        noise=run.noise,
        times=run.times,
        mask_token_id=run.mask_token_id,
        forward=_forward(settings),
        prompt_dropout=run.finetuning.prompt_dropout,
        attention=_widening(settings),
    )


def _autoregression(settings: ObjectiveConfig, run: _Run) -> Objective:
    orders = key_dropout = None
    if settings.num_orders > 1:
        orders = ReadingOrders(run.noise, run.seed, settings.num_orders)
    if settings.key_dropout:
        rate_per, ratio = settings.key_dropout_rate_per, settings.key_dropout_ratio
        key_dropout = KeyDropout(run.noise, rate_per, ratio)
    lengths = LengthSampler(run.noise, settings.stochastic_length_ratio, minimum=2)
    return AutoregressiveObjective(lengths, orders, key_dropout)


def _response_prediction(settings: ObjectiveConfig, run: _Run) -> Objective:
    del settings, run
    return ResponsePredictionObjective()


_Builder = Callable[[ObjectiveConfig, _Run], Objective]
# Of whole windows, and of responses.
_BUILDERS: dict[str, tuple[_Builder, _Builder]] = {
    "mdm": (_masked_diffusion, _response_diffusion),
    "ar": (_autoregression, _response_prediction),
}


def _forward(settings: ObjectiveConfig) -> ForwardProcess:
    return ForwardProcess(settings.masking == "fixed_count", settings.eps, noise_schedule(settings))


def _widening(settings: ObjectiveConfig) -> FullAttention:
    steps = settings.attention_annealing_steps
    return WideningAttention(steps) if steps else FULL_ATTENTION


def noise_schedule(settings: ObjectiveConfig) -> NoiseSchedule:
    """The noise schedule of a run.

    Args:
        settings: The objective's fields.

    Returns:
        Shares, times and weights.
    """
    return NoiseSchedule(
        settings.noise_schedule,
        settings.schedule_power,
        settings.t_min,
        settings.t_max,
        settings.weighting,
    )
