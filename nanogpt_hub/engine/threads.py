"""The threads of a pass: those that PyTorch has already, so that theirs and ours never compete for a core."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from numba import types
from numba.core import config
from numba.core.ccallback import CFunc

from nanogpt_hub.engine.intrinsics import (
    JIT_OPTIONS,
    atomic_add,
    atomic_load,
    atomic_store,
    call_at,
    int64_view,
    jit,
    prefetch,
)
from nanogpt_hub.engine.tuning import LINE_BYTES, SPIN_LINES

ARRIVED, PHASE = 0, 8  # indices of the barrier's numbers, each in a cache line of its own


# ---- for kernels ----


@jit
def thread_range(n, unit, thread, threads):
    """The part lo to hi of n items that a thread takes, in whole units."""
    each = (n + unit * threads - 1) // (unit * threads) * unit
    return min(n, thread * each), min(n, (thread + 1) * each)


@jit
def thread_id(p):
    """The number of this thread, and how many there are."""
    if p.omp_get_num_threads:
        return call_at(p.omp_get_thread_num), call_at(p.omp_get_num_threads)
    return 0, 1


@jit
def barrier(p, threads, ahead):
    """Waits for all threads of the pass. Those that wait prefetch what will be read next, from an address on."""
    if threads == 1:
        return
    state = int64_view(p.barrier_state, 16)
    phase, spins = atomic_load(state, PHASE), 0
    if atomic_add(state, ARRIVED, 1) == threads - 1:
        atomic_store(state, ARRIVED, 0)
        atomic_store(state, PHASE, phase + 1)
    while atomic_load(state, PHASE) == phase:
        spins += 1
        if spins < SPIN_LINES:
            prefetch(ahead + LINE_BYTES * spins)
        elif spins % 4096 == 0 and p.sched_yield:
            call_at(p.sched_yield)


# ---- for Python ----


class NotPreparedError(RuntimeError):
    """Compiled code is not where it was, or was made for something else."""


class PreparedFunction(CFunc):
    """A compiled function as prepare.py left it in Numba's cache. It is never compiled here: that may end a process."""

    def _compile_uncached(self):
        raise NotPreparedError(f"the compiled code of {self.__name__} is missing or was made by another version")


@functools.cache
def entry_point(work: Callable, kind: type[CFunc] = PreparedFunction) -> CFunc:
    """`work(address)` as a C function, from Numba's cache. NotPreparedError where it is not there; with `kind` CFunc it
    is compiled then."""
    function = kind(work, (types.void(types.int64).args, types.void), locals={}, options=dict(JIT_OPTIONS))
    function.enable_caching()
    function.compile()
    return function


@contextmanager
def code_in(folder: Path) -> Iterator[None]:
    """Inside, Numba keeps and looks for compiled code in a folder."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]  # Numba makes its options when it is imported
    config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]  # the same
    try:
        yield
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]  # the same


class Team:
    """PyTorch's OpenMP threads. Where its OpenMP is not GNU's, as on macOS and Windows, a pass has one thread."""

    def __init__(self):
        self.busy = threading.Lock()
        pytorch, libc = ctypes.CDLL(torch._C.__file__), ctypes.CDLL(None) if os.name == "posix" else None
        self.functions = {name: address_of(pytorch, name) for name in ("omp_get_thread_num", "omp_get_num_threads")}
        self.functions["sched_yield"] = address_of(libc, "sched_yield")
        self.parallel = getattr(pytorch, "GOMP_parallel", None)  # function, its argument, threads, flags
        if self.parallel:
            self.parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        else:
            self.functions |= dict.fromkeys(self.functions, 0)

    def run(self, work: Callable, address: int, threads: int) -> None:
        """Calls `work(address)` in each thread. While another pass has the threads, this one has a single one."""
        function = entry_point(work)
        if threads > 1 and self.parallel and self.busy.acquire(blocking=False):
            try:
                self.parallel(function.address, address, threads, 0)
            finally:
                self.busy.release()
        else:
            function.ctypes(address)


def address_of(library: ctypes.CDLL | None, name: str) -> int:
    function = getattr(library, name, None)
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0


@functools.cache
def team() -> Team:
    return Team()
