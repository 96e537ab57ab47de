"""Processes that work for another one and end with it."""

import os
import threading
import time


def end_with_parent(parent: int, interval: float = 1.0) -> None:
    """Ends this process soon after process `parent`, its parent, has ended, however that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)  # what is half written stays half written: the next one goes on from the last whole shard

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
