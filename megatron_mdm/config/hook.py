"""What else takes part in a run: entries of `hooks`, each of the class that its kind names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.core.registry import Registry

if TYPE_CHECKING:
    # The schema holds this section.
    from megatron_mdm.config.schema import Config


class HookConfig(Component):
    """What else takes part in the training loop: a list of hooks, each with fields of its own."""

    kind: str = Field(description="Which hook; package.module:Class for one of your own.")

    def build(self, config: Any) -> Any:
        """Makes the hook, a `Hook` of `megatron_mdm/training/hooks.py`.

        Args:
            config: The run, a `Config`; what does not fit may be refused by a ConfigError.
        """
        raise NotImplementedError

    def list_weight_states(self) -> list[str]:
        """Names of what the hook keeps of every weight, each as large as the float32 weights."""
        return []

    def check_length(self, config: Config, num_steps: int, num_windows: int) -> None:
        """Refuses a run whose length the hook does not go with.

        Args:
            config: The run.
            num_steps: Its optimizer steps.
            num_windows: Windows of all its training sources.

        Raises:
            ConfigError: It does not go with it.
        """


HOOKS = Registry(
    "a hook",
    HookConfig,
    {
        "ema": "megatron_mdm.training.averaging:ExponentialAverageConfig",
        "swa": "megatron_mdm.training.averaging:UniformAverageConfig",
        "downstream": "megatron_mdm.inference.downstream:DownstreamConfig",
    },
)
CHOSEN_HOOK = ChosenFrom(HOOKS, "hooks")
