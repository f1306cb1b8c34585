"""Freed tensors stay with the process: the next ones cause no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from megatron_mdm.distributed.host_memory import keep_freed_memory, return_freed_memory

def faults(num_tensors=10, mebibytes=64):
    "Page faults of that many tensors, each freed before the next."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_tensors):
        torch.ones(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cold = faults()
assert keep_freed_memory()
# Small objects may take a piece of the freed block, so that the next tensor needs a new one; after
# some tensors the small ones have found their places.
for _ in range(20):
    faults()
warm = faults()
assert return_freed_memory()
# Larger than any hole that may be left in the heap.
print(cold, warm, faults(2, 512))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_large_tensors_reuse_the_memory_of_freed_ones():
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True
    )
    cold, warm, returned = map(int, ran.stdout.split())
    # With huge pages a fault brings 2 MiB: 32 faults a tensor.
    assert cold >= 10 * 32
    assert warm < 32
    assert returned >= 2 * 256
