from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.studies.stdlib_corpus import gather_python_corpus

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "lib"
    files = {f"m{number:02}.py": f"x = {number}\n" for number in range(40)}
    files |= {"package/inner.py": "y = 'é'\n", "package/notes.txt": "no", "empty.py": ""}
    files |= {f"{folder}/z.py": "no" for folder in ("test", "a/tests", "idlelib", "__pycache__")}
    files |= {f"{folder}/z.py": "no" for folder in ("site-packages/p", "turtledemo")}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "dangling.py").symlink_to(root / "gone.py")
    return root


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_corpus_has_every_source_once_sorted(root, tmp_path):
    counts = gather_python_corpus(root, tmp_path / "out", 0.3)
    train, valid = (read(tmp_path / "out" / f"{part}.jsonl") for part in ("train", "valid"))
    for part in (train, valid):
        names = [document["name"] for document in part]
        assert names == sorted(names)
        assert all((root / x["name"]).read_text("utf-8") == x["text"] for x in part)
    names = {document["name"] for document in train + valid}
    assert names == {f"m{number:02}.py" for number in range(40)} | {"package/inner.py"}
    assert (len(train), len(valid)) == counts[:2]
    assert sum(counts[:2]) == 41
    assert 4 <= counts.valid_documents <= 20
    assert counts.train_bytes == sum(len(x["text"].encode()) for x in train)


def test_a_file_stays_on_its_side_when_another_comes(root, tmp_path):
    gather_python_corpus(root, tmp_path / "a", 0.3)
    (root / "another.py").write_text("z = 1\n")
    gather_python_corpus(root, tmp_path / "b", 0.3)
    held_out = [{x["name"] for x in read(tmp_path / d / "valid.jsonl")} for d in "ab"]
    assert held_out[0] ^ held_out[1] <= {"another.py"}


def test_functions_are_documents_with_their_decorators(tmp_path):
    root = tmp_path / "lib"
    root.mkdir()
    first = "@once\n@twice(\n    2\n)\ndef first():\n    return '\\d\f'\n"
    second = "async def second():\n    def inner():\n        pass\n"
    source = f"import os\n\n\n{first}\nclass Other:\n    def method(self): pass\n\n{second}x = 1\n"
    (root / "a.py").write_text(source)
    (root / "old.py").write_text("print 'no'\n")
    counts = gather_python_corpus(root, tmp_path / "out", 0.0, functions=True)
    documents = read(tmp_path / "out/train.jsonl")
    assert documents == [
        {"text": first, "name": "a.py:first"},
        {"text": second, "name": "a.py:second"},
    ]
    assert counts == (2, 0, len(first) + len(second), 0)
    assert gather_python_corpus(root, tmp_path / "out", 0.0).train_documents == 2
    assert {one["name"] for one in read(tmp_path / "out/train.jsonl")} == {"a.py", "old.py"}


def test_equal_sources_are_reused_and_others_are_not(root, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    counts = gather_python_corpus(root, out)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert not caplog.messages
    assert gather_python_corpus(root, out) == counts
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    assert caplog.messages == [f"reusing {out}: the same sources made it"]
    (out / "train.jsonl").write_text("edited")
    assert gather_python_corpus(root, out) == counts
    assert (out / "train.jsonl").read_bytes() == before["train.jsonl"][1]
    (root / "m00.py").write_text("x = 123456\n")
    assert gather_python_corpus(root, out) != counts


def test_bad_arguments_are_refused(root, tmp_path):
    with pytest.raises(DataError, match=r"--valid-fraction=1\.0 is outside"):
        gather_python_corpus(root, tmp_path / "out", 1.0)
    with pytest.raises(DataError, match="is not a folder"):
        gather_python_corpus(root / "gone", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no Python sources"):
        gather_python_corpus(tmp_path / "bare", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file could not be written"):
        gather_python_corpus(root, tmp_path / "file")


def test_files_of_another_origin_are_kept(root, tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"train\.jsonl exists and no corpus\.json"):
        gather_python_corpus(root, tmp_path)
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(DataError, match=r"corpus\.json is not a corpus fingerprint"):
        gather_python_corpus(root, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_command_line(root, tmp_path):
    def run(*arguments):
        command = [sys.executable, REPOSITORY / "tools/gather_stdlib.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    good = ["--root", root, "--output", "out"]
    assert "training documents" in run(*good).stdout
    again = run(*good)
    assert again.returncode == 0
    assert again.stdout.startswith("reusing out")
    bad = run("--root", "gone", "--output", "out")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --root=gone is not a folder")
    assert bad.stderr.count("\n") == 1
