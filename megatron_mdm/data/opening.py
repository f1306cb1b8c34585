"""The windows that a run reads of its shards: text, or packed exchanges where it is fine-tuned."""

from __future__ import annotations

from megatron_mdm.config import Config, SourceConfig, TrainSourceConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.core.registry import Registry
from megatron_mdm.data.exchanges import PackedExchanges, prompts_path, read_prompt_lengths
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.store import TokenStore
from megatron_mdm.data.windows import SourceWindows, WindowSource

TOKEN_SOURCES: Registry[TokenSource] = Registry(
    "a token source",
    TokenSource,
    {"shards": "megatron_mdm.data.store:TokenStore"},
)


def open_source(source: SourceConfig, field: str) -> TokenSource:
    """Opens what a run reads tokens from.

    Args:
        source: Where it lies, and of what kind it is.
        field: Dotted name of the source in the configuration, for errors.

    Returns:
        The source.

    Raises:
        ConfigError: There is no such kind.
        DataError: It does not open.
    """
    return TOKEN_SOURCES.find(source.kind, f"{field}.kind").open(source.path)


def open_windows(config: Config, source: SourceConfig, tokens: TokenSource) -> WindowSource:
    """The windows of one set of shards, as a run reads them.

    Args:
        config: The run.
        source: The shards' place in it.
        tokens: The open shards.

    Returns:
        Windows of text, or of packed exchanges where responses are learned.

    Raises:
        DataError: There is not one window, or the shards are not of that kind.
    """
    data, vocab_size = config.data, config.model.vocab_size
    if config.finetuning.enabled:
        if not isinstance(tokens, TokenStore):
            raise DataError(
                f"{source.path} is no store of prompts and responses: make one with "
                "tools/prepare_finetuning.py."
            )
        return PackedExchanges(
            tokens,
            read_prompt_lengths(tokens),
            data.seq_length,
            vocab_size,
            config.finetuning,
            fill_tokens=config.finetuning.count_fill_tokens(fills=config.objective.fills_responses),
        )
    limit = source.max_unique_tokens if isinstance(source, TrainSourceConfig) else None
    by_document = data.attention == "document"
    return SourceWindows(tokens, data.seq_length, vocab_size, limit, by_document=by_document)


def file_states(source: TokenSource) -> list[list[int]]:
    """What tells the files of a stream from others, and from themselves after a change.

    Args:
        source: The stream.

    Returns:
        Device, inode, bytes and the time of the last change in nanoseconds of each file that is
        there. Processes of one machine that find the same read the same tokens.
    """
    paths = [*source.files, prompts_path(source.prefix)]
    states = [path.stat() for path in paths if path.exists()]
    return [[one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns] for one in states]
