"""Whether a run's mask token can stand in text."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mdm.core.errors import ConfigError


def check_mask_token(
    mask_token_id: int,
    *,
    special_tokens: Mapping[str, int],
    vocab_size: int,
    eod_token_id: int,
    own_id: int | None,
) -> None:
    """Checks that no text and no end of a document can hold a run's mask token.

    Args:
        mask_token_id: The run's; from `vocab_size` on no tokenizer produces it.
        special_tokens: The tokenizer's special tokens and their ids, as in the shards' manifest.
        vocab_size: The tokenizer's largest token id plus one.
        eod_token_id: The id that ends a document.
        own_id: The row that the model adds after its vocabulary, with which it could mask; None:
            weights that are there already say what masks.

    Raises:
        ConfigError: The id is the end of a document's, or of no special token.
    """
    if mask_token_id >= vocab_size:
        return
    others = {name: i for name, i in special_tokens.items() if i != eod_token_id}
    if own_id is None:
        remedy = "set it to that of the weights, and make the shards with their tokenizer"
    else:
        remedy = f"leave it out, which masks with the model's own id {own_id}"
    if others and own_id is not None:
        name, token_id = next(iter(others.items()))
        remedy += f", or use a special token such as {token_id} ({name!r})"
    if mask_token_id == eod_token_id:
        raise ConfigError(
            f"model.mask_token_id={mask_token_id} is the id that ends documents: {remedy}."
        )
    if mask_token_id not in others.values():
        raise ConfigError(
            f"model.mask_token_id={mask_token_id} is not a special token of the tokenizer, so "
            f"text can produce it: {remedy}."
        )
