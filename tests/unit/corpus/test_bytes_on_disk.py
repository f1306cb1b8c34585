"""What is written on disk stays as it is, byte for byte: shards, manifests, views, exports.

The digests were taken of files that earlier versions wrote. A change of a format gets a new
`format_version`, and then new digests, which this file prints when it is run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from megatron_mdm.corpus.finetuning import FinetuningOptions, prepare_finetuning
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.data.export import export_tokens
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.subset import make_subset

DIGESTS = Path(__file__).with_name("bytes_on_disk.json")
TEXTS = ["def f():\n    return 1\n", "", "Grüße aus 東京 🙂", "x" * 300, "one two three"]


def test_bytes_on_disk_are_those_of_earlier_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert digests_of_all() == json.loads(DIGESTS.read_text())


def digests_of_all() -> dict[str, str]:
    """Writes a bit of everything into the working directory; the digest of each file written."""
    write_inputs()
    before = set(Path().rglob("*"))
    make_everything()
    return {
        str(path): digest(path)
        for path in sorted(set(Path().rglob("*")) - before)
        if path.is_file() and path.suffix != ".parquet"
    }


def digest(path: Path) -> str:
    content = path.read_bytes()
    # The library that serialises tokenizers may change what is hashed for their name.
    content = re.sub(rb'"tokenizer_sha256": ?"\w+"', b"", content)
    return hashlib.sha256(content).hexdigest()[:16]


def write_inputs() -> None:
    write_tokenizer(Path("tok"))
    documents = [f"{number} {TEXTS[number % 5]}" * (number % 7) for number in range(200)]
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    Path("a.jsonl").write_text("".join(lines[:90]))
    Path("b.jsonl.gz").write_bytes(gzip.compress("".join(lines[90:140]).encode(), mtime=0))
    Path("c.txt.zst").write_bytes(zstandard.compress(TEXTS[2].encode()))
    table = pyarrow.table({"text": documents[140:], "other": list(range(60))})
    pyarrow.parquet.write_table(table, "d.parquet", row_group_size=16)
    broken = [*lines[:3], "{\n", '{"text": 1}\n', *lines[3:8]]
    Path("bad.jsonl").write_text("".join(broken))
    ids = [list(range(2, 2 + number)) for number in range(1, 40)]
    Path("ids.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    stream = np.array([i for row in ids for i in [*row, 0]], np.uint16)
    stream.tofile("stream.bin")
    np.save("rows.npy", np.arange(800).reshape(8, 100) % 250 + 1)
    Path("one.bin").write_bytes(stream[:400].tobytes())
    Path("two.bin").write_bytes(stream[400:].tobytes())
    talk = [{"prompt": text or "why", "response": text[:9] or "so"} for text in TEXTS * 3]
    Path("talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talk))


def write_tokenizer(folder: Path) -> None:
    """One token per byte, without training, so that no library decides on the ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def make_everything() -> None:
    def shards(names: str, prefix: str, **options) -> None:
        preprocess(
            list(map(Path, names.split())), "tok", Path(prefix), PreprocessOptions(**options)
        )

    Path("out").mkdir()
    shards("a.jsonl b.jsonl.gz c.txt.zst d.parquet", "out/text", workers=2)
    shards("a.jsonl d.parquet", "out/split", valid_fraction=0.2)
    shards("bad.jsonl", "out/bad", on_error="skip")
    shards("ids.jsonl", "out/ids", ids_key="ids")
    shards("stream.bin", "out/reference")
    shards("stream.bin", "out/copied", copy=True, valid_fraction=0.2, hold_out_by="text")
    shards("one.bin two.bin", "out/parts")
    shards("rows.npy", "out/rows", split_at_eod=False)
    for task in range(3):
        shards("a.jsonl b.jsonl.gz d.parquet", "out/array", task=(task, 3))
    merge_parts(Path("out/array"))
    make_subset(Path("out/array"), Path("out/array-1K"), 1000, seed=0)
    make_subset(Path("out/array"), Path("out/copy-1K"), 1000, seed=0, copy=True)
    make_subset(Path("out/array-1K"), Path("out/nested"), 500, seed=3)
    for task in range(3):
        shards("a.jsonl b.jsonl.gz d.parquet", "out/whole", task=(task, 3))
    merge_parts(Path("out/whole"), copy=True)
    for name in ("reference", "parts", "array-1K", "whole"):
        export_tokens(Path("out", name), Path("out", f"{name}.raw"), "nanogpt")
        export_tokens(Path("out", name), Path("out", f"{name}.llmc"), "llm.c")
    options = FinetuningOptions(valid_fraction=0.3)
    prepare_finetuning([Path("talk.jsonl")], "tok", Path("out/talk"), options)


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(json.dumps(digests_of_all(), indent=1))
