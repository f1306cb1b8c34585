"""A corpus divided by domain or by time: every record in one slice, and nothing half-written."""

from __future__ import annotations

import json

import pytest

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.slicing import slice_corpus


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(folder):
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(folder.iterdir())
    }


def test_every_record_goes_to_the_slice_of_its_value_in_order(tmp_path):
    first = write(
        tmp_path / "a.jsonl", *({"text": f"é{n}", "domain": "ab"[n % 2]} for n in range(5))
    )
    second = write(tmp_path / "b.jsonl", {"domain": "c-1", "text": "x"})
    assert slice_corpus([first, second], tmp_path / "o", "domain", "value") == {
        "a": 3,
        "b": 2,
        "c-1": 1,
    }
    found = read(tmp_path / "o")
    assert [one["text"] for one in found["a"]] == ["é0", "é2", "é4"]
    assert found["c-1"] == [{"domain": "c-1", "text": "x"}]


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("year", ["2023", "2024", "2024", "1970"]),
        ("quarter", ["2023-Q4", "2024-Q1", "2024-Q2", "1970-Q1"]),
        ("month", ["2023-12", "2024-01", "2024-04", "1970-01"]),
        ("day", ["2023-12-31", "2024-01-01", "2024-04-30", "1970-01-02"]),
    ],
)
def test_dates_fall_into_their_periods_and_offsets_are_moments(tmp_path, by, names):
    dates = ["2023-12-31", "2023-12-31T23:30:00-01:00", "2024-04-30T12:00:00Z", 86_400]
    path = write(tmp_path / "a.jsonl", *({"date": one} for one in dates))
    slice_corpus([path], tmp_path / "o", "date", by)
    found = read(tmp_path / "o")
    for date, name in zip(dates, names, strict=True):
        assert {"date": date} in found[name]
    assert sum(map(len, found.values())) == 4


@pytest.mark.parametrize(
    ("record", "by", "complaint"),
    [
        ({"text": "a"}, "value", "line 2 has no key 'k', only text: choose one with --key."),
        ({"k": "a/b"}, "value", "line 2: k='a/b' cannot name a file"),
        ({"k": ".."}, "value", "line 2: k='..' cannot name a file"),
        ({"k": 3}, "value", "line 2: k=3 cannot name a file"),
        ({"k": "soon"}, "month", "line 2: k='soon' is no date"),
        ({"k": True}, "month", "line 2: k=True is no date"),
        ({"k": 1e300}, "month", "is no date"),
    ],
)
def test_a_record_without_a_slice_stops_the_job_and_leaves_nothing(tmp_path, record, by, complaint):
    good = {"k": "a"} if by == "value" else {"k": "2024-01-01"}
    path = write(tmp_path / "a.jsonl", good, record)
    with pytest.raises(DataError) as caught:
        slice_corpus([path], tmp_path / "o", "k", by)
    assert complaint in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_too_many_slices_and_a_folder_in_use_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"k": f"v{n}"} for n in range(257)))
    with pytest.raises(DataError, match="k=v256 would be slice number 257"):
        slice_corpus([path], tmp_path / "o", "k", "value")
    with pytest.raises(DataError, match=r"holds .jsonl files already"):
        slice_corpus([path], tmp_path, "k", "value")
    text = tmp_path / "a.txt"
    text.write_text("a")
    with pytest.raises(DataError, match=r"a.txt is no .jsonl file"):
        slice_corpus([text], tmp_path / "o", "k", "value")
