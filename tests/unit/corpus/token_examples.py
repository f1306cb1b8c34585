"""Documents as ids, and the files in which other programs keep them."""

from __future__ import annotations

import json
import struct

import numpy as np
from preprocess_helpers import TEXTS, write_jsonl

from megatron_mdm.corpus.tokenizer import load_tokenizer

EOD = 0


def ids_of(tokenizer: str, texts=TEXTS) -> list[list[int]]:
    return load_tokenizer(tokenizer).encode_batch(texts)


def ended(documents) -> list[int]:
    """The stream that text preprocessing writes."""
    return [i for ids in documents if ids for i in [*ids, EOD]]


def write_ids(path, documents, key="input_ids", **columns):
    lines = [
        json.dumps({key: ids, **{name: values[number] for name, values in columns.items()}})
        for number, ids in enumerate(documents)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def write_nanogpt(path, stream, dtype="<u2"):
    """As nanoGPT's prepare.py and OLMo's tokens: a memory map without a header."""
    array = np.memmap(path, dtype=dtype, mode="w+", shape=(len(stream),))
    array[:] = stream
    array.flush()
    return path


def write_llm_c(path, stream, *, magic=20240520, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:4] = magic, 1, len(stream), np.dtype(dtype).itemsize if magic != 20240520 else 0
    path.write_bytes(header.tobytes() + np.array(stream, dtype).tobytes())
    return path


def write_lit(folder, stream, *, chunk_tokens, separator, dtype="<u2", name="train"):
    """As lit-gpt's PackedDatasetBuilder: equal chunks, the last filled with the separator."""
    code = {"<u2": 8, "<i4": 4}[dtype]
    paths = []
    for number, start in enumerate(range(0, len(stream), chunk_tokens)):
        chunk = np.full(chunk_tokens, separator, dtype)
        piece = stream[start : start + chunk_tokens]
        chunk[: len(piece)] = piece
        path = folder / f"{name}_{number:010d}.bin"
        header = b"LITPKDS" + struct.pack("<Q", 1) + struct.pack("<B", code)
        path.write_bytes(header + struct.pack("<Q", chunk_tokens) + chunk.tobytes())
        paths.append(path)
    return paths


def write_datatrove(folder, documents, token_size=2, name="a.ds"):
    """With datatrove itself."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    file = TokenizedFile(str(folder), name, token_size=token_size)
    for ids in documents:
        file.write(list(ids), None)
    file.close()
    return folder / name


def text_shards(preprocess, tmp_path, tokenizer, texts=TEXTS, **options):
    """What the same text gives."""
    prefix = tmp_path / "from-text" / "p"
    path = tmp_path / "text.jsonl"
    preprocess([write_jsonl(path, texts)], tokenizer, prefix, **options)
    return prefix


def write_npy(path, array):
    np.save(path, array)
    return path


def written(kind, folder, documents):
    """Writes a corpus as another program does; returns its files."""
    stream = ended(documents)
    path = folder / {"npy": "a.npy", "olmo": "part-0.npy"}.get(kind, "a.bin")
    match kind:
        case "nanogpt" | "olmo":
            return [write_nanogpt(path, stream)]
        case "uint32":
            return [write_nanogpt(path, stream, "<u4")]
        case "npy":
            return [write_npy(path, np.array(stream, np.uint16))]
        case "npy int64":
            return [write_npy(folder / "a.npy", np.array(stream))]
        case "npy rows":
            # Windows without a remainder, as they are packed.
            return [write_npy(folder / "a.npy", np.array(stream, np.int32).reshape(-1, 6))]
        case "npy big-endian":
            return [write_npy(folder / "a.npy", np.array(stream, ">u2"))]
        case "llm.c":
            return [write_llm_c(path, stream)]
        case "llm.c first":
            return [write_llm_c(path, [EOD, *stream[:-1]])]
        case "llm.c sized":
            return [write_llm_c(path, stream, magic=278895051, dtype="<u4")]
        case "llm.c two":
            paths = [folder / "train_000000.bin", folder / "train_000001.bin"]
            return [write_llm_c(paths[0], stream[:100]), write_llm_c(paths[1], stream[100:])]
        case "lit-gpt":
            return write_lit(folder, stream, chunk_tokens=100, separator=EOD)
        case "lit-gpt first":
            stream = [EOD, *stream[:-1]]
            return write_lit(folder, stream, chunk_tokens=70, separator=EOD, dtype="<i4")
        case "datatrove":
            return [write_datatrove(folder, [[*ids, EOD] for ids in documents if ids])]
        case "datatrove 4":
            return [write_datatrove(folder, [ids for ids in documents if ids], token_size=4)]
    raise ValueError(kind)


KINDS = [
    *("nanogpt", "olmo", "uint32", "npy", "npy int64", "npy rows", "npy big-endian"),
    *("llm.c", "llm.c first", "llm.c sized", "llm.c two"),
    *("lit-gpt", "lit-gpt first", "datatrove", "datatrove 4"),
]
