"""A real browser without Selenium: Chromium, driven by its DevTools protocol over a local WebSocket."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-address=127.0.0.1",
    "--remote-debugging-port=0",
)


class Page:
    """One tab. `errors` are console errors and uncaught exceptions, `requests` the addresses asked for, so far."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.count = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are noted."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(json.dumps(params["args"]))

    def open(self, address: str, width: int = 1200, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        return self.evaluate("document.body ? document.body.innerText : ''")

    def wait_for(self, *texts: str) -> None:
        """Until the page shows all of them. Raises AssertionError with the page's text otherwise."""
        self.wait(f"{json.dumps(texts)}.every(text => document.body?.innerText.includes(text))")

    def wait(self, expression: str, seconds: float = 180) -> Any:
        """The expression's value as soon as it is true. Raises AssertionError with the page's text otherwise."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value!r}; the page says:\n{self.text()}"
            time.sleep(0.2)
        return value

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is visible, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browse(directory: Path) -> Iterator[Page]:
    """A page in a fresh Chromium whose profile lies in `directory`; skips the test where there is no Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    profile = directory / "profile"
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with connect(_address(profile), max_size=2**27, open_timeout=60) as socket:
                yield Page(socket)
        finally:
            process.terminate()


def _address(profile: Path) -> str:
    """The WebSocket of the one tab, once Chromium has written its port down."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (file.is_file() and len(file.read_text().splitlines()) == 2):
        assert time.monotonic() < deadline, "chromium did not start"
        time.sleep(0.1)
    port = file.read_text().splitlines()[0]
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        tabs = json.load(answer)
    return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
