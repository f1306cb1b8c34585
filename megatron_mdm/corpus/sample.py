"""A look at the text in token shards."""

from __future__ import annotations

import os

from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.manifest import Manifest
from megatron_mdm.data.stream import TokenSource
from megatron_mdm.errors import DataError

_SAMPLE_TOKENS = 64


def decoded_sample(source: TokenSource, manifest: Manifest) -> str:
    """Decodes the first tokens.

    Args:
        source: The tokens.
        manifest: Their manifest.

    Returns:
        The text, quoted, or why it cannot be shown.
    """
    ends = [
        name for name, number in manifest.special_tokens.items() if number == manifest.eod_token_id
    ]
    # A hub tokenizer that made the shards is in the cache; without a network a search takes long.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        tokenizer = load_tokenizer(manifest.tokenizer, ends[0] if ends else None)
    except DataError as error:
        return f"not shown: {error}"
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        return f"not shown: {manifest.tokenizer} has changed since"
    sample = source.read(0, min(_SAMPLE_TOKENS, source.num_tokens))
    return repr(tokenizer.decode(sample.tolist()))
