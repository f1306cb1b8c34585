"""The `finetuning` section: what is learned of prompts and responses."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.section import NonNegativeInt, Probability, Section

_DEFAULT_FILL_TOKENS = 256


class FinetuningConfig(Section):
    """Learning responses to prompts, from shards of mdm prepare-finetuning.

    Every pair of a prompt and a response weighs the same, whatever its length.
    """

    enabled: bool = Field(
        default=False,
        description="Learn responses alone; mdm finetune and finetune_ar.py set it.",
    )
    end_of_text: Literal["learned", "given", "none"] = Field(
        default="learned",
        description="The end-of-text token after a response: learned like the response; given: in "
        "sight and not learned; none: there is none.",
    )
    fill_to: NonNegativeInt | None = Field(
        default=None,
        description="MDM: fill a shorter response up with end-of-text tokens to so many tokens (or "
        "to the window's end), all of them learned: generation begins with a fixed number of "
        "masks, and the model has to say how many of them it needs. 0: one end-of-text token, and "
        "the number of masks gives the response's length away. Default 256; AR: always 0.",
    )
    prompt_dropout: Probability = Field(
        default=0.0,
        description="MDM: chance that the whole prompt of a pair is hidden, so that the model "
        "knows responses without prompts, for classifier-free guidance; the papers' is 0.1.",
    )
    packing: bool = Field(
        default=True,
        description="Put as many pairs into a window as fit, none of which sees another; "
        "false: one per window.",
    )
    too_long: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="When a prompt with its response is longer than a window: refuse the run, or "
        "leave it out and say how many.",
    )

    @model_validator(mode="after")
    def _check_filling(self) -> Self:
        if self.fill_to and self.end_of_text != "learned":
            raise ValueError(
                f"finetuning.fill_to={self.fill_to} fills with end-of-text tokens that are "
                f"learned, and finetuning.end_of_text={self.end_of_text}: set fill_to=0, or "
                "end_of_text=learned."
            )
        return self

    def count_fill_tokens(self, *, fills: bool) -> int:
        """Counts the tokens to which a shorter response is filled up, where the window has room.

        Args:
            fills: Does the objective fill responses?

        Returns:
            A number; 0 for no filling.
        """
        if not fills or self.end_of_text != "learned":
            return 0
        return _DEFAULT_FILL_TOKENS if self.fill_to is None else self.fill_to
