"""Processes that work for another one and end with it."""

import os
import threading
from collections.abc import Callable


def end_after(parent: Callable[[], object]) -> None:
    """Ends this process as soon as `parent` returns, which waits in a thread until the one it works for has ended.

    A wait for what only that process holds open ends however it was killed. The parent's id would not tell: on Windows
    it stays what it was, and in a virtual environment there it is a launcher's.
    """

    def wait() -> None:
        parent()
        os._exit(1)  # what is half written stays half written: the next one goes on from the last whole shard

    threading.Thread(target=wait, daemon=True, name="end-after-parent").start()
