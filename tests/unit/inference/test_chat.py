"""Conversations with exports: what is told, what comes back, commands, and the live display."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from megatron_mdm.cli.tree import main
from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.conversations import PLAIN_CHAT_TEMPLATE, ChatTemplate
from megatron_mdm.diffusion.samplers import SamplingStep
from megatron_mdm.hf.tokenizer_files import replace_chat_template
from megatron_mdm.inference.chat import command
from megatron_mdm.inference.chat.display import LiveAnswer
from megatron_mdm.inference.chat.telling import Teller, make_message
from megatron_mdm.inference.replay.pieces import PieceReader

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
FEW = ("--length", "6", "--temperature", "1")


@pytest.fixture
def chatting(exported, tmp_path):
    """An export whose tokenizer names a chat template."""

    def make(kind="mdm", template=PLAIN_CHAT_TEMPLATE):
        folder = shutil.copytree(exported[kind], tmp_path / f"{kind}-chat")
        replace_chat_template(folder, template)
        return folder

    return make


@pytest.fixture
def talk(monkeypatch, capsys):
    """Pipes lines into mdm chat and returns (exit status, stdout, stderr)."""

    def run(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", *map(str, arguments)]), *capsys.readouterr()

    return run


@pytest.fixture
def told(monkeypatch):
    """The prompts that the model gets, as text; it answers each with what is given here."""
    prompts: list[str] = []
    answers: list[str] = []

    def answer(self, draft):
        prompts.append(self._model.tokenizer.decode(draft.request.context))
        completion = answers.pop(0)
        if completion == "^C":
            raise KeyboardInterrupt
        return type("Sample", (), {"completion": completion, "new_ids": []})

    monkeypatch.setattr(command._Chat, "_write", answer)
    return prompts, answers


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_answers_are_those_of_generate_on_the_told_prompt(chatting, talk, tool, kind):
    folder = chatting(kind)
    status, out, err = talk(["the cat"], "--model", folder, *FEW)
    assert (status, err) == (0, "")
    asked = ("--model", folder, "--chat", "--prompt", "the cat", *FEW, "--jsonl")
    record = json.loads(tool(*asked)[1])
    assert record["prompt"] == "User: the cat\n\nAssistant:"
    assert out == record["completion"].removeprefix(" ").removesuffix("\n\n") + "\n"


def test_each_answer_is_told_all_that_was_said_before_it(chatting, talk, told):
    prompts, answers = told
    answers += ["A.|", "C.|", "E."]
    lines = ["a?", "", "c?", "/reset", "e?"]
    _, out, err = talk(lines, "--model", chatting(template=SHORT), "--system", "Be.")
    assert prompts == ["s Be.|u a?|a ", "s Be.|u a?|a A.|u c?|a ", "s Be.|u e?|a "]
    assert (out, err) == ("A.\nC.\nE.\n", "")


def test_an_interrupt_ends_an_answer_and_not_the_chat(chatting, talk, told):
    prompts, answers = told
    answers += ["^C", " B."]
    status, out, err = talk(["a?", "b?"], "--model", chatting())
    assert (status, out) == (0, "B.\n")
    assert err == "stopped: this message and its answer are forgotten\n"
    assert prompts[1] == "User: b?\n\nAssistant:"


def test_the_oldest_exchanges_are_left_out_where_all_do_not_fit(chatting, talk, told):
    prompts, answers = told
    answers += ["ok"] * 3
    _, _, err = talk(["1", "2", "3" * 60], "--model", chatting(template=MARKED), "--length", "4")
    assert [one.count("<user>") for one in prompts] == [1, 2]
    assert err.splitlines()[0].startswith("the oldest messages are forgotten")
    assert "error: Prompt 1 has" in err.splitlines()[1]
    assert len(err.splitlines()) == 2


def test_commands_change_how_answers_are_written_or_say_why_not(chatting, talk, tool):
    folder = chatting()
    lines = ["/temperature 1", "/length 5", "/steps 2", "/order random", "/seed 3", "the"]
    out = talk(lines, "--model", folder)[1]
    asked = ("--temperature", 1, "--length", 5, "--steps", 2, "--order", "random", "--seed", 3)
    record = json.loads(tool("--model", folder, "--chat", "--prompt", "the", *asked, "--jsonl")[1])
    assert out == record["completion"].removeprefix(" ").removesuffix("\n\n") + "\n"
    bad = ["/steps x", "/order up", "/length 0", "/length 400", "/stepps 3", "/steps", "/quit", "a"]
    status, out, err = talk(bad, "--model", folder)
    assert (status, out) == (0, "")
    found = err.splitlines()
    assert len(found) == 5
    assert found[0] == "error: /steps x needs a number: /help lists commands."
    assert "order='up' is unknown: use one of" in found[1]
    assert "max_new_tokens=0 must be 1 or more" in found[2]
    assert "400 of them asked for" in found[3]
    assert "/stepps is no command: /help lists them" in found[4]


def test_an_autoregressive_model_refuses_what_it_has_no_use_for(chatting, talk):
    _, out, err = talk(["/order entropy", "/steps 3", "/help"], "--model", chatting("ar"))
    assert [line.partition(" ")[0] for line in err.splitlines()[:3]] == [
        "error:",
        "error:",
        "/steps",
    ]
    assert out == ""


def test_a_model_without_a_template_is_told_the_plain_one_with_a_warning(exported, talk):
    status, out, err = talk(["the"], "--model", exported["mdm"], *FEW)
    assert status == 0
    assert out
    assert err.startswith(f"warning: {exported['mdm']} names no chat template: messages are told")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "There must be one model: give --model or --checkpoint."),
        (("--checkpoint", "x", "--tensor-parallel", "2"), "A chat runs in one process"),
        (("--checkpoint", "x", "--num-samples", "2"), "--num-samples=2 has no meaning in a chat"),
    ],
)
def test_what_does_not_fit_is_one_sentence(talk, arguments, complaint):
    status, _, err = talk([], *arguments)
    assert status == 2
    assert complaint in err
    assert len(err.splitlines()) == 1


def teller(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Teller(ChatTemplate(tokenizer, template), tokenizer)


@pytest.mark.parametrize(
    ("template", "completion", "answer"),
    [
        (PLAIN_CHAT_TEMPLATE, " One.\n\nTwo.\n\n", "One.\n\nTwo."),
        (PLAIN_CHAT_TEMPLATE, "One.", "One."),
        (PLAIN_CHAT_TEMPLATE, " a<|endoftext|>b", "ab"),
        (MARKED, "One.<|endoftext|> and more", "One."),
        (MARKED, "One.", "One."),
    ],
)
def test_the_templates_own_text_is_no_part_of_an_answer(
    byte_tokenizer_dir, template, completion, answer
):
    asked = [make_message("user", "Say it.")]
    assert teller(byte_tokenizer_dir, template).read_answer(asked, completion) == answer


def test_what_a_template_or_special_tokens_forbid_is_said(byte_tokenizer_dir):
    with pytest.raises(DataError, match=r"spells out the special token '<\|endof"):
        teller(byte_tokenizer_dir, MARKED).tell([make_message("user", "a<|endoftext|>")])
    with pytest.raises(DataError, match=r"refuses the conversation \(no\)"):
        teller(byte_tokenizer_dir, "{{ raise_exception('no') }}").tell([make_message("user", "a")])


def test_a_live_answer_shows_masks_what_is_new_and_no_end(byte_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer_dir)
    mask, end = len(tokenizer), tokenizer.eos_token_id
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    live = LiveAnswer(console, PieceReader(tokenizer), 1, mask, end)
    (a,), euro = tokenizer.encode("a"), tokenizer.encode("\u20ac")

    def state(*tokens):
        text = live.render(torch.tensor(tokens))
        return text.plain, [(one.start, one.end, one.style) for one in text.spans]

    assert state(mask, mask, mask) == ("\u2591\u2591\u2591", [(0, 3, "dim")])
    assert state(mask, a, mask)[1] == [(0, 1, "dim"), (1, 2, "bold cyan"), (2, 3, "dim")]
    # What was there is plain; nothing from the end of the text on is shown.
    assert state(*euro, a, end, end)[0] == "\u20aca"
    assert state(mask, a, mask)[1][1][2] == "bold cyan"
    with live:
        live(SamplingStep(0, torch.tensor([[9, a, mask]]), torch.zeros(1, 3)))
    assert "a" in console.file.getvalue()


def test_on_a_terminal_answers_are_shown_while_they_are_written(chatting, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "the", EOFError])

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("TERM", "xterm")
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    assert main(["chat", "--model", str(chatting()), *FEW]) == 0
    out, err = capsys.readouterr()
    # Six masks at first; the last step leaves none.
    assert out.count("\u2591") == 5 + 4 + 3 + 2 + 1
    assert err.splitlines()[0].endswith("/help lists commands, Ctrl-D ends")
    assert err.splitlines()[1] == "/quit or Ctrl-D ends the chat"
