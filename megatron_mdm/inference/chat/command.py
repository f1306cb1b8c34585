"""The command line of mdm chat: messages in, answers out, on a terminal or through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console

from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.remarks import note
from megatron_mdm.inference.chat.display import LiveAnswer
from megatron_mdm.inference.chat.telling import Message, Teller, make_message
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.opening import NO_MODEL, ModelChoice
from megatron_mdm.inference.options import AS_THE_MODEL, GenerationOptions
from megatron_mdm.inference.output import StandardOutput, print_generated
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.repetition import RepetitionWatch
from megatron_mdm.inference.replay.pieces import PieceReader
from megatron_mdm.inference.sampling import Draft, Sample, generate, make_drafts

# Options that a command changes: its field, how its value is read, what it does.
_SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "steps": ("num_steps", int, "steps of an answer; more are slower and better"),
    "order": ("order", str, "which positions come first"),
    "seed": ("seed", int, "another seed, another answer"),
    "length": ("max_new_tokens", int, "most tokens of an answer"),
    "temperature": ("temperature", float, "0: the likeliest token; 1: as the model has learned"),
}
_OTHERS = {"reset": "forget the conversation", "help": "this list", "quit": "end; so does Ctrl-D"}
_PROMPT = "> "


def run(
    *,
    choice: ModelChoice = NO_MODEL,
    system: str | None = None,
    options: GenerationOptions = AS_THE_MODEL,
) -> None:
    """Talks with a model that was fine-tuned on conversations.

    On a terminal an answer is shown while it is unmasked, and Ctrl-C stops it; /help lists
    commands. Otherwise a message is a line of the standard input, and answers are printed plainly.

    Args:
        choice: The model, in one process.
        system: A first message of the role system.
        options: How answers are written.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    if options.num_samples != 1:
        raise ConfigError(
            f"--num-samples={options.num_samples} has no meaning in a chat: leave it."
        )
    if choice.tensor_parallel != 1 or choice.pipeline_parallel != 1:
        raise ConfigError("A chat runs in one process: leave out --tensor-parallel and the like.")
    with choice.open() as model:
        teller = Teller(choice.open_template(), model.tokenizer)
        model.run_on_driver(_Chat(model, teller, options, system).run)


class _Chat:
    def __init__(
        self, model: TextModel, teller: Teller, options: GenerationOptions, system: str | None
    ) -> None:
        self._model, self._teller, self._options = model, teller, options
        if options.max_new_tokens is None:
            # Room for the question.
            most = min(model.facts.decoding.max_new_tokens, model.facts.max_length // 2)
            self._options = _change(options, "max_new_tokens", most)
        self._first = [] if system is None else [make_message("system", system)]
        self._said: list[Message] = []
        self._output = StandardOutput()
        self._console: Console | None = None
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._check(self._options)

    def run(self) -> None:
        """Answers until the messages end."""
        if self._console is not None:
            self._tell(f"{self._model.facts.name}: /help lists commands, Ctrl-D ends")
        for line in self._read_lines():
            if not line.strip():
                continue
            try:
                if not line.startswith("/"):
                    self._answer(line)
                elif not self._obey(line):
                    return
            except MdmError as error:
                self._tell(f"error: {error}")
            if not self._output.is_open:
                return

    def _read_lines(self) -> Iterator[str]:
        if self._console is None:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            # Lines can then be edited, and called back.
            import readline  # noqa: F401
        while True:
            try:
                yield input(_PROMPT)
            except EOFError:
                self._output.write("")
                return
            except KeyboardInterrupt:
                self._output.write("")
                self._tell("/quit or Ctrl-D ends the chat")

    def _obey(self, line: str) -> bool:
        """Does what a command says; tells whether the chat goes on."""
        name, _, given = line[1:].strip().partition(" ")
        if name == "quit":
            return False
        if name == "help":
            told = {f"{one} VALUE": about for one, (_, _, about) in _SETTINGS.items()} | _OTHERS
            self._tell("\n".join(f"/{one:18}{about}" for one, about in told.items()))
        elif name == "reset":
            self._said = []
        elif name in _SETTINGS:
            field, read, _ = _SETTINGS[name]
            try:
                value = read(given.strip()) if given.strip() else None
            except ValueError:
                raise ConfigError(
                    f"/{name} {given} needs a number: /help lists commands."
                ) from None
            options = _change(self._options, field, value)
            self._check(options)
            self._options = options
        else:
            raise ConfigError(
                f"/{name} is no command: /help lists them, and a message that begins with a slash "
                "needs a space before it."
            )
        return True

    def _check(self, options: GenerationOptions) -> None:
        # Options are checked where a prompt is.
        make_drafts([Prompt(prompt="a")], options, self._model.facts, self._model.tokenizer)

    def _answer(self, text: str) -> None:
        question = make_message("user", text)
        draft, messages = self._draft(question)
        try:
            sample = self._write(draft)
        except KeyboardInterrupt:
            self._tell("stopped: this message and its answer are forgotten")
            return
        answer = self._teller.read_answer(messages, sample.completion)
        self._said = [*messages[len(self._first) :], make_message("assistant", answer)]
        if self._console is not None:
            answer = answer.strip("\n")
        print_generated(self._output, answer, 0, len(answer))
        watch = RepetitionWatch(self._model.facts.corpus_nats)
        watch.add(sample.new_ids)
        remark = watch.remark(draft.decoding, lambda name, value: f"/{name} {value}")
        if remark is not None:
            note(remark)

    def _draft(self, question: Message) -> tuple[Draft, list[Message]]:
        """The request for an answer, without the oldest exchanges if all do not fit."""
        facts, tokenizer = self._model.facts, self._model.tokenizer
        room = facts.max_length - self._options.build_decoding(facts.decoding).max_new_tokens
        said = list(self._said)
        while True:
            messages = [*self._first, *said, question]
            prompt = self._teller.tell(messages)
            is_short = len(tokenizer.encode(prompt, add_special_tokens=False)) <= room
            if is_short or not said:
                break
            said = said[2:]
        if len(said) < len(self._said):
            self._tell(
                "the oldest messages are forgotten: the conversation is longer than the model"
            )
        (draft,) = make_drafts([Prompt(prompt=prompt)], self._options, facts, tokenizer)
        return draft, messages

    def _write(self, draft: Draft) -> Sample:
        if self._console is None:
            return next(generate(self._model, [draft], 1, progress=False))
        facts = self._model.facts
        live = LiveAnswer(
            self._console,
            PieceReader(self._model.tokenizer),
            len(draft.request.context),
            facts.mask_token_id,
            draft.decoding.end_token_id,
        )
        with live:
            return next(generate(self._model, [draft], 1, progress=False, callback=live))

    def _tell(self, remark: str) -> None:
        print(remark, file=sys.stderr, flush=True)  # noqa: T201 - for the user


def _change(options: GenerationOptions, field: str, value: Any) -> GenerationOptions:
    changes: Any = {field: value}
    return replace(options, **changes)
