"""What a run reads: token sources, and the windows that are cut out of them."""

from __future__ import annotations

from megatron_mdm.config import Config, SourceConfig
from megatron_mdm.core.registry import Registry
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.windows import WindowSource

TOKEN_SOURCES: Registry[TokenSource] = Registry(
    "a token source", TokenSource, {"shards": "megatron_mdm.data.store:TokenStore"}
)
WINDOWS: Registry[WindowSource] = Registry(
    "a kind of windows",
    WindowSource,
    {
        "text": "megatron_mdm.data.windows:SourceWindows",
        "responses": "megatron_mdm.data.prompt_response_pairs:PackedPairs",
    },
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
    """Cuts one set of shards into the windows that a run reads.

    Args:
        config: The run.
        source: The shards' place in it.
        tokens: The open shards.

    Returns:
        Windows of text, or of packed prompt-response pairs where responses are learned.

    Raises:
        DataError: There is not one window, or the shards are not of that kind.
    """
    kind = "responses" if config.finetuning.enabled else "text"
    return WINDOWS.find(kind, "finetuning.enabled").open(config, source, tokens)


def read_file_states(source: TokenSource) -> list[list[int]]:
    """Reads what tells the files of a stream from others, and from themselves after a change.

    Args:
        source: The stream.

    Returns:
        Device, inode, bytes and the time of the last change in nanoseconds of each file that is
        there. Processes of one machine that find the same read the same tokens.
    """
    states = [path.stat() for path in source.files if path.exists()]
    return [[one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns] for one in states]
