"""Headless Chromium, driven over a pipe by the Chrome DevTools Protocol: no driver, no package besides the browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 20  # that an answer, or what `until` waits for, may take
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39, " ": 32}
SHIFT = 8
# Chromium reads its commands from 3 and writes to 4: moves our ends there, in a process of its own.
ENDS = """
import fcntl, os, sys
high = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. Methods of the protocol: `call("Page.navigate", url=...)`."""

    def __init__(self, profile: Path):
        """profile: an empty folder. Skips the test where there is no Chromium."""
        program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if not program:
            pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is on the PATH, and CHROMIUM names none")
        (read_in, self._out), (self._in, write_out) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
        command = [sys.executable, "-ISc", ENDS, str(read_in), str(write_out), program, *flags]
        self._process = subprocess.Popen(command, pass_fds=(read_in, write_out), stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(read_in)
        os.close(write_out)
        self._rest, self._number, self._session, self.problems = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            there, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
            assert there, f"the browser has said nothing for {SECONDS} s; before that {self.problems}"
            assert (more := os.read(self._in, 1 << 20)), f"the browser has ended; before that {self.problems}"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        """Keeps what the page did wrong: errors of scripts, and what the policy refused."""
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(event["params"]["exceptionDetails"].get("exception", {}).get("description", "?"))
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.problems.append(event["params"]["entry"]["text"])

    def open(self, url: str, width: int = 1280, height: int = 800, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.body.childElementCount > 0")

    def get(self, expression: str):
        """-> the value of a JavaScript expression, of a promise what it becomes."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def of(self, selector: str, what: str):
        """-> `what` of an element, such as ".value"."""
        return self.get(f"document.querySelector({json.dumps(selector)}){what}")

    def there(self, selector: str) -> None:
        """Returns as soon as there is such an element."""
        self.until(f"document.querySelector({json.dumps(selector)})")

    def until(self, condition: str) -> None:
        """Returns as soon as the expression is true: it is looked at before each frame."""
        end = time.monotonic() + SECONDS
        while not self.get(f"new Promise(done => {{ let n = 0; const look = () => ({condition}) ? done(true) : "
                           "n++ < 60 ? requestAnimationFrame(look) : done(false); look(); })"):  # fmt: skip
            assert time.monotonic() < end, f"{condition} is still not so: {self.get('document.body.innerText')}"

    def click(self, selector: str) -> None:
        """Clicks where a finger would: in the middle of what is seen of it."""
        x, y = self.get("(() => { const e = document.querySelector(" + json.dumps(selector) + ");"
                        " e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
                        " return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **common)

    def drop(self, *paths: Path) -> None:
        """Drags files onto the middle of the page and lets them go."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def choose(self, selector: str, *paths: Path) -> None:
        """Gives files to a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
