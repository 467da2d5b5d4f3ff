"""A real headless Chromium, driven over its DevTools pipe with nothing but the standard library."""

import base64
import functools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--disable-extensions", "--remote-debugging-pipe", "--force-prefers-reduced-motion"),
)
KEYS = {"Tab": 9, "Enter": 13, " ": 32}


def find() -> str | None:
    """The browser named by TRAP2_BROWSER, else the first on the path; None where there is none."""
    named = os.environ.get("TRAP2_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page: what it shows, what it asked the network for, what it complained about."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self("enable", domain)

    def __call__(self, method: str, domain: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(f"{domain}.{method}", params, self._session)

    def open(self, path: Path) -> None:
        """Load a file and wait until it is whole."""
        self._browser.events.clear()
        self("navigate", "Page", url=path.as_uri())
        self._browser.wait("Page.loadEventFired")

    @property
    def requests(self) -> list[str]:
        """Addresses asked for so far, the page's own left out."""
        sent = [e["params"] for e in self._browser.events if e["method"].endswith("WillBeSent")]
        return [p["request"]["url"] for p in sent if p.get("type") != "Document"]

    @property
    def complaints(self) -> list[str]:
        """Errors, warnings and refusals the console shows."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(e["params"]) for e in self._browser.events if e["method"] in kinds]

    def run(self, code: str) -> Any:
        """The value of an expression on the page."""
        answer = self("evaluate", "Runtime", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release one key, as a person would."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        named = {"key": key, "windowsVirtualKeyCode": KEYS[key], "text": text}
        self("dispatchKeyEvent", "Input", type="keyDown", **named)
        self("dispatchKeyEvent", "Input", type="keyUp", **named)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self("insertText", "Input", text=text)

    def look(self, width: int, height: int = 800, scheme: str = "light", media: str = "") -> None:
        """Change the window's size, the colour scheme and the medium."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("setDeviceMetricsOverride", "Emulation", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("setEmulatedMedia", "Emulation", media=media, features=features)

    def picture(self, path: Path, **options: Any) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self("captureScreenshot", "Page", **options)["data"]))


class Browser:
    """The process and its pipe: messages are JSON ended by a zero byte."""

    def __init__(self, command: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self.events: list[dict[str, Any]] = []
        self._rest, self._last = b"", 0
        self.process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=functools.partial(_as_3_and_4, theirs_in, theirs_out),
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def send(self, method: str, params: dict[str, Any], session: str = "") -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._read()

    def tab(self) -> Tab:
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        return Tab(self, attached["sessionId"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "the browser does not answer"
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser has gone"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        parsed = json.loads(message)
        if "method" in parsed:
            self.events.append(parsed)
        return parsed


@contextmanager
def launched(command: str, profile: Path) -> Iterator[Browser]:
    """A running browser with a profile of its own, ended afterwards."""
    browser = Browser(command, profile)
    try:
        yield browser
    finally:
        browser.send("Browser.close", {})
        browser.process.wait(timeout=20)


def _as_3_and_4(theirs_in: int, theirs_out: int) -> None:
    """Give the child its two ends under the numbers Chromium expects, in either order."""
    spare = os.dup(theirs_in), os.dup(theirs_out)
    os.dup2(spare[0], 3)
    os.dup2(spare[1], 4)
