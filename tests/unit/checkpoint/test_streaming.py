from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.storage import record_file
from megatron_mdm.checkpoint.streaming import TensorFile, TensorInfo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(path, tensors, metadata):
    infos = [TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    file = TensorFile(path, infos, metadata)
    for name, tensor in tensors.items():
        assert not file.is_full
        file.write(name, tensor)
    assert file.is_full
    file.finish()
    return file.record()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.dictionaries(names, shapes, min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    metadata=st.sampled_from([{}, {"format": "pt"}]),
)
def test_files_equal_those_of_safetensors_byte_for_byte(tmp_path, contents, dtype, metadata):
    generator = torch.Generator().manual_seed(0)
    # safetensors sorts by name, as bytes.
    tensors = {
        name: torch.randn(contents[name], generator=generator).to(dtype)
        for name in sorted(contents, key=str.encode)
    }
    record = write(tmp_path / "ours", tensors, metadata)
    save_file(tensors, tmp_path / "theirs", metadata or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert record == record_file(tmp_path / "theirs")


def test_another_order_and_several_dtypes_read_back_the_same(tmp_path):
    flat = torch.arange(24.0)
    tensors = {
        "z": torch.tensor([float("nan"), -0.0, float("inf")]),
        "transposed": flat.reshape(4, 6).T,
        "a/é\n": flat[5:9].to(torch.bfloat16),
        "number": torch.tensor(7.0, dtype=torch.float16),
        "none": torch.zeros(0, 3),
    }
    write(tmp_path / "file", tensors, {"b": "2", "a": "1"})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        expected = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), expected)
    with safe_open(tmp_path / "file", framework="pt") as handle:
        assert handle.metadata() == {"b": "2", "a": "1"}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", torch.zeros(2)),
        ("a", torch.zeros(3)),
        ("a", torch.zeros(2, 1)),
        ("a", torch.zeros(2, dtype=torch.float16)),
    ],
)
def test_a_tensor_that_is_not_due_is_refused(tmp_path, name, tensor):
    file = TensorFile(tmp_path / "file", [TensorInfo("a", torch.float32, (2,))], {})
    with pytest.raises(ValueError, match="has to go on with TensorInfo"):
        file.write(name, tensor)
    file.close()


def test_a_file_without_a_digest_has_the_same_bytes_and_no_record(tmp_path):
    infos = [TensorInfo("a", torch.float32, (5,))]
    for name, has_digest in (("with", True), ("without", False)):
        file = TensorFile(tmp_path / name, infos, {}, has_digest=has_digest)
        file.write("a", torch.arange(5.0))
        file.finish()
    with pytest.raises(ValueError, match="without a digest"):
        file.record()
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_a_file_is_not_whole_before_its_last_tensor_and_takes_none_after(tmp_path):
    file = TensorFile(tmp_path / "file", [TensorInfo("a", torch.float32, (2,))], {})
    with pytest.raises(ValueError, match="lacks TensorInfo"):
        file.finish()
    file.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="has to go on with None"):
        file.write("b", torch.zeros(2))
    file.close()


# Sixteen tensors of 16 MiB; prints by how much the peak rose after the first.
WRITING = """
import sys
from pathlib import Path
import torch
from megatron_mdm.checkpoint.streaming import TensorFile, TensorInfo

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

infos = [TensorInfo(str(i), torch.float32, (2**22,)) for i in range(16)]
file = TensorFile(Path(sys.argv[1]), infos, {})
file.write("0", torch.ones(2**22))
before = peak()
for info in infos[1:]:
    file.write(info.name, torch.ones(info.shape))
file.finish()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how large a process was")
def test_memory_holds_a_tensor_and_not_the_file(tmp_path):
    command = [sys.executable, "-c", WRITING, tmp_path / "file"]
    # With a fixed threshold malloc gives each freed tensor back. Left alone, it keeps as many as
    # chance will have it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    # A second tensor held beside the one at hand would show.
    assert int(result.stdout) < 2**24
