"""The processes of a run, for tests, without the seconds in which each of them would import PyTorch.

    ranks = Ranks()
    done = ranks.run("-m", "train.pretrain", *flags)     # as `torchrun --nproc_per_node 2 -m train.pretrain ...`

`python tests/ranks.py` imports the trainer once; then it forks a process for each rank that it is told of, with the
variables that a launcher sets. What such a process does, prints and dies of is its own. It has what was imported, but
nothing was computed and no thread runs when it is forked.
"""

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from helpers import own_package

IMPORTED = ("train.pretrain", "train.finetune", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot",
            "transformers", "peft")  # fmt: skip
SECONDS = 240  # that a process may take, which the system ends then


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Ranks:
    """Runs processes that know of each other by gloo on this machine."""

    def __init__(self):
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own_package()
        )

    def run(self, *words: str, n: int = 2, **env: str) -> subprocess.CompletedProcess:
        """n processes of one machine; what they say is put together."""
        ended = self.run_each(
            [words] * n, [{"LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(n), **env} for i in range(n)]
        )
        status = next((one.returncode for one in ended if one.returncode), 0)
        return subprocess.CompletedProcess(
            words, status, "".join(e.stdout for e in ended), "".join(e.stderr for e in ended)
        )

    def run_each(
        self, commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]
    ) -> list[subprocess.CompletedProcess]:
        """A process for each command (`-m MODULE` or a script, and its arguments), with variables of its own."""
        common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with tempfile.TemporaryDirectory() as name:
            said = [Path(name) / str(i) for i in range(len(commands))]
            job = [
                {"words": words, "said": str(out), "env": own_package(**common, RANK=str(i), **env)}
                for i, (words, out, env) in enumerate(zip(commands, said, envs, strict=True))
            ]
            print(json.dumps(job), file=self.server.stdin, flush=True)
            statuses = json.loads(self.server.stdout.readline())
            return [
                subprocess.CompletedProcess(words, status, *(out.with_suffix(s).read_text() for s in (".out", ".err")))
                for words, status, out in zip(commands, statuses, said, strict=True)
            ]

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def serve() -> None:
    """Reads what to start, a line of JSON at a time, and says how it ended."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pids.append(os.fork())
            if not pids[-1]:
                become(**job)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def become(words: list[str], said: str, env: dict[str, str]) -> NoReturn:
    """This process, just forked, runs a command, and ends without taking the libraries down, in which one hung."""
    for number, path in enumerate((os.devnull, said + ".out", said + ".err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    faulthandler.dump_traceback_later(SECONDS - 10, file=2)  # where it hangs
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(env)
    status = 0
    try:
        run_command(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_command(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # as if it had not been imported, of which runpy would warn
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
