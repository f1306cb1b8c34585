"""The objective of a run."""

from __future__ import annotations

from megatron_mdm.config import Config
from megatron_mdm.config.component import build_component
from megatron_mdm.config.objective import RunFacts
from megatron_mdm.diffusion.samples import Objective


def build_objective(config: Config) -> Objective:
    """Builds what the section `objective` of a run says, for the run.

    Args:
        config: The run.

    Returns:
        Pure functions of windows and noise.

    Raises:
        ConfigError: The section of a component from elsewhere builds something else.
    """
    return build_component(config.objective, "objective", Objective, collect_facts(config))


def collect_facts(config: Config) -> RunFacts:
    """What components of the objective are told of a run."""
    return RunFacts(
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        mask_token_id=config.model.mask_id,
        vocab_size=config.model.vocab_size,
        finetuning=config.finetuning,
        time_embedding=config.model.time_embedding,
    )
