"""The objective of a run."""

from __future__ import annotations

from megatron_mdm.config import Config
from megatron_mdm.config.objective import RunFacts
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.samples import Objective


def objective_of(config: Config) -> Objective:
    """Builds what the section `objective` of a run says, for the run.

    Args:
        config: The run.

    Returns:
        Pure functions of windows and noise.

    Raises:
        ConfigError: The section of a component from elsewhere builds something else.
    """
    section = config.objective
    built = section.build(
        RunFacts(
            seed=config.run.seed,
            global_batch_size=config.batch.global_batch_size,
            mask_token_id=config.model.mask_id,
            vocab_size=config.model.vocab_size,
            finetuning=config.finetuning,
        )
    )
    if not isinstance(built, Objective):
        raise ConfigError(
            f"objective.kind={section.kind} builds a {type(built).__name__}: let its build() "
            "return an Objective of megatron_mdm.diffusion.samples."
        )
    return built
