"""What is adapted, and how."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig

from megatron_mdm.core.errors import ConfigError

# The matrices of a block of an export. The embedding and the output layer are none of them: the
# output layer is used as a plain matrix, past whatever peft would put around it.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSettings:
    """A low-rank adapter: W + alpha / rank * B A, of which A and B are learned.

    Attributes:
        rank: Rows of A and columns of B, at least 1.
        alpha: Scale; None: twice the rank.
        dropout: Chance that an input of A is left out in training, in [0, 1).
        targets: Matrices that are adapted, in every block.

    Raises:
        ConfigError: A value is out of its range.

    Source:
        arXiv 2106.09685, section 4.1.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.rank < 1:
            raise ConfigError(f"--rank={self.rank} is less than 1: use such as 16.")
        if self.scale_alpha <= 0:
            raise ConfigError(
                f"--alpha={self.alpha} has to be above 0: use such as {2 * self.rank}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout={self.dropout} is not in [0, 1): use such as 0.05.")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(
                f"--target={unknown[0] if unknown else ''} is no matrix of a block: choose among "
                f"{', '.join(TARGETS)}."
            )

    @property
    def scale_alpha(self) -> float:
        """The scale, given or not."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def to_peft(self) -> LoraConfig:
        """The same in the terms of peft.

        Returns:
            Its configuration. B begins at 0, so the adapted model begins as the model itself.
        """
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.scale_alpha,  # type: ignore[arg-type]  # it says int, and divides
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            bias="none",
        )
