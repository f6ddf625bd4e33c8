"""A headless Chromium for tests and screenshots, spoken to through pipes; nothing but Chromium is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
CHROMIUM_FLAGS = ("--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")


class Browser:
    """A headless Chromium, spoken to through pipes: JSON messages, NUL between (Chrome DevTools Protocol)."""

    def __init__(self, profile):
        commands, self.outgoing = os.pipe()
        self.incoming, replies = os.pipe()
        redirect = f'exec "$@" 3<&{commands} 4>&{replies}'  # Chromium reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "chromium", CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands, replies), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(replies)
        self.unread, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.outgoing)
        os.close(self.incoming)

    def _receive(self):
        while b"\0" not in self.unread:
            assert select.select([self.incoming], [], [], 60)[0], "Chromium does not answer"
            arrived = os.read(self.incoming, 1 << 16)
            assert arrived, "Chromium has gone"
            self.unread += arrived
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression):
        end = time.monotonic() + 60
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def open(self, page, place=""):
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + place)
        self.wait_for("document.readyState === 'complete' && document.querySelector('#group > *') !== null")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def click(self, selector):
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, name, value):
        self.evaluate(f"(() => {{ const menu = document.getElementById({name!r}); menu.value = {value!r};"
                      "menu.dispatchEvent(new Event('change')); })()")

    def place(self):
        """(step, question) that the inspector shows."""
        return (self.evaluate("document.getElementById('step').selectedOptions[0].text"),
                self.evaluate("document.getElementById('place').textContent"))

    def wait_for_place(self, *place):
        self.wait_for(f"document.getElementById('step').selectedOptions[0].text === '{place[0]}' && "
                      f"document.getElementById('place').textContent.startsWith('question {place[1]} ')")

    def complaints(self):
        """Errors, console messages, and requests for anything but the page."""
        bad = [event for event in self.events if event.get("method") in (
            "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        requests = [event["params"]["request"]["url"] for event in self.events
                    if event.get("method") == "Network.requestWillBeSent"]
        return bad + [url for url in requests if not url.startswith(("file://", "about:"))]

    def resize(self, width, height, dark=False, scale=1):
        """A window of this size, light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, file: Path):
        """The window as a PNG file."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
