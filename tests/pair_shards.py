"""Shards of pairs that the tests start from, as tools/prepare_finetuning.py lays them out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_mdm.data.manifest import Manifest, PromptResponseRecipe, manifest_path
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.data.writer import ShardWriter

END = 0


def write_pairs(
    prefix: Path,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    vocab_size: int,
    *,
    prompts: Sequence[int] | None = None,
    with_recipe: bool = True,
) -> None:
    """Writes shards, prompt lengths and manifest.

    Args:
        prefix: Of the files.
        pairs: Tokens of prompt and response of each; the token `END` comes after them.
        vocab_size: Of the manifest.
        prompts: Lengths of prompts to write instead of the true ones.
        with_recipe: Without it the manifest is that of plain texts.
    """
    documents = [[*prompt, *response, END] for prompt, response in pairs]
    with ShardWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document))
        writer.finish()
    lengths = [len(prompt) for prompt, _ in pairs] if prompts is None else prompts
    content = np.array(lengths, dtype="<i4").tobytes()
    prompts_path(prefix).write_bytes(content)
    recipe = PromptResponseRecipe(
        prompt_key="prompt",
        response_key="response",
        turns="each",
        chat_template="",
        prompts_sha256=hashlib.sha256(content).hexdigest(),
    )
    Manifest(
        tokenizer="t",
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        eod_token_id=END,
        special_tokens={"<|endoftext|>": END},
        num_documents=len(documents),
        num_tokens=sum(map(len, documents)),
        # One that the vocabulary holds, whatever the documents hold.
        max_token_id=vocab_size - 1,
        dtype="uint16",
        source_files=[],
        exchanges=recipe if with_recipe else None,
    ).write(manifest_path(prefix))
