"""The corpora of `make crossover`: Python's standard library as bytes and as BPE."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.studies.steps import run_step

# Enough random documents for the most unique tokens of the sweeps in configs/crossover.
_SUBSET_TOKENS = 524288
_VOCABULARIES = {"bytes": 257, "bpe-1024": 1024}


def prepare_corpora(folder: Path) -> None:
    """Makes text, tokenizers and shards; each step reuses what it finds done.

    Args:
        folder: Where all goes; the sweeps name their shards in it.

    Raises:
        MdmError: A step failed; it has said why.
    """
    corpus = folder / "corpus"
    train = corpus / "train.jsonl"
    run_step("tools/gather_stdlib.py", "--output", corpus)
    for name, size in _VOCABULARIES.items():
        tokenizer, shards = folder / name / "tokenizer", folder / name / "train"
        trained = ("--vocab-size", size, "--output", tokenizer)
        run_step("tools/train_tokenizer.py", "--input", train, *trained)
        for split in ("train", "valid"):
            made = ("--tokenizer", tokenizer, "--output-prefix", folder / name / split)
            run_step("tools/preprocess_data.py", "--input", corpus / f"{split}.jsonl", *made)
        drawn = ("--tokens", _SUBSET_TOKENS, "--output-prefix", shards)
        run_step("tools/subset_data.py", "--input", shards, *drawn)
