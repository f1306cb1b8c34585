"""What else takes part in a run: entries of `hooks`, each of the class that its kind names."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.core.registry import Registry


class HookConfig(Component):
    """What else takes part in the training loop: a list of hooks, each with fields of its own."""

    kind: str = Field(description="The hook's section, as package.module:Class.")

    def build(self, config: Any) -> Any:
        """Makes the hook, a `Hook` of `megatron_mdm/training/hooks.py`.

        Args:
            config: The run, a `Config`; what does not fit may be refused by a ConfigError.
        """
        raise NotImplementedError


HOOKS = Registry("a hook", HookConfig, {})
CHOSEN_HOOK = ChosenFrom(HOOKS, "hooks")
