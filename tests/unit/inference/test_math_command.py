"""tools/evaluate_math.py: every text is written down, and the figures are those of the texts."""

from __future__ import annotations

import json

import pytest

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.options import run_command
from megatron_mdm.inference.math.command import run
from megatron_mdm.inference.math.problems import (
    MathProblem,
    judge,
    read_problems,
    summarize,
)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def problems(tmp_path):
    """Problems in the words of the tiny tokenizer; some have the answers that it may give."""
    lines = [
        {"prompt": f"w{place + 2} w5", "response": f"w3 #### {place}", "answer": f"{place}"}
        for place in range(12)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(folder, problems, out, *words):
    given = ["--model", str(folder), "--data", str(problems), "--out", str(out), *words]
    run_command(run, None, given)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), samples


def last_number(text):
    """The number of the last word, for a model that knows the words w2..w18 alone."""
    words = [word for word in text.split() if word.startswith("w")]
    return int(words[-1][1:]) if words else None


@pytest.mark.parametrize("is_causal", [False, True])
def test_figures_are_those_of_the_texts(export, tiny, problems, tmp_path, is_causal, capsys):
    folder = export(tiny(is_causal=is_causal))[0]
    words = ["--length", "6", "--temperature", "1", "--seed", "3"]
    results, samples = evaluate(folder, problems, tmp_path / "out", *words)
    assert len(samples) == results["num_problems"] == 12
    right = 0
    for place, sample in enumerate(samples):
        assert sample["prompt"] == f"w{place + 2} w5"
        number = last_number(sample["text"])
        assert sample["is_right"] == (number == place)
        assert (sample["answer"] is None) == (number is None)
        right += number == place
    assert results["accuracy"] == right / 12
    assert results["generation"]["temperature"] == 1.0
    assert results["objective"] == ("ar" if is_causal else "mdm")
    assert f"{right / 12:.1%}" in capsys.readouterr().out
    # A second run, in other batches, gives the same.
    again, texts = evaluate(folder, problems, tmp_path / "again", *words, "--batch-size", "5")
    assert (again, texts) == (results, samples)
    _, others = evaluate(folder, problems, tmp_path / "other", *words[:-1], "4")
    assert others != samples


def test_shares_errors_and_intervals_are_counted():
    problems = [MathProblem("p", "72")] * 4
    texts = ["#### 72", "It is 72.0", "#### 71", "none"]
    figures = summarize(judge(problems, texts))
    assert figures["accuracy"] == 0.5
    assert figures["accuracy_marked"] == 0.25
    assert figures["standard_error"] == pytest.approx(0.25)
    assert figures["found"] == {"hashes": 2, "last_number": 1, "none": 1}


def test_a_file_of_another_form_is_refused(tmp_path):
    def refusal(content, limit=None, kind=DataError):
        path = tmp_path / "data.jsonl"
        path.write_text(content)
        with pytest.raises(kind) as caught:
            read_problems(path, limit)
        return str(caught.value)

    assert "holds no problem" in refusal("\n")
    assert "line 1 is not valid JSON" in refusal("{\n")
    assert "line 2 has no texts" in refusal('{"prompt": "p", "response": "1"}\n{"prompt": "p"}\n')
    assert "line 1 has no texts" in refusal("[]\n")
    assert "no number for an answer in 'many'" in refusal('{"prompt": "p", "response": "many"}\n')
    assert "--limit=0 is less than 1" in refusal("\n", 0, ConfigError)
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl")


def test_several_samples_a_problem_are_refused(export, tiny, problems, tmp_path):
    folder = export(tiny())[0]
    with pytest.raises(ConfigError, match="--num-samples=2 has no meaning here"):
        evaluate(folder, problems, tmp_path / "out", "--num-samples", "2")
