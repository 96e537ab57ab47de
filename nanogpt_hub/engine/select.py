"""Which way to generate: the fastest that is ready.

    decoder = best_decoder(model, cache)         # loops.py, once it is compiled and where it suits, else decode.py
    choose = best_sampler(logits, on)            # that of numba_sampler.py, once it is compiled, or None
    compiler.start().join()                      # have it compiled now, and wait for that

Compiling begins by itself, in the background, in a process that has generated for a while. Without Numba, or where it
fails, everything works as before.
"""

import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from nanogpt_hub.engine.torch_decoder import Decoder
from nanogpt_hub.model import GPT, KVCache

PATIENCE = 2.0  # seconds of generation after which a process is worth compiling for


class Compiler:
    """Brings loops.py and choice.py, in the background."""

    def __init__(self):
        self.loops: ModuleType | None = None  # once they are ready
        self.choice: ModuleType | None = None
        self.thread, self.lock = None, threading.Lock()

    def start(self) -> threading.Thread:
        """Begins, if nobody has. It takes half a second, or twelve on a machine where it is done for the first time."""
        with self.lock:
            if self.thread is None:  # no daemon: a process that ends in the middle of compiling may crash
                self.thread = threading.Thread(target=self._compile, name="compile loops")
                self.thread.start()
        return self.thread

    def _compile(self) -> None:
        try:
            from nanogpt_hub.engine import numba_decoder as loops
            from nanogpt_hub.engine import numba_sampler as choice

            loops.team()
            for module in (loops, choice):
                loops.for_threads(module.work)
            self.loops, self.choice = loops, choice
        except ImportError:  # no Numba here
            pass
        except Exception as error:  # whatever a compiler may say: generation goes on as before
            warnings.warn(f"generation goes on without compiled loops: {error}", RuntimeWarning, stacklevel=2)


compiler = Compiler()


def best_decoder(model: GPT, cache: KVCache) -> Decoder:
    """The fastest Decoder that is ready, for this model and this cache."""
    if Decoder.seconds > PATIENCE and cache.k.device.type == "cpu":
        compiler.start()
    loops = compiler.loops
    return loops.Loops(model, cache) if loops and loops.suit(model, cache) else Decoder(model, cache)


SAMPLERS = {"temperature", "top_k", "min_p"}  # that the compiled sampler knows


def best_sampler(logits: torch.Tensor, on: dict[str, float]) -> Callable | None:
    """The compiled sampler, once it is ready, for logits on a CPU and the samplers that are on."""
    usable = compiler.choice and logits.device.type == "cpu" and on.keys() <= SAMPLERS
    return compiler.choice.choose if usable else None
