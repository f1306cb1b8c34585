from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_mdm.training.signals import STOP_SIGNALS, StopRequests

# Waits in C, where no signal handler of Python runs, as a collective does.
BLOCKED = """
import ctypes
from megatron_mdm.training.signals import StopRequests

libc = ctypes.CDLL(None)
barrier = ctypes.create_string_buffer(128)
libc.pthread_barrier_init(barrier, None, 2)
with StopRequests(1):
    print("ready", flush=True)
    libc.pthread_barrier_wait(barrier)
"""


@pytest.fixture(autouse=True)
def not_ignored():
    """A session that was started in the background ignores Ctrl-C, and what is ignored stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequests(1) as stops:
        assert stops.poll() is None
        signal.raise_signal(number)
        # Once more at once: a launcher that passes it on.
        signal.raise_signal(number)
        wait_for(stops.poll)
        assert stops.poll() is number
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_process_that_is_about_to_end_ignores_further_signals():
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    try:
        with StopRequests(1) as stops:
            stops.ignore_from_now_on()
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_outside_of_the_main_thread_nothing_is_installed():
    def use():
        with StopRequests(1) as stops:
            found.append((signal.getsignal(signal.SIGTERM), stops.poll()))

    found = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), None)]


def test_a_second_signal_ends_a_process_that_is_inside_a_c_function():
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
