"""A page in a real headless Chromium, driven by the DevTools protocol over two pipes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def find_program() -> str | None:
    """The browser's program; None where there is none, or one that only asks for a package."""
    for name in ("chromium", "chromium-browser"):
        program = shutil.which(name)
        if program and subprocess.run([program, "--version"], capture_output=True).returncode == 0:
            return program
    return None


_SECONDS = 60.0
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
    "--remote-debugging-pipe",
)
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "PageDown": 34, " ": 32}


class Page:
    """A tab.

    Attributes:
        requests: Addresses that it asked for.
        problems: Exceptions and errors on its console.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._to_browser = to_browser
        self._from_browser = from_browser
        self._received = b""
        self._num_calls = 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Goes to an address and waits until the page has loaded."""
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + _SECONDS
        while self.evaluate("document.readyState + location.href") != f"complete{address}":
            assert time.monotonic() < deadline, f"{address} has not loaded"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """Evaluates JavaScript in the page and returns its value, which JSON has to hold."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key of the keyboard, as a person would."""
        details = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **details)

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(
            f"(() => {{ const r = {box}.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=kind, **place)

    def resize(self, width: int, height: int = 900) -> None:
        """Gives the window a size, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def emulate(self, feature: str, value: str) -> None:
        """Pretends a setting of the person, such as a preference for dark colours."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": feature, "value": value}])

    def _call(self, method: str, **params: Any) -> Any:
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._num_calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            left_seconds = deadline - time.monotonic()
            # select.select knows no file beyond the 1024th, and other tests may keep as many open.
            poll = select.poll()
            poll.register(self._from_browser, select.POLLIN)
            ready = poll.poll(1000 * max(0.0, left_seconds))
            assert ready, f"the browser has not answered within {_SECONDS} s"
            part = os.read(self._from_browser, 1 << 20)
            assert part, "the browser has ended"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(json.dumps(params["entry"]))


@contextlib.contextmanager
def chromium_page(program: str, profile: Path) -> Iterator[Page]:
    """Starts a browser, and ends it.

    Args:
        program: The browser's program.
        profile: Empty folder for what the browser writes.

    Yields:
        A blank page.
    """
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    # The browser reads its commands from descriptor 3 and answers on 4.
    redirect = f'exec "$@" 3<&{its_input} 4>&{its_output}'
    # Not sh, some of which know descriptors of one digit only.
    command = ["bash", "-c", redirect, "bash", program, *_OPTIONS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"],
        pass_fds=[its_input, its_output],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser)
        os.close(from_browser)
