"""The windows that a run reads of its shards: text, or packed exchanges where it is fine-tuned."""

from __future__ import annotations

from megatron_mdm.config import Config, SourceConfig, TrainSourceConfig
from megatron_mdm.data.exchanges import PackedExchanges, read_prompt_lengths
from megatron_mdm.data.stream import TokenSource
from megatron_mdm.data.windows import SourceWindows, WindowSource


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
        return PackedExchanges(
            tokens,
            read_prompt_lengths(tokens),
            data.seq_length,
            vocab_size,
            config.finetuning,
            fill_tokens=config.finetuning.fill_tokens(config.objective.kind),
        )
    limit = source.max_unique_tokens if isinstance(source, TrainSourceConfig) else None
    by_document = data.attention == "document"
    return SourceWindows(tokens, data.seq_length, vocab_size, limit, by_document=by_document)
