"""The remark on texts that repeat themselves, and the colour of what was generated."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.inference.output import StandardOutput, print_generated
from megatron_mdm.inference.repetition import RepetitionWatch

GREEDY = Decoding(order="confidence", temperature=0.0)
DRAWN = Decoding(order="random", temperature=1.0)
SAME, VARIED = [7] * 40, list(range(40))


def remark(texts, corpus_nats=None, decoding=GREEDY):
    watch = RepetitionWatch(corpus_nats)
    for text in texts:
        watch.add(text)
    return watch.remark(decoding, lambda name, value: f"--{name} {value}")


def test_entropy_is_compared_with_what_the_corpus_and_the_length_allow():
    told = remark([[1, 2] * 200], 5.9)
    assert told == (
        "the text repeats itself: 0.7 nats per token where the corpus has 5.9; "
        "try --temperature 1 or --order random"
    )
    told = remark([[1, 2] * 20], 5.9)
    assert "0.7 nats per token where the corpus has 5.9 and so short a text 3.7;" in told
    assert remark([VARIED], 5.9) is None
    # Exactly half of what 16 tokens can have: 4 tokens, each 4 times.
    assert remark([[1, 2, 3, 4] * 4], 5.9) is None
    assert remark([[1, 2, 3] * 5 + [3]], 5.9) is not None
    # A corpus of two words is no reason to complain.
    assert remark([[1, 2] * 20], math.log(2)) is None


def test_without_a_corpus_only_plain_repetition_counts():
    assert "one token makes 100% of it; try" in remark([SAME])
    assert "5% of its pairs of tokens are distinct; try" in remark([[1, 2] * 20])
    assert remark([VARIED]) is None
    assert remark([[1] * 20 + VARIED[2:22]]) is None
    # Most texts have to.
    assert remark([SAME, VARIED]) is None
    assert remark([SAME, SAME, VARIED]) is not None


def test_short_texts_tell_nothing():
    assert remark([]) is None
    assert remark([[7] * 15], 5.9) is None


def test_advice_is_what_was_not_tried():
    hot, drawn = Decoding(order="entropy", temperature=1.0), Decoding(8, "random", 0.5)
    assert remark([SAME], None, hot).endswith("; try --order random")
    assert remark([SAME], None, drawn).endswith("; try --temperature 1")
    assert remark([SAME], None, DRAWN).endswith("; the model may need more training")


def test_tokens_drawn_from_a_corpus_do_not_repeat_themselves():
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 4097)
    shares /= shares.sum()
    nats = -(shares * np.log(shares)).sum()
    for length in (16, 64, 256):
        texts = rng.choice(4096, (50, length), p=shares).tolist()
        assert all(remark([text], nats) is None for text in texts)
        assert all(remark([text]) is None for text in texts)


@pytest.mark.parametrize("nats", [None, 5.0])
def test_the_tool_notes_it_once_on_the_standard_error(exported, tool, tmp_path, nats):
    folder = shutil.copytree(exported["mdm"], tmp_path / "model")
    if nats is not None:
        metadata = {"unigram_nats_per_token": nats}
        (folder / "training_metadata.json").write_text(json.dumps(metadata))
    # Without anything to see all positions have the same logits.
    same = ("--temperature", 0, "--order", "confidence", "--steps", 1, "--end-of-text", "keep")
    status, out, err = tool("--model", folder, "--prompt", "", "--length", 40, *same)
    assert status == 0
    assert out
    assert err.startswith("note: the text repeats itself: ")
    assert ("where the corpus has 5.0" in err) == (nats is not None)
    assert len(err.splitlines()) == 1


def test_what_was_generated_has_a_colour_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)

    def show():
        print_generated(StandardOutput(), "before [b]new[/b] after", 7, 17)
        return capsys.readouterr().out

    plain = "before [b]new[/b] after\n"
    assert show() == plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert show() == plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert show() == "before \x1b[36m[b]new[/b]\x1b[0m after\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert show() == plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert show() == plain
