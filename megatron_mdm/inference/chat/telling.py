"""What a model is told of a conversation, as its fine-tuning told it, and what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.conversations import ChatTemplate

Message = dict[str, str]
# Stands for an answer, to see what the template puts around one; a template may trim blanks.
_ANSWER = "\u2042"


class Teller:
    """Tells conversations.

    Args:
        template: Of the model's fine-tuning.
        tokenizer: The model's, a fast one of transformers.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        self._template = template
        added = tokenizer.added_tokens_decoder.values()
        self._special_tokens = [token.content for token in added if token.special]

    def tell(self, messages: Sequence[Message]) -> str:
        """Writes messages as the prompt of the next answer.

        Args:
            messages: Roles and contents.

        Returns:
            The prompt.

        Raises:
            DataError: A message spells out a special token, or the template refuses them.
        """
        for message in messages:
            content = message["content"]
            spelled = next((one for one in self._special_tokens if one in content), None)
            if spelled is not None:
                raise DataError(
                    f"The message spells out the special token {spelled!r}, which only the "
                    "template may: leave it out."
                )
        return self._render(messages, is_prompt=True)

    def read_answer(self, messages: Sequence[Message], completion: str) -> str:
        """Takes the template's own text off an answer.

        Args:
            messages: What was told.
            completion: What the model wrote, up to the end of the text.

        Returns:
            The content of the answer.
        """
        prompt = self._render(messages, is_prompt=True)
        whole = self._render([*messages, make_message("assistant", _ANSWER)], is_prompt=False)
        before, _, after = whole.removeprefix(prompt).partition(_ANSWER)
        answer = completion.removeprefix(before)
        # A mark that ends an answer ends it wherever it stands; blank lines may be part of one.
        end = after.strip()
        answer = answer.partition(end)[0] if end else answer.removesuffix(after)
        # An answer comes back in later prompts, where special tokens are the template's alone.
        for token in self._special_tokens:
            answer = answer.replace(token, "")
        return answer

    def _render(self, messages: Sequence[Message], *, is_prompt: bool) -> str:
        try:
            return self._template(messages, is_prompt=is_prompt)
        except TemplateError as error:
            raise DataError(
                f"The chat template refuses the conversation ({error}): see what it takes."
            ) from None


def make_message(role: str, content: str) -> Message:
    """A message of a conversation."""
    return {"role": role, "content": content}
