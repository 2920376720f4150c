"""A headless Chromium, driven over its debugging pipe: no further package, no port."""

import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser that reaches no network.

    Attributes:
        faults: what was said on the console, thrown or not found, of every page.
        asked: the addresses that pages asked for, those of their own content (data:, blob:) left out.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.faults: list[str] = []
        self.asked: list[str] = []
        self._session: str | None = None
        self._contexts: dict[str, int] = {}  # by frame
        self._number = 0
        self._buffer = b""
        read_end, self._to = os.pipe()
        self._from, write_end = os.pipe()

        def pipes() -> None:  # the browser reads from file descriptor 3 and writes to 4
            incoming, outgoing = os.dup(read_end), os.dup(write_end)
            os.dup2(incoming, 3)
            os.dup2(outgoing, 4)

        self._process = subprocess.Popen(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--proxy-server=127.0.0.1:9", "--remote-debugging-pipe",
                "--window-size=1400,1000", "--hide-scrollbars", f"--user-data-dir={profile}",
            ],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_end)
        os.close(write_end)
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "the browser does not answer"
            got = os.read(self._from, 1 << 20)
            assert got, "the browser has died"
            self._buffer += got
        message, self._buffer = self._buffer.split(b"\0", 1)
        event = json.loads(message)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method: str | None, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.faults.append(str(event["exceptionDetails"].get("exception", {}).get("description", event)))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.faults.append(f"{event['type']}: {[each.get('value') for each in event['args']]}")
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.faults.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Network.loadingFailed" and not event.get("canceled"):
            self.faults.append(event["errorText"])
        elif method == "Runtime.executionContextCreated":
            self._contexts[event["context"]["auxData"]["frameId"]] = event["context"]["id"]
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("data:", "blob:")):
            self.asked.append(event["request"]["url"])

    def resize(self, width: int) -> None:
        """Make the window so many pixels wide."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)

    def open(self, page: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.command("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, script: str, **where: Any) -> Any:
        """The value of an expression of JavaScript in the page."""
        done = self.command("Runtime.evaluate", expression=script, returnByValue=True, **where)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def click(self, text: str) -> None:
        """Click on the link of that text."""
        links = "[...document.querySelectorAll('a')]"
        self.run(f"{links}.find(link => link.innerText.trim() === {json.dumps(text)}).click()")

    def run_inside(self, script: str) -> Any:
        """The value of an expression in the page's one inner frame; None where that is not loaded."""
        frames = self.command("Page.getFrameTree")["frameTree"].get("childFrames", [])
        context = self._contexts.get(frames[0]["frame"]["id"]) if frames else None
        if context is None or self.run("document.readyState", contextId=context) != "complete":
            return None
        return self.run(script, contextId=context)

    def wait_inside(self, script: str) -> None:
        """Wait until an expression is true in the inner frame."""
        deadline = time.monotonic() + 60
        while not self.run_inside(script):
            assert time.monotonic() < deadline, f"never true in the frame: {script}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """What the page looks like, as png."""
        path.write_bytes(b64decode(self.command("Page.captureScreenshot")["data"]))
