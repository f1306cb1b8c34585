"""Threads of each process that the tests compute in: one number, so that exact results agree.

On some processors a sum of two threads differs from that of one in its last digit. What is compared
exactly is therefore computed with the same number everywhere: in this process and its children by
OMP_NUM_THREADS, which tests/conftest.py sets, and in training runs by `run.num_threads`.
"""

from __future__ import annotations

import os

# Models of tests are so small that a second thread costs more than it brings.
TEST_THREADS = int(os.environ.get("TEST_THREADS", "1"))
