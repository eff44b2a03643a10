"""A headless Chromium, driven over a pipe by its DevTools protocol: no package and no port is needed for that."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NO_CHROMIUM = "no Chromium is installed (Debian: apt-get install chromium)"

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0


class Page:
    """A page in the browser.

    Attributes:
        complaints: everything that it wrote to the console as a warning or an error, and every exception.
        requests: addresses of everything that it asked for, its own included.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **parameters: Any) -> Any:
        return self._browser.send(method, self._session, **parameters)

    def open(self, file: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.complaints.clear()
        self.requests.clear()
        self.send("Page.navigate", url=file.as_uri())
        self.wait("document.readyState === 'complete' && document.querySelector('main') !== null")

    def size(self, width: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, **features: str) -> None:
        """Set what the system is said to prefer: ``prefers_color_scheme="dark"``."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def run(self, script: str) -> Any:
        """Return what an expression gives, or what its promise does."""
        # What a test runs obeys the page's policy as well.
        reply = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )
        if "exceptionDetails" in reply:
            raise AssertionError(f"{script}: {reply['exceptionDetails']['exception'].get('description')}")
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.run(condition):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {condition}; the console has {self.complaints}")
            time.sleep(0.02)

    def key(self, key: str, code: int = 0, text: str = "") -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def point(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, whole: bool = False) -> bytes:
        """Return a PNG of the window, or of the whole page."""
        reply = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        return base64.b64decode(reply["data"])

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def hear(self, event: str, content: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(content["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(content["args"]))
        elif event == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.complaints.append(content["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])


class Browser:
    """A running Chromium; see :func:`browser`."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._pages: dict[str, Page] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        for reply in self._messages():
            if reply.get("id") == number:
                if "error" in reply:
                    raise AssertionError(f"{method}: {reply['error']}")
                return reply["result"]
            page = self._pages.get(reply.get("sessionId", ""))
            if page is not None and "method" in reply:
                page.hear(reply["method"], reply["params"])
        raise AssertionError(f"{method}: Chromium has ended")

    def page(self) -> Page:
        """Return a new page."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        return page

    def downloads(self, folder: Path) -> None:
        """Save what pages hand over in a folder."""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._out], [], [], _PATIENCE)
                if not ready:
                    raise AssertionError(f"Chromium did not answer within {_PATIENCE:.0f} s")
                piece = os.read(self._out, 1 << 20)
                if not piece:
                    return
                self._buffer += piece
            message, _, self._buffer = self._buffer.partition(b"\0")
            yield json.loads(message)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run Chromium with a profile of its own in a folder."""
    assert CHROMIUM is not None, NO_CHROMIUM
    commands, into = os.pipe()
    out, answers = os.pipe()
    # Above 3 and 4, where Chromium looks for its pipe, so that neither is overwritten on the way there.
    theirs = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, answers)]
    os.close(commands)
    os.close(answers)

    def place() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"],
        preexec_fn=place,
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for one in theirs:
        os.close(one)
    try:
        yield Browser(into, out)
    finally:
        # It ends when its pipe does.
        os.close(into)
        os.close(out)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
