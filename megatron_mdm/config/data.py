"""The `data` section: token shards, how often each is seen, and windows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.section import FilePath, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """One set of token shards."""

    path: FilePath = Field(description="Prefix of a .bin/.idx pair, or of a view of some.")
    kind: str = Field(
        default="shards",
        description="What lies there: `shards`, or what a `package.module:Class` opens. The class "
        "derives from `megatron_mdm.data.source.TokenSource`.",
    )


class TrainSourceConfig(SourceConfig):
    """One set of token shards and how often it is seen.

    Without a weight and epochs, all sources are seen equally often.
    """

    weight: PositiveFloat | None = Field(
        default=None,
        description="Share of the samples that sources with stated epochs leave, over the sum of "
        "weights. Give it to every source without epochs, or to none.",
    )
    epochs: PositiveFloat | None = Field(
        default=None, description="Passes over this source in the whole run; may be a fraction."
    )
    max_epochs: PositiveFloat | None = Field(
        default=None, description="Refuse a run that would see this source more often."
    )
    max_unique_tokens: PositiveInt | None = Field(
        default=None,
        description="Use only the first so many tokens (mdm subset draws at random).",
    )

    @model_validator(mode="after")
    def _check_measures(self) -> Self:
        if self.weight is not None and self.epochs is not None:
            raise ValueError(
                f"data.train has weight={self.weight} and epochs={self.epochs} for "
                f"{self.path}: keep one."
            )
        if self.epochs and self.max_epochs and self.epochs > self.max_epochs:
            raise ValueError(
                f"data.train has epochs={self.epochs} over max_epochs={self.max_epochs} for "
                f"{self.path}: lower epochs or raise max_epochs."
            )
        return self


class DataConfig(Section):
    """Token shards, their mixture, and windows."""

    train: Annotated[list[TrainSourceConfig], Field(min_length=1)] = Field(
        description="Shards to train on, and how often each is seen."
    )
    valid: list[SourceConfig] = Field(default=[], description="Held-out shards.")
    seq_length: Annotated[int, Field(ge=2)] = Field(
        default=2048, description="Window length in tokens."
    )
    order: Literal["shuffle", "fixed", "shifted", "documents"] = Field(
        default="shuffle",
        description="Order of a source's windows in each pass. shuffle: a new one; fixed: the same "
        "one; shifted: a new one, and windows start at a new offset, so that their edges move; "
        "documents: a new one, of windows that are cut out of a new order of documents.",
    )
    attention: Literal["window", "document"] = Field(
        default="window",
        description="window: a token sees its whole window; document: only its own document.",
    )
    reader_threads: PositiveInt = Field(
        default=1, description="Threads per rank that read and mask batches ahead of their use."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Tokenizer folder, file or hub name; the shards must have been made with it.",
    )

    @property
    def repeats_windows(self) -> bool:
        """Do the windows of a pass come back in the next one, in whatever order?"""
        return self.order in ("shuffle", "fixed")
