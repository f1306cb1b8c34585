"""GSM8K's two published forms become the same pairs, and lines of another form are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gsm8k_examples import sums, write_lines

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.papers.gsm8k import convert, read_hub, read_problems

QUESTION = "Natalia sold 48 clips in April and half as many in May. How many in all?"
ANSWER = (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"
)
TOOL = Path(__file__).parents[3] / "tools/prepare_gsm8k.py"


def converted(path, tmp_path, style):
    output = tmp_path / "out" / f"{style}.jsonl"
    count = convert(read_problems([path]), output, style)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == count
    return lines


@pytest.mark.parametrize(
    ("style", "response"),
    [
        ("text", " In May she sold 48/2 = 24 clips.\nIn all 48+24 = 72 clips.\n#### 72"),
        ("annotated", f" {ANSWER}"),
        ("equations", " <<48/2=24>> <<48+24=72>> #### 72"),
    ],
)
def test_a_problem_is_framed_as_a_prompt_and_a_response(tmp_path, style, response):
    path = write_lines(tmp_path / "train.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    (line,) = converted(path, tmp_path, style)
    assert line == {
        "prompt": f"Question: {QUESTION}\nAnswer:",
        "response": response,
        "answer": "72",
    }


def test_the_augmented_form_gives_what_the_published_one_gives(tmp_path):
    published = write_lines(tmp_path / "a.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    augmented = tmp_path / "b.txt"
    augmented.write_text(f"{QUESTION}||<<48/2=24>> <<48+24=72>> #### 72\n")
    assert converted(published, tmp_path, "equations") == converted(
        augmented, tmp_path, "equations"
    )


def test_every_problem_comes_through_in_order(tmp_path):
    problems = sums(50, 99, seed=0)
    lines = converted(write_lines(tmp_path / "s.jsonl", problems), tmp_path, "text")
    for problem, line in zip(problems, lines, strict=True):
        assert problem["question"] in line["prompt"]
        assert "<<" not in line["response"]
        assert line["response"].endswith(f"#### {line['answer']}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "q"}\n', r"a\.jsonl line 1 has no text 'answer'"),
        ("a.jsonl", '\n{"question": "q", "answer": "72"}\n', r"line 2 has no answer after '####'"),
        ("a.jsonl", '{"question": " ", "answer": "#### 2"}\n', "line 1 has no question"),
        ("a.jsonl", '{"question": "q", "answer": 3}\n', "line 1 has no text 'answer'"),
        ("a.jsonl", "{question}\n", "line 1 is not valid JSON"),
        ("a.jsonl", "[]\n", "line 1 is no JSON object"),
        ("a.txt", "q <<1+1=2>> #### 2\n", r"has no '\|\|' between question and answer"),
        ("a.jsonl", "\n", "The input holds no problem"),
    ],
)
def test_lines_of_another_form_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        convert(read_problems([path]), tmp_path / "out.jsonl", "text")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_problem_without_annotations_has_no_equations(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "It is 2.\n#### 2"}])
    with pytest.raises(DataError, match=r"has no annotations .* use --style text"):
        convert(read_problems([path]), tmp_path / "out.jsonl", "equations")


def test_the_tool_says_how_many_and_what_is_missing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", sums(3, 9, seed=1))
    output = tmp_path / "out.jsonl"
    command = [sys.executable, str(TOOL), "--output", str(output), "--input"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{output}: 3 problems\n"
    missing = subprocess.run(
        [*command, str(tmp_path / "none.jsonl")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "none.jsonl cannot be read" in missing.stderr


def test_problems_come_from_a_data_set_with_the_layout_of_the_hub(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    problems = sums(5, 20, seed=1)
    write_lines(folder / "held_out.jsonl", problems)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: test\n    path: held_out.jsonl\n---\n"
    )
    direct = list(read_problems([folder / "held_out.jsonl"]))
    assert list(read_hub(str(folder), "test")) == direct
    with pytest.raises(DataError, match=r"The split train of .*gsm8k cannot be fetched"):
        list(read_hub(str(folder), "train"))
    with pytest.raises(DataError, match=r"cannot be fetched .*: give files with --input"):
        list(read_hub(str(tmp_path / "gone"), "test"))
