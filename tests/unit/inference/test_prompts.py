from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.inference.prompts import STANDARD_INPUT, Prompt, read_prompts


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_of_json_are_requests(tmp_path):
    path = write(
        tmp_path,
        "p.jsonl",
        '{"prompt": "a\\nb"}\n\n{"prompt": "", "suffix": "c", "length": 3}\r\n'
        '{"prompt": "x\u2028y", "suffix": null}',
    )
    assert read_prompts(path) == [
        Prompt(prompt="a\nb"),
        Prompt(prompt="", suffix="c", length=3),
        Prompt(prompt="x\u2028y"),
    ]


def test_a_list_in_json_is_requests(tmp_path):
    path = write(tmp_path, "p.json", '[{"prompt": "a", "suffix": "b", "length": 2}]')
    assert read_prompts(path) == [Prompt(prompt="a", suffix="b", length=2)]


def test_the_infilling_prompts_of_the_demo_can_be_read():
    path = Path(__file__).resolve().parents[3] / "configs" / "demo_corpus_infill.json"
    requests = read_prompts(path)
    assert len(requests) >= 3
    assert all(request.suffix and request.length for request in requests)


def test_plain_text_is_a_prompt_a_line(tmp_path):
    path = write(tmp_path, "p.txt", 'one\n\n  {"two": 2}\r\nthree\u2028\x0bthree\n')
    prompts = [request.prompt for request in read_prompts(path)]
    assert prompts == ["one", '  {"two": 2}', "three\u2028\x0bthree"]


def test_the_format_can_be_given(tmp_path):
    path = write(tmp_path, "p.txt", '{"prompt": "a"}')
    assert read_prompts(path, "jsonl") == [Prompt(prompt="a")]
    assert read_prompts(path) == [Prompt(prompt='{"prompt": "a"}')]


def test_the_standard_input_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_prompts(STANDARD_INPUT) == [Prompt(prompt="one"), Prompt(prompt="two")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["b"]\n', 'line 3 is ["b"]: write an object'),
        ("p.jsonl", '{"prompt": "a", "sufix": "b"}', "line 1 has the unknown field 'sufix'"),
        ("p.jsonl", '{"suffix": "b"}', "line 1 has no prompt"),
        ("p.jsonl", '{"prompt": 3}', "line 1 has prompt=3, which should be a valid string"),
        ("p.jsonl", '{"prompt": "a", "length": 0}', "length=0, which should be greater than 0"),
        ("p.jsonl", '{"prompt": "a", "length": true}', "line 1 has length=true"),
        ("p.json", '[{"prompt": "a"}, 4]', "entry 2 is 4: write an object"),
        ("p.json", '{"prompt": "a"}', "holds dict at its top: write a list"),
        ("p.json", "[", "is not valid JSON"),
        ("p.txt", b"good\nb\xffd\n", "line 2 is not UTF-8"),
        ("p.txt", "\n \n", "holds no prompt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
