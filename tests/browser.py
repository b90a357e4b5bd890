"""A headless Chromium for tests, driven over a pipe by its DevTools protocol."""
import json
import os
import select
import shutil
import subprocess

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync "
         "--disable-component-update --remote-debugging-pipe").split()
PATIENCE = 30  # seconds for an answer


class Browser:
    """One page of a new Chromium.  profile: an empty folder.  flags: further flags.

    https://chromedevtools.github.io/devtools-protocol/; with --remote-debugging-pipe, a message is JSON and a zero byte.
    """

    def __init__(self, profile, *flags: str):
        # Chromium reads commands from the file descriptor 3 and writes to 4.
        command = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 >&2', CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.received, self.session, self.count, self.requested = b"", {}, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Network.enable")

    def message(self) -> dict:
        while b"\0" not in self.received:
            assert select.select([self.process.stdout], [], [], PATIENCE)[0], "Chromium does not answer"
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            assert part, "Chromium has ended"
            self.received += part
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        """The result of a command.  `requested` gets the addresses of requests that the page sent before it."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": parameters} | self.session
        self.process.stdin.write(json.dumps(command).encode() + b"\0")
        self.process.stdin.flush()
        while (message := self.message()).get("id") != self.count:
            if message["method"] == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
        assert "error" not in message, message["error"]
        return message["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, or of the promise that it is."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def drop(self, *paths) -> None:
        """Drop these files on the page, as from a file manager."""
        self.evaluate("void (globalThis.dropped = new Promise(done => addEventListener('drop', () => done(), {once: true})))")
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=9, y=9,
                      data={"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1})
        self.evaluate("dropped")

    def choose(self, *paths) -> None:
        """Choose these files in the page's file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(PATIENCE)
