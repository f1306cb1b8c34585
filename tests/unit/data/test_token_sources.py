"""A token source from elsewhere: named by its place, and read as shards are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from shard_examples import write

from megatron_mdm.config import SourceConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.opening import open_source, read_file_states
from megatron_mdm.data.overlap import find_shared_content
from megatron_mdm.data.source import TokenSource
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows, Windows

EOD = 9


class CountedDigits(TokenSource):
    """The digits 0 to 8 again and again, each time with an end: as many as its path says."""

    def __init__(self, prefix: Path, num_tokens: int) -> None:
        self.prefix = prefix
        self._num_tokens = num_tokens

    @classmethod
    def open(cls, prefix):
        return cls(Path(prefix), int(Path(prefix).name))

    @property
    def num_documents(self):
        return self._num_tokens // 10

    @property
    def num_tokens(self):
        return self._num_tokens

    @property
    def eod_token_id(self):
        return EOD

    def read(self, start, stop):
        if not 0 <= start <= stop <= self._num_tokens:
            raise IndexError(f"{start} to {stop}")
        return np.arange(start, stop) % 10


def digits(num_tokens: int) -> TokenSource:
    kind = f"{__name__}:{CountedDigits.__name__}"
    return open_source(SourceConfig(path=f"digits/{num_tokens}", kind=kind), "data.train.0")


def test_a_source_is_named_by_its_place_and_gives_windows_and_documents():
    source = digits(95)
    assert isinstance(source, CountedDigits)
    windows = SourceWindows(source, 20, 10, by_document=True)
    assert windows.num_windows == 4
    window = windows.read_window(1, shift=65)
    assert window.tokens_S.tolist() == [*range(5, 10), *range(5), *range(10)]
    assert window.segment_ids_S.tolist() == [0] * 5 + [1] * 15
    assert Windows([windows]).find_documents(np.arange(4)).tolist() == [[0, 0]] * 4
    assert source.find_token_outside(9) == (9, 9)
    assert source.find_token_outside(10) is None


def test_its_fingerprint_is_of_counts_and_tokens_as_that_of_shards(tmp_path):
    source = digits(20)
    content = (np.arange(20) % 10).astype("<i8").tobytes()
    assert source.fingerprint() == hashlib.sha256(b"20 2" + content).hexdigest()
    copy = open_tokens(write(tmp_path / "copy", [range(10), range(10)]))
    assert copy.fingerprint() == source.fingerprint()
    (shared,) = find_shared_content([source, copy], [20, 20])
    assert (shared.times, shared.num_tokens) == ({0: 1, 1: 1}, 20)


def test_it_may_lie_in_no_file():
    assert read_file_states(digits(20)) == []


@pytest.mark.parametrize("kind", ["shard", "no.such.module:Digits", f"{__name__}:write"])
def test_other_kinds_are_refused_with_the_field(kind):
    with pytest.raises(ConfigError, match=rf"data\.valid\.1\.kind={kind} "):
        open_source(SourceConfig(path="digits/20", kind=kind), "data.valid.1")
