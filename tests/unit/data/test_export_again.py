"""What a second export to the same path leaves of the first."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
from shard_examples import write

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.export import FORMATS, export_tokens, record_path


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_exists_is_kept_without_overwrite(tmp_path, file_format):
    prefix = write(tmp_path / "p")
    out = tmp_path / "x"
    out.write_text("mine")
    with pytest.raises(DataError, match=r"x exists: replace it with --overwrite or choose"):
        export_tokens(prefix, out, file_format)
    assert out.read_text() == "mine"
    export_tokens(prefix, out, file_format, overwrite=True)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data is no regular file"):
        export_tokens(prefix, tmp_path / "data", file_format, overwrite=True)
    if file_format != "parquet":
        out.unlink()
        with pytest.raises(DataError, match=r"x\.json exists"):
            export_tokens(prefix, out, file_format)


def test_another_format_at_the_same_path_leaves_no_description_of_the_old_file(tmp_path):
    prefix = write(tmp_path / "p", [[1, 2], [3]])
    out = tmp_path / "x"
    export_tokens(prefix, out, "nanogpt")
    assert record_path(out).is_file()
    out.unlink()
    with pytest.raises(DataError, match=r"x\.json exists: replace it with --overwrite"):
        export_tokens(prefix, out, "parquet")
    export_tokens(prefix, out, "parquet", overwrite=True)
    rows = pyarrow.parquet.read_table(out).column("input_ids").to_pylist()
    assert rows == [[1, 2], [3]]
    assert not record_path(out).exists()
    export_tokens(prefix, out, "llm.c", overwrite=True)
    assert json.loads(record_path(out).read_text())["format"] == "llm.c"


@pytest.mark.parametrize("content", ['{"format": "mine"}', "[1]", "no JSON"])
def test_a_file_of_that_name_that_no_export_wrote_stays(tmp_path, content):
    prefix = write(tmp_path / "p", [[1, 2], [3]])
    record_path(tmp_path / "x").write_text(content)
    export_tokens(prefix, tmp_path / "x", "parquet", overwrite=True)
    assert record_path(tmp_path / "x").read_text() == content
