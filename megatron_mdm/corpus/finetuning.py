"""From conversations to shards for fine-tuning: a document is a prompt, its response and an end."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import open_whole_file, write_errors
from megatron_mdm.core.options import FLATTENED
from megatron_mdm.corpus.chunk_reader import check_valid_fraction, is_small_hash
from megatron_mdm.corpus.conversations import (
    ChatTemplate,
    ConversationFormat,
    PromptResponsePair,
    Turns,
    flatten_pairs,
    join_conversation,
    load_chat_template,
)
from megatron_mdm.corpus.readers import open_lines, read_objects
from megatron_mdm.corpus.recipe import Recipe, find_reusable
from megatron_mdm.corpus.records import BadRecord
from megatron_mdm.corpus.sources import Source
from megatron_mdm.corpus.tokenizer import TokenizerHandle, encode_texts, load_tokenizer
from megatron_mdm.data.manifest import Manifest, PromptResponseRecipe, manifest_path
from megatron_mdm.data.shards import prompts_path
from megatron_mdm.data.writer import ShardWriter

_LOG = logging.getLogger(__name__)
_BATCH = 1024
Encoded = tuple[list[int], list[int]]


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class FinetuningOptions:
    """How to prepare conversations.

    Attributes:
        prompt_key: JSON key of the prompt.
        response_key: JSON key of the response.
        turns: Answers of a conversation that are learned, given all before them.
        chat_template: Jinja file for messages; by default the tokenizer's own.
        eod_token: Ends a response; by default the tokenizer's own.
        on_error: What a bad record does: it stops the job, or is counted.
        valid_fraction: Hold out this share in (0, 1) of the records, by a hash, as PREFIX-valid.
        overwrite: Replace shards that something else made.
    """

    prompt_key: str = "prompt"
    response_key: str = "response"
    turns: Turns = "each"
    chat_template: Path | None = None
    eod_token: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    valid_fraction: float | None = None
    overwrite: bool = False


class Prepared(NamedTuple):
    """Shards of one side of the division.

    Attributes:
        prefix: Their path without `.bin` and `.idx`.
        manifest: What they hold.
        num_prompt_tokens: Tokens of all prompts, which are not learned.
    """

    prefix: Path
    manifest: Manifest
    num_prompt_tokens: int


def prepare_finetuning(
    inputs: Sequence[Path], tokenizer: str, output_prefix: Path, options: FinetuningOptions
) -> list[Prepared]:
    """Writes shards of prompts and responses.

    Prompts and responses are tokenised apart, for in generation the prompt stands alone. A special
    token in a prompt or response is ordinary text; one in the chat template is itself.

    Args:
        inputs: `.jsonl` files, perhaps compressed.
        tokenizer: A folder, a tokenizer.json or a Hugging Face name.
        output_prefix: Path of the shards; what is held out gets `-valid` after it.
        options: How.

    Returns:
        What was written, or what the same inputs had made before.

    Raises:
        DataError: An input, a record, the template or the tokenizer cannot be used, or there are
            shards of something else.
    """
    check_valid_fraction(options.valid_fraction)
    sources = open_lines(inputs, "write one conversation per line.")
    handle = load_tokenizer(tokenizer, options.eod_token)
    job = _Job(handle, load_chat_template(tokenizer, options.chat_template), sources, options)
    found = None if options.overwrite else job.find_reusable(output_prefix)
    return job.write(output_prefix) if found is None else found


class _Job:
    def __init__(
        self,
        tokenizer: TokenizerHandle,
        template: ChatTemplate,
        sources: Sequence[Source],
        options: FinetuningOptions,
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._sources, self._options = sources, options
        self._format = ConversationFormat(
            options.prompt_key,
            options.response_key,
            options.turns,
            template,
            tuple(tokenizer.special_tokens),
        )
        # Special tokens of a rendered conversation are the template's, since contents hold none.
        self._special = Tokenizer.from_str(tokenizer.backend.to_str())
        self._recipe = Recipe.of(
            tokenizer,
            [source.describe() for source in sources],
            text_key=options.prompt_key,
            valid_fraction=options.valid_fraction,
        )
        self._num_bad_records = 0
        self._has_messages: bool | None = None

    def find_reusable(self, output_prefix: Path) -> list[Prepared] | None:
        """What the same recipe made before, None where there is nothing."""
        prefixes = self._recipe.name_prefixes(output_prefix)
        manifests = find_reusable(prefixes, self._recipe, skip_bad=True)
        if not manifests:
            return None
        found = []
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            made, wanted = manifest.exchanges, self._make_pair_recipe("")
            found_later = {"prompts_sha256": "", "has_messages": None}
            if made is None or made.model_copy(update=found_later) != wanted:
                raise DataError(
                    f"{prefix} exists and its prompts and responses were made in another way: "
                    "replace it with --overwrite, or choose another --output-prefix."
                )
            prompts = np.fromfile(prompts_path(prefix), dtype="<i4")
            found.append(Prepared(prefix, manifest, int(prompts.sum())))
        _LOG.info("reusing %s: the same tokenizer and inputs made it", output_prefix)
        return found

    def write(self, output_prefix: Path) -> list[Prepared]:
        """Writes all sides; nothing appears unless all of them can."""
        manifests = self._recipe.start_manifests()
        prefixes = self._recipe.name_prefixes(output_prefix)
        with write_errors(output_prefix):
            output_prefix.parent.mkdir(parents=True, exist_ok=True)
            sides = list(map(_Side, prefixes, manifests))
            try:
                for batch in _batch_records(self._read_records()):
                    self._encode(batch, sides)
                for side in sides:
                    side.check(self._options.valid_fraction)
                return [
                    side.finish(self._make_pair_recipe(side.prompts_sha256), self._num_bad_records)
                    for side in sides
                ]
            finally:
                for side in sides:
                    side.writer.abort()

    def _read_records(self) -> Iterator[tuple[str, list[PromptResponsePair]]]:
        """The pairs of each good record, and how messages name it."""
        for name, pairs in read_objects(self._sources, self._format.read_pairs):
            if isinstance(pairs, BadRecord):
                self._refuse_or_count(name, pairs.complaint)
            else:
                yield name, pairs

    def _encode(
        self, batch: Sequence[tuple[str, list[PromptResponsePair]]], sides: Sequence[_Side]
    ) -> None:
        is_chat = [pairs[0].is_rendered for _, pairs in batch]
        self._has_messages = self._has_messages or any(is_chat)
        encoded: dict[bool, Iterator[Encoded]] = {}
        for rendered, backend in ((False, self._tokenizer.backend), (True, self._special)):
            chosen = [one for one, chat in zip(batch, is_chat, strict=True) if chat == rendered]
            texts = [text for _, pairs in chosen for text in flatten_pairs(pairs)]
            ids = iter(encode_texts(backend, texts))
            encoded[rendered] = zip(ids, ids, strict=True)
        fraction = self._options.valid_fraction
        for (name, pairs), chat in zip(batch, is_chat, strict=True):
            found = list(itertools.islice(encoded[chat], len(pairs)))
            if not all(prompt and response for prompt, response in found):
                self._refuse_or_count(
                    name, " has a prompt or response without a token: give it text."
                )
                continue
            held_out = fraction is not None and is_small_hash(
                join_conversation(pairs).encode("utf-8"), fraction
            )
            for prompt, response in found:
                sides[held_out].add(prompt, response)

    def _refuse_or_count(self, name: str, complaint: str) -> None:
        if self._options.on_error == "stop":
            raise DataError(f"{name}{complaint}")
        _LOG.warning("skipped %s%s", name, complaint)
        self._num_bad_records += 1

    def _make_pair_recipe(self, prompts_sha256: str) -> PromptResponseRecipe:
        return PromptResponseRecipe(
            prompt_key=self._options.prompt_key,
            response_key=self._options.response_key,
            turns=self._options.turns,
            chat_template=self._template.text,
            prompts_sha256=prompts_sha256,
            has_messages=self._has_messages,
        )


class _Side:
    """Shards of one side of the division as they grow."""

    def __init__(self, prefix: Path, manifest: Manifest) -> None:
        self.prefix, self._manifest = prefix, manifest
        self.writer = ShardWriter(prefix, manifest.dtype)
        self._prompts: list[int] = []
        self._largest = 0

    def add(self, prompt: list[int], response: list[int]) -> None:
        """Appends a pair."""
        tokens = np.array([*prompt, *response, self._manifest.eod_token_id], dtype=np.int64)
        self.writer.add_document(tokens)
        self._prompts.append(len(prompt))
        self._largest = max(self._largest, int(tokens.max()))

    def check(self, valid_fraction: float | None) -> None:
        """Refuses a side without pairs."""
        if self._prompts:
            return
        if valid_fraction is None:
            raise DataError(f"{self.prefix}: the input holds no conversations: give some.")
        raise DataError(
            f"--valid-fraction={valid_fraction} leaves {self.prefix} without pairs: use "
            "another share, or more data."
        )

    @property
    def prompts_sha256(self) -> str:
        """The hash of the file of prompt lengths."""
        return hashlib.sha256(self._encode_prompt_lengths()).hexdigest()

    def finish(self, recipe: PromptResponseRecipe, num_bad_records: int) -> Prepared:
        """Publishes prompts, tokens and last the manifest, without which none of them is used."""
        manifest_path(self.prefix).unlink(missing_ok=True)
        with open_whole_file(prompts_path(self.prefix)) as stream:
            stream.write(self._encode_prompt_lengths())
        manifest = self._manifest.model_copy(
            update={
                "num_documents": self.writer.num_documents,
                "num_tokens": self.writer.num_tokens,
                "max_token_id": self._largest,
                "num_bad_records": num_bad_records,
                "exchanges": recipe,
            }
        )
        self.writer.finish(manifest)
        return Prepared(self.prefix, manifest, sum(self._prompts))

    def _encode_prompt_lengths(self) -> bytes:
        return np.array(self._prompts, dtype="<i4").tobytes()


def _batch_records(
    records: Iterator[tuple[str, list[PromptResponsePair]]],
) -> Iterator[list[tuple[str, list[PromptResponsePair]]]]:
    while batch := list(itertools.islice(records, _BATCH)):
        yield batch
