from __future__ import annotations

import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import unfinished as unfinished_module
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.corpus.unfinished import PartialFolder

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = [f"text {number} " * (number % 7) for number in range(60)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One input of every format, a third of the texts each."""
    folder = tmp_path_factory.mktemp("in")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]).encode()
    (folder / "a.jsonl").write_bytes(lines + b"bad\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "d.txt").write_text("one document")
    pq.write_table(pa.table({"text": TEXTS[20:40]}), folder / "e.parquet", row_group_size=7)
    Dataset.from_dict({"text": TEXTS[40:]}).save_to_disk(folder / "f")
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch, quick_choice_of_library):
    """Makes chunks of few records, and a journal of each."""
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 500)
    monkeypatch.setattr(unfinished_module, "JOURNAL_SECONDS", 0.0)


def options(**changes):
    return PreprocessOptions(on_error="skip", valid_fraction=0.3, progress=False, **changes)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(inputs, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    preprocess(inputs, tokenizer, folder / "p", options())
    return files(folder)


def die_at(event_number, folder):
    """Kills this process before its file operation of that number in a folder."""
    seen = 0

    def count(event, arguments):
        nonlocal seen
        watched = event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir")
        if watched and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def run_killed(event_number, folder, work):
    """Runs work in a process that dies at an event; tells whether it died."""
    child = os.fork()
    if not child:
        status = 1
        try:
            die_at(event_number, folder)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_kill_before_any_file_operation_then_resume(inputs, tokenizer, expected, tmp_path):
    event_number = 0
    died = True
    while died:
        event_number += 1
        folder = tmp_path / str(event_number)
        folder.mkdir()
        prefix = folder / "p"
        work = functools.partial(preprocess, inputs, tokenizer, prefix, options())
        died = run_killed(event_number, folder, work)
        if died:
            journal = PartialFolder(prefix).read_journal()
            if journal is not None and not journal.read_completely:
                # What a journal does not count may have been written or not.
                for path in folder.glob("p.partial/*.bin"):
                    path.write_bytes(path.read_bytes() + b"torn")
            preprocess(inputs, tokenizer, prefix, options(resume=True))
        assert files(folder) == expected
    assert event_number > 40


def test_resumes_that_are_killed_themselves_come_to_the_end(inputs, tokenizer, expected, tmp_path):
    generator = random.Random(0)
    prefix = tmp_path / "p"

    def resume():
        preprocess(inputs, tokenizer, prefix, options(resume=True))

    # The end alone takes more operations than any of these has time for.
    for _ in range(12):
        assert run_killed(generator.randrange(5, 30), tmp_path, resume)
    resume()
    assert files(tmp_path) == expected


def start_tool(prefix, inputs, tokenizer, *more):
    driver = (
        # Whoever runs the tests in the background has it ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import runpy, sys; sys.argv = sys.argv[1:];"
        "from megatron_mdm.corpus import unfinished, sources;"
        "sources.CHUNK_BYTES, unfinished.JOURNAL_SECONDS = 2000, 0.05;"
        "__name__ == '__main__' and runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", driver, REPOSITORY / "tools" / "preprocess_data.py"]
    command += ["--input", *inputs, "--tokenizer", tokenizer, "--output-prefix", prefix, *more]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def descendants(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def long_input(tmp_path):
    path = tmp_path / "long.jsonl"
    lines = (json.dumps({"text": f"text {number} " * 20}) for number in range(50_000))
    path.write_text("\n".join(lines))
    return path


def prolong(path, times):
    """Makes a job not end by itself while a busy machine keeps this process waiting."""
    lines = path.read_text() + "\n"
    with path.open("a") as stream:
        stream.write("\n" + lines * times)


@pytest.mark.slow
def test_killed_tool_leaves_no_worker_and_a_resume_with_other_workers_ends_alike(
    long_input, tokenizer, tmp_path
):
    prolong(long_input, 3)
    prefix = tmp_path / "out" / "p"
    process = start_tool(prefix, [long_input], tokenizer, "--workers", "2")
    wait_until(lambda: (tmp_path / "out" / "p.partial" / "progress.json").exists())
    children = descendants(process.pid)
    with pytest.raises(DataError, match=r"p\.partial is locked, so another process is writing"):
        preprocess([long_input], tokenizer, prefix, PreprocessOptions(resume=True))
    process.kill()
    process.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not Path(f"{prefix}.idx").exists()
    assert start_tool(prefix, [long_input], tokenizer, "--resume").wait() == 0
    assert start_tool(tmp_path / "q", [long_input], tokenizer).wait() == 0
    for extension in ("bin", "idx", "json"):
        made = [Path(f"{name}.{extension}").read_bytes() for name in (prefix, tmp_path / "q")]
        assert made[0] == made[1]
    assert len(list(prefix.parent.iterdir())) == 3


def test_interrupt_keeps_the_work(long_input, tokenizer, tmp_path):
    prolong(long_input, 9)
    prefix = tmp_path / "p"
    process = start_tool(prefix, [long_input], tokenizer, "--workers", "2")
    wait_until(lambda: Path(f"{prefix}.partial/progress.json").exists())
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate()[1].decode()
    assert process.returncode == 130
    assert errors == "interrupted\n"
    assert PartialFolder(prefix).read_journal().manifests[0].num_documents > 0


@pytest.fixture
def unfinished(inputs, tokenizer, tmp_path):
    """The prefix of a job that was killed while it encoded."""
    prefix = tmp_path / "p"
    assert run_killed(20, tmp_path, lambda: preprocess(inputs, tokenizer, prefix, options()))
    journal = PartialFolder(prefix).read_journal()
    assert journal.position > (0, 0, 1)
    assert not journal.read_completely
    return prefix


def test_unfinished_job_is_not_continued_by_another_recipe(
    unfinished, inputs, tokenizer, expected, tmp_path
):
    with pytest.raises(DataError, match=r"go on with --resume, start again with --overwrite"):
        preprocess(inputs, tokenizer, unfinished, options())
    for change, reason in [
        ({"on_error": "stop"}, "it left out 1 bad records, which takes --on-error skip"),
        ({"valid_fraction": 0.2}, "it has valid_fraction=0.3"),
        ({"text_key": "body"}, "it has text_key='text'"),
    ]:
        changed = {"on_error": "skip", "valid_fraction": 0.3, **change}
        with pytest.raises(DataError, match=rf"unfinished job and {reason}.*: start again"):
            preprocess(inputs, tokenizer, unfinished, PreprocessOptions(resume=True, **changed))
    with pytest.raises(DataError, match=r"unfinished job and it was made from 6 input files"):
        preprocess(inputs[:5], tokenizer, unfinished, options(resume=True))
    preprocess(inputs, tokenizer, unfinished, options(overwrite=True))
    assert files(tmp_path) == expected


def test_damaged_unfinished_job_is_refused(unfinished, inputs, tokenizer):
    tokens = PartialFolder(unfinished).path / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:10])
    with pytest.raises(DataError, match=r"train\.bin has 10 bytes and its journal counts \d+"):
        preprocess(inputs, tokenizer, unfinished, options(resume=True))
    journal = PartialFolder(unfinished).path / "progress.json"
    journal.write_bytes(journal.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"progress\.json is not valid JSON .* --overwrite"):
        preprocess(inputs, tokenizer, unfinished, options(resume=True))


def test_resume_without_an_unfinished_job_starts_or_reuses(inputs, tokenizer, expected, tmp_path):
    for _ in range(2):
        preprocess(inputs, tokenizer, tmp_path / "p", options(resume=True))
        assert files(tmp_path) == expected
