"""A chat template in a process of its own, started and ended from here.

    write = Renderer(template)                       # TemplateError where it is none
    write("text", messages=[...], eos_token="</s>")  # the conversation as text

What the process does is in child.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

WALL_SECONDS = 30.0  # for one conversation, where the system cannot count the processor's


class TemplateError(ValueError):
    """A chat template that is none, or that cannot write a conversation."""


class Renderer:
    """A template in a process of its own, with limits on time and memory (child.py).

    Started when it is first needed, and anew in a process that was forked since. Threads wait for each other. Raises
    TemplateError.
    """

    def __init__(self, template: str):
        self.template, self.pid = template, 0
        self.child: subprocess.Popen | None = None
        self.lock = threading.RLock()
        self("template", template=template)

    def __call__(self, part: str, **request) -> str:
        """What the child answers: the `part` of its reply."""
        if self.pid != os.getpid():
            self.child, self.lock = None, threading.RLock()  # a fork copies a lock that may be held
        with self.lock:
            if self.child is None:
                self._start()
                if part != "template":
                    self("template", template=self.template)
            reply = self._ask(request)
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply.get(part, "")

    def _start(self) -> None:
        script = str(Path(__file__).with_name("child.py"))
        # In a session of its own: Ctrl-C in a terminal is for this process alone.
        self.child = subprocess.Popen(
            [sys.executable, script], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = os.getpid()
        weakref.finalize(self, end, self.child)

    def _ask(self, request: dict) -> dict:
        child = self.child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        guard = threading.Timer(WALL_SECONDS, child.kill) if os.name == "nt" else None  # elsewhere it ends itself
        if guard:
            guard.start()
        try:
            child.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())
        except (OSError, ValueError) as error:
            end(child)
            self.child = None
            raise TemplateError("it takes too much time or memory, and was stopped") from error
        finally:
            if guard:
                guard.cancel()


def end(child: subprocess.Popen) -> None:
    """Ends a child and lets go of its pipes."""
    child.kill()
    for pipe in filter(None, (child.stdin, child.stdout)):
        with contextlib.suppress(OSError):
            pipe.close()
    child.wait()
