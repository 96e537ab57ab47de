"""What the benchmarks share: taking turns, the machine's limits, tables."""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

OUT = Path("out/bench")
Taken = dict[str, list[float]]  # name -> seconds in each round


def alternate(runs: dict[str, Callable[[], object]], rounds: int, desc: str = "") -> Taken:
    """Seconds of each run, each in each round: whatever else the machine does meets all of them. One more, untimed
    round comes first."""
    taken: Taken = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=desc, unit="round", leave=False):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                taken[name].append(time.perf_counter() - started)
    return taken


def ratio(taken: Taken, peer: str, ours: str) -> float:
    """How many times as long the peer took: the median over the rounds."""
    return median(p / o for p, o in zip(taken[peer], taken[ours], strict=True))


@contextmanager
def workers(
    makers: dict[str, tuple[Callable, ...]], threads: int, trainers: tuple[str, ...] = ()
) -> Iterator[dict[str, Callable]]:
    """For each name a function that does its work in a process of its own: what the maker, called there with the rest
    of its tuple, gives back. So none changes how another one allocates memory; only `trainers` wait for their threads
    as our trainer does (see train/__init__.py)."""
    context, functions, running = multiprocessing.get_context("spawn"), {}, []
    try:
        for name, maker in makers.items():
            pipe, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, threads, *maker), daemon=True)
            if name in trainers:
                process.start()
            else:
                with without(os.environ, "GOMP_SPINCOUNT"):
                    process.start()
            far.close()  # so that its end is noticed here
            running.append((pipe, process))
            functions[name] = lambda *args, pipe=pipe: _ask(pipe, args)
            _ask(pipe, None)  # one after the other: making a model is work too
        yield functions
    finally:
        for pipe, process in running:
            pipe.close()
            process.join(30)


@contextmanager
def without(mapping: MutableMapping[str, str], key: str) -> Iterator[None]:
    """A key is not there inside."""
    value = mapping.pop(key, None)
    try:
        yield
    finally:
        if value is not None:
            mapping[key] = value


def times(n: int, work: Callable[[], object]) -> Callable[[], None]:
    """Does it n times in a row."""

    def run() -> None:
        for _ in range(n):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def in_fresh_process(module: str, *args: str) -> int:
    """The number that a module prints last when it is run by itself."""
    command = [sys.executable, "-m", module, *args]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def process_peak() -> int:
    """The most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells on Linux begins with the peak of whoever started the process
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ask(pipe: Connection, args: tuple | None) -> object:
    pipe.send(args)
    return pipe.recv()


def _serve(pipe: Connection, threads: int, maker: Callable, *args) -> None:
    torch.set_num_threads(threads)
    work = maker(*args)
    try:
        while True:
            given = pipe.recv()
            pipe.send(None if given is None else work(*given))
    except EOFError:  # nobody asks any more
        pass


def reader(n_bytes: int) -> Callable[[], object]:
    """What reads so many bytes from memory with all threads and computes next to nothing: the limit of what must read
    them. It goes round in a block that no cache holds, by whichever of two ways is faster on this machine."""
    block, x = torch.ones(2**16, 2**11), torch.ones(2**11)  # 512 MB
    ways = {"product": lambda rows: torch.mv(rows, x), "sum": lambda rows: rows.view(torch.int64).sum()}
    taken = alternate({name: lambda way=way: way(block) for name, way in ways.items()}, 3)
    read = ways[min(taken, key=lambda name: min(taken[name]))]
    turns, rest = divmod(n_bytes, block.nbytes)
    part = block[: max(1, rest // block[0].nbytes)]
    return lambda: [read(block if turn < turns else part) for turn in range(turns + 1)]


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory, at best."""
    n_bytes = 2**29
    return n_bytes / min(alternate({"read": reader(n_bytes)}, 5)["read"])


def machine() -> dict[str, object]:
    """What the figures come from."""
    from train.hardware import matmul_flops  # not above: a worker that does not train must not import the trainer

    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names or [platform.processor() or platform.machine()])[0], "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "read_gb_per_s": read_bandwidth() / 1e9,
        "torch_mm_gflop_per_s": matmul_flops("cpu", "fp32") / 1e9,
    }  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as Markdown: numbers to four digits, on the right."""
    names = list(rows[0])
    right = [not isinstance(rows[0][name], str) for name in names]
    lines = [names, ["---:" if number else "---" for number in right]]
    lines += [[shown(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def report(name: str, rows: list[dict[str, object]]) -> None:
    """Prints the table and the machine, and keeps both as out/bench/NAME.json."""
    here = machine()
    print(table(rows))
    print("\n" + ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in here.items()))
    OUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, "machine": here, "rows": rows}, indent=2)
    (OUT / f"{name}.json").write_text(text, encoding="utf-8")
