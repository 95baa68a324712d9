"""A headless Chromium that tests talk to: its DevTools protocol over two pipes, so that no package is needed.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The browser reads commands from descriptor 3 and writes to 4.
_START = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execvp(sys.argv[3], sys.argv[3:])"
_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
_FLAGS += ["--no-first-run", "--disable-background-networking", "--disable-extensions", "--remote-debugging-pipe"]
_FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no network


class Browser:
    """One page of a headless browser.

    Attributes:
        requests: addresses that pages asked for.
        errors: what was said on the console as a warning or an error, and exceptions.
    """

    def __init__(self, profile: Path):
        self.requests, self.errors, self._events, self._buffer, self._count = [], [], [], b"", 0
        theirs, self._write = _high_pipe()
        self._read, other = _high_pipe()
        launcher = [sys.executable, "-S", "-c", _START, str(theirs), str(other)]
        command, quiet = [*launcher, BINARY, *_FLAGS, f"--user-data-dir={profile}"], subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(theirs, other), stdout=quiet, stderr=quiet)
        os.close(theirs)
        os.close(other)
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.send("Network.emulateNetworkConditions", offline=True, **speed)

    def send(self, method: str, **parameters) -> dict:
        """Give a command and wait for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._count:
            pass
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def _next(self) -> dict:
        """The next message; events are noted."""
        deadline = time.monotonic() + 300
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 2**20)
            assert part, f"the browser ended with status {self._process.wait()}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        kind, what = message.get("method"), message.get("params")
        self._events.append(kind)
        if kind == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"]["text"])
        elif kind == "Log.entryAdded" and what["entry"]["level"] in ("warning", "error"):
            self.errors.append(what["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and what["type"] in ("warning", "error"):
            self.errors.append(str(what["args"]))
        return message

    def open(self, file: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a page in a window of this size, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def ask(self, expression: str):
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "ArrowRight": (39, "")}[key]
        for kind in ("keyDown", "keyUp"):
            known = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
            self.send("Input.dispatchKeyEvent", type=kind, **known)

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """The window as a PNG, or the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self, file: Path) -> None:
        """The page as it is printed on A4."""
        data = self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose descriptors are above those that the browser uses."""
    import fcntl

    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high
