"""Checks token shards and shows what they hold."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.shards import TokenShards
from megatron_mdm.errors import DataError, run_entry_point

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_SAMPLE_TOKENS = 64


def main() -> None:
    """Prints counts, document lengths, a sample, and that the shards are whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", type=Path, help="the shards' path without .bin and .idx")
    shards = TokenShards.open(parser.parse_args().prefix)
    print(f"documents   {shards.num_documents}")
    print(f"tokens      {shards.num_tokens}")
    print(f"dtype       {shards.dtype.name}")
    if shards.num_documents:
        lengths = np.quantile(shards.document_lengths, _QUANTILES)
        told = ", ".join(f"{q:.0%} {n:.0f}" for q, n in zip(_QUANTILES, lengths, strict=True))
        print(f"lengths     {told} tokens")
    if shards.manifest is None:
        print("vocabulary  unknown: there is no manifest")
    else:
        show_manifest(shards)
    print("integrity   OK")


def show_manifest(shards: TokenShards) -> None:
    """Prints the vocabulary and a decoded sample, and checks the largest token id.

    Args:
        shards: Shards with a manifest.

    Raises:
        DataError: A token id is outside the vocabulary.
    """
    manifest = shards.manifest
    if manifest is None:
        return
    print(
        f"vocabulary  {manifest.vocab_size} tokens of {manifest.tokenizer}, largest id used "
        f"{manifest.max_token_id}, end of document {manifest.eod_token_id}"
    )
    outside = shards.find_token_at_or_above(manifest.vocab_size)
    if outside:
        raise DataError(
            f"{shards.prefix}.bin has token id {outside[1]} at position {outside[0]}, outside its "
            f"vocabulary of {manifest.vocab_size}: write the shards again with --overwrite."
        )
    ends = [
        name for name, number in manifest.special_tokens.items() if number == manifest.eod_token_id
    ]
    try:
        tokenizer = load_tokenizer(manifest.tokenizer, ends[0] if ends else None)
    except DataError as error:
        print(f"sample      not shown: {error}")
        return
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        print(f"sample      not shown: {manifest.tokenizer} has changed since")
        return
    sample = shards.read(0, min(_SAMPLE_TOKENS, shards.num_tokens))
    print(f"sample      {tokenizer.decode(sample.tolist())!r}")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
