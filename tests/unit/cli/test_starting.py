"""`mdm init` on real shards: what it writes passes a dry run, and what cannot be is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megatron_mdm.cli.tree import main
from megatron_mdm.config import load_config
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe

WORDS = ("drafos", "is", "the", "composer", "of", "degrun", "and", "the", "keeper")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with shards of 300 documents and a tenth held out."""
    root = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 60)) for _ in range(300)]
    (root / "text.txt").write_text("\n\n".join(texts))
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    (root / "text.jsonl").write_text(lines)
    save_tokenizer(train_byte_level_bpe(iter(texts), 280), root / "tokenizer")
    options = PreprocessOptions(valid_fraction=0.1)
    preprocess([root / "text.jsonl"], str(root / "tokenizer"), root / "web", options)
    return root


def init(corpus, out, *more, size="tiny"):
    return main(["init", "--train", str(corpus / "web"), "--size", size, "--out", str(out), *more])


@pytest.mark.parametrize("size", ["tiny", "smdm-6M"])
def test_what_is_written_can_be_run(corpus, tmp_path, capsys, size):
    out = tmp_path / "run.yaml"
    assert init(corpus, out, "--epochs", "3", size=size) == 0
    said = capsys.readouterr().out
    config = load_config(out)
    assert config.schedule.epochs == 3
    assert config.model.vocab_size == 280
    assert config.data.tokenizer == str(corpus / "tokenizer")
    assert [source.path for source in config.data.valid] == [str(corpus / "web-valid")]
    assert re.search(r" 3(\.\d+)? epochs: ", said)
    assert " train --config " in said
    assert out.read_text().count("#") > 8
    # As the file's own comment says, from a fresh shell.
    assert main(["train", "--config", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == said.splitlines()[2]


def test_hours_become_tokens_at_the_speed_of_this_machine(corpus, tmp_path, capsys):
    lengths = []
    for hours in ("0.01", "1"):
        out = tmp_path / f"{hours}.yaml"
        assert init(corpus, out, "--hours", hours) == 0
        lengths.append(load_config(out).schedule.tokens)
    # The machine may be busy with something else in one of the measurements.
    assert 20 < lengths[1] / lengths[0] < 500
    assert "of steps here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "tin", "--epochs", "1"], "--size=tin is not known: give tiny, small or a"),
        (["--size", "tiny"], "How long the run is, is missing, and there is no terminal to ask"),
        (["--epochs", "1"], "--size is missing, and there is no terminal to ask: give one of tiny"),
        (["--size", "tiny", "--epochs", "0"], "--epochs=0 has to be above 0."),
        (["--size", "tiny", "--epochs", "1", "--hours", "1"], "--epochs and --hours both say"),
        (["--size", "tiny", "--epochs", "1", "--out", "run.json"], "has to end in .yaml or .yml."),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_a_sentence(
    corpus, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--train", str(corpus / "web"), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_and_shards_have_to_be_there(corpus, tmp_path, capsys):
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    assert init(corpus, out, "--epochs", "1") == 2
    assert "exists: replace it with --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert init(corpus, out, "--epochs", "1", "--overwrite") == 0
    assert main(["init", "--train", str(tmp_path / "none"), "--size", "tiny", "--epochs", "1"]) == 2
    assert "has no shards: make them with mdm prepare" in capsys.readouterr().err


def test_a_run_that_is_odd_gets_a_remark(corpus, tmp_path, capsys):
    out = tmp_path / "run.yaml"
    init(corpus, out, "--epochs", "3000")
    assert "note: each window is seen 3,000 times" in capsys.readouterr().out
    init(corpus, out, "--epochs", "0.1", "--overwrite")
    assert "steps are few to learn from" in capsys.readouterr().out
