"""The corpora of `make crossover`: Python's standard library as bytes and as BPE."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.studies.papers.steps import run_step

# Enough random documents for the most unique tokens of the sweeps in configs/crossover.
_SUBSET_TOKENS = 524288
_VOCABULARIES = {"bytes": 257, "bpe-1024": 1024}


def prepare_corpora(repo: Path, folder: Path) -> None:
    """Makes text, tokenizers and shards; each step reuses what it finds done.

    Args:
        repo: Root of the repository.
        folder: Where all goes; the sweeps name their shards in it.

    Raises:
        MdmError: A step failed; it has said why.
    """

    def step(script: str, *arguments: str | Path | int) -> None:
        run_step(repo, script, *map(str, arguments))

    corpus = folder / "corpus"
    train = corpus / "train.jsonl"
    step("tools/gather_stdlib.py", "--output", corpus)
    for name, size in _VOCABULARIES.items():
        tokenizer, shards = folder / name / "tokenizer", folder / name / "train"
        trained = ("--vocab-size", size, "--output", tokenizer)
        step("tools/train_tokenizer.py", "--input", train, *trained)
        for split in ("train", "valid"):
            made = ("--tokenizer", tokenizer, "--output-prefix", folder / name / split)
            step("tools/preprocess_data.py", "--input", corpus / f"{split}.jsonl", *made)
        drawn = ("--tokens", _SUBSET_TOKENS, "--output-prefix", shards)
        step("tools/subset_data.py", "--input", shards, *drawn)
