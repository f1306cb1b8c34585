"""The corpus of a plan: its vocabulary, its size, and what is held out beside it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.shards import shard_paths
from megatron_mdm.data.store import open_tokens

_TRAIN, _VALID = "data/train", "data/valid"


class Corpus(NamedTuple):
    """Shards to train on, as far as they are there.

    Attributes:
        train_prefix: Where they are, or will be.
        valid_prefix: Held-out shards; None: there are none.
        vocab_size: V by their manifest; None where it is not known.
        num_tokens: How many tokens they hold; None where they are not there.
        warnings: What is missing.
    """

    train_prefix: str
    valid_prefix: str | None
    vocab_size: int | None
    num_tokens: int | None
    warnings: tuple[str, ...]


def find_corpus(train: str | None, valid: str | None) -> Corpus:
    """Looks at the shards that a plan is made for.

    Args:
        train: Prefix of the shards to train on; None: `data/train`.
        valid: Prefix of the held-out shards; None: `TRAIN-valid`, or `valid` beside `train`.

    Returns:
        The corpus. Shards may still be made, so those that are absent are a warning.

    Raises:
        DataError: Shards are there and damaged.
    """
    prefix = train or _TRAIN
    if not _exists(prefix):
        told = (f"There are no shards at {prefix} yet: the vocabulary is that of the preset.",)
        return Corpus(prefix, valid or _VALID, None, None, told if train is not None else ())
    shards = open_tokens(prefix)
    warnings = []
    if shards.manifest is None:
        warnings.append(
            f"{prefix} has no manifest that says its vocabulary: that of the preset is taken, and "
            "model.vocab_size has to be set if it is another."
        )
    held_out = valid or _beside(prefix)
    if held_out is None:
        warnings.append(
            f"No held-out shards lie beside {prefix}, so overfitting will not be seen: hold some "
            "out with tools/preprocess_data.py --valid-fraction, or name them with --valid."
        )
    vocab_size = shards.manifest.vocab_size if shards.manifest is not None else None
    return Corpus(prefix, held_out, vocab_size, shards.num_tokens, tuple(warnings))


def _beside(prefix: str) -> str | None:
    """The names that this project's own tools give to what they hold out."""
    candidates = [f"{prefix}-valid"]
    if Path(prefix).name == "train":
        candidates.append(str(Path(prefix).with_name("valid")))
    return next((candidate for candidate in candidates if _exists(candidate)), None)


def _exists(prefix: str) -> bool:
    path = Path(prefix)
    return manifest_path(path).exists() or any(one.exists() for one in shard_paths(path))
