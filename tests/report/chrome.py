"""A headless Chromium, spoken to by its DevTools protocol over a pipe."""

import json
import os
import subprocess


class Chromium:
    """`page` opens an address; `js` runs a script in it; `events` are what it has said unasked."""

    def __init__(self, program, folder):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # Descriptors 3 and 4 are those of the protocol; a shell puts ours there.
        arguments = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                     f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking"]  # fmt: skip
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write} 2>/dev/null', "bash", *arguments]
        self.process = subprocess.Popen(shell, pass_fds=(read, write), stdout=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.number, self.buffer, self.events = 0, b"", []

    def _next(self):
        while b"\0" not in self.buffer:
            if not (some := os.read(self.read, 1 << 20)):
                raise EOFError("chromium has ended")
            self.buffer += some
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def page(self, url, width=1280, height=900, theme="light"):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.media(features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.said("Page.loadEventFired"):
            self.events.append(self._next())

    def media(self, **what):
        self.call("Emulation.setEmulatedMedia", **what)

    def said(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def js(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write), os.close(self.read)
