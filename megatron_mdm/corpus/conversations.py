"""Conversations as JSON, and the prompts and responses that they teach, as text.

A line is `{"prompt": ..., "response": ...}` or
`{"messages": [{"role": ..., "content": ...}, ...]}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.records import BadRecordError, check_text, name_some
from megatron_mdm.corpus.tokenizer import find_tokenizer, load_tokenizer
from megatron_mdm.corpus.tokenizer_formats import find_foreign
from megatron_mdm.corpus.tokenizer_settings import read_chat_settings

# For tokenizers without a template of their own.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_ASSISTANT = "assistant"
Turns = Literal["each", "last"]


class PromptResponsePair(NamedTuple):
    """A prompt and the response that is learned, as the model will see them.

    Attributes:
        prompt: All that comes before.
        response: What the model should say.
        is_rendered: Is it by a chat template, whose special tokens are special?
    """

    prompt: str
    response: str
    is_rendered: bool = False


class ChatTemplate:
    """Turns messages into text by a Jinja template, in a sandbox.

    Args:
        tokenizer: Of transformers, whose special tokens the template may name.
        text: The template.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self.text = tokenizer, text

    def __call__(self, messages: Sequence[Mapping[str, str]], *, is_prompt: bool) -> str:
        """Renders messages.

        Args:
            messages: Roles and contents.
            is_prompt: End with what introduces the assistant's answer.

        Returns:
            The text.

        Raises:
            TemplateError: The template does not take these messages.
        """
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.text,
                add_generation_prompt=is_prompt,
                tokenize=False,
            )
        )


def load_chat_template(tokenizer: str, template: Path | None = None) -> ChatTemplate:
    """Loads a chat template.

    Args:
        tokenizer: A folder, a tokenizer.json or a Hugging Face name; its own template is used.
        template: A file with another; None: the tokenizer's, or else `PLAIN_CHAT_TEMPLATE`.

    Raises:
        DataError: The file cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(tokenizer).expanduser()
    loaded: Any
    file = find_tokenizer(path)
    if file is not None and find_foreign(file) is not None:
        loaded = PreTrainedTokenizerFast(
            tokenizer_object=load_tokenizer(tokenizer).backend, **read_chat_settings(file.parent)
        )
    elif path.is_file():
        loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
    else:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if template is None:
        return ChatTemplate(loaded, loaded.chat_template or PLAIN_CHAT_TEMPLATE)
    try:
        return ChatTemplate(loaded, template.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--chat-template={template} cannot be read ({error}): give a Jinja file."
        ) from error


@dataclass(frozen=True)
class ConversationFormat:
    """How a line becomes prompt-response pairs.

    Attributes:
        prompt_key: Key of the prompt.
        response_key: Key of the response.
        turns: Of a conversation with several answers: `each` is learned, given all that was said
            before it, or the `last` alone.
        template: Template of messages; prompts and responses are taken as they stand.
        special_tokens: Tokens that a message must not spell out, where a template may.
    """

    prompt_key: str
    response_key: str
    turns: Turns
    template: ChatTemplate
    special_tokens: tuple[str, ...] = ()

    def read_pairs(self, fields: dict[str, Any]) -> list[PromptResponsePair]:
        """Reads the pairs of a line.

        Args:
            fields: Its object.

        Returns:
            At least one pair.

        Raises:
            BadRecordError: It holds none, or what cannot be used.
        """
        if "messages" in fields:
            return self._pair_answers(self._check_messages(fields["messages"]))
        texts = []
        for key in (self.prompt_key, self.response_key):
            if key not in fields:
                raise BadRecordError(
                    f" has neither messages nor {key!r}, only {name_some(fields)}: choose keys "
                    "with --prompt-key and --response-key."
                )
            text = check_text(fields[key], key)
            if not text:
                raise BadRecordError(f": {key} is empty: give it text, or leave the line out.")
            texts.append(text)
        return [PromptResponsePair(texts[0], texts[1])]

    def _check_messages(self, found: Any) -> list[dict[str, str]]:
        if not isinstance(found, list) or not found:
            raise BadRecordError(": messages has to be a list with a message: repair the line.")
        messages = []
        for number, message in enumerate(found):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise BadRecordError(f": message {number} needs role and content: repair the line.")
            checked = {
                key: check_text(message[key], f"{key} of message {number}")
                for key in ("role", "content")
            }
            spelled = next((one for one in self.special_tokens if one in checked["content"]), None)
            if spelled is not None:
                raise BadRecordError(
                    f": message {number} spells out the special token {spelled!r}, which only the "
                    "template may: remove it."
                )
            messages.append(checked)
        return messages

    def _pair_answers(self, messages: list[dict[str, str]]) -> list[PromptResponsePair]:
        answers = [place for place, one in enumerate(messages) if one["role"] == _ASSISTANT]
        if not answers or answers[0] == 0:
            what = "begins with" if answers else "has no"
            raise BadRecordError(
                f": the conversation {what} message of the role {_ASSISTANT!r}, and every answer "
                "needs something before it: repair the line."
            )
        pairs = []
        for place in answers if self.turns == "each" else answers[-1:]:
            try:
                prompt = self.template(messages[:place], is_prompt=True)
                whole = self.template(messages[: place + 1], is_prompt=False)
            except TemplateError as error:
                raise BadRecordError(
                    f": the chat template refuses it ({error}): repair one."
                ) from error
            if not whole.startswith(prompt) or len(whole) == len(prompt):
                raise BadRecordError(
                    f": with its answer, message {place}, the rendered conversation does not "
                    "continue the rendered prompt: use a template that only appends."
                )
            if not messages[place]["content"]:
                raise BadRecordError(f": message {place} is empty: give it text, or remove it.")
            pairs.append(PromptResponsePair(prompt, whole[len(prompt) :], is_rendered=True))
        return pairs


def join_conversation(pairs: Sequence[PromptResponsePair]) -> str:
    """Spells a conversation as one text, which decides on what side of a division it falls.

    Args:
        pairs: Its pairs, at least one.

    Returns:
        Its longest prompt, the last one, with its response.
    """
    return "\0".join((pairs[-1].prompt, pairs[-1].response))


def flatten_pairs(pairs: Sequence[PromptResponsePair]) -> Iterator[str]:
    """Puts prompts and responses in a row.

    Args:
        pairs: Any number.

    Yields:
        The prompt and the response of each.
    """
    for pair in pairs:
        yield pair.prompt
        yield pair.response
