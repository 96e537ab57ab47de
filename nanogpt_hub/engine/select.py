"""The door to everything fast: which engine generates, and what it may be trusted with.

    engine = open_engine("auto")                     # once for each generation, so that its text has one engine
    decoder = engine.decoder(model, cache)           # .hidden(idx), .head(x) as the model has them; .engine names it
    sample = decoder.sampler(logits, samplers)       # a compiled sampler that knows the samplers that are on, or None

| engine | what computes a token |
|---|---|
| plain | model.py itself: what the program means |
| torch | PyTorch, with the questions of each step answered once (torch_decoder.py) |
| numba | one compiled function for a pass, and one for the draw (kernels.py, numba_sampler.py) |
| auto  | numba where its code is ready and stamped (prepare.py), else torch |

Each of the fast ones is compared with model.py at first use with a model (check.py). Where it does not know the model
or gives other numbers, the next slower one takes its place, with a sentence in the log. Where model.py was edited, all
goes the plain way and nothing is compiled. `NANOGPT_HUB_ENGINE` is what counts when no engine is asked for.
"""

import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from nanogpt_hub.edits.core import running_core
from nanogpt_hub.engine import ENGINES
from nanogpt_hub.engine.check import first_difference, pieces_for
from nanogpt_hub.engine.torch_decoder import PlainDecoder, TorchDecoder, known_structure, structure
from nanogpt_hub.model import GPT, KVCache

logger = logging.getLogger("nanogpt_hub.engine")

VARIABLE = "NANOGPT_HUB_ENGINE"


@dataclass(frozen=True)
class Engine:
    """What one generation is computed with."""

    name: str  # plain, torch or numba: the fastest that may be used
    code: ModuleType | None = None  # numba_decoder.py, its compiled code loaded

    def decoder(self, model: GPT, cache: KVCache) -> PlainDecoder:
        """The fastest decoder of this engine that knows the model and was seen to agree with it."""
        made = None
        if self.code and self.code.supports(model, cache):
            made = trusted(self.code.NumbaDecoder, model, cache)
        if made is None and self.name != "plain" and known_structure(model):
            made = trusted(TorchDecoder, model, cache)
        return made or PlainDecoder(model, cache)


PLAIN = Engine("plain")


# ---- whether a fast decoder agrees with the model ----

# Model -> class of decoder -> the structure with which they were compared, and whether they agreed.
verdicts: "weakref.WeakKeyDictionary[GPT, dict[type, tuple[list, bool]]]" = weakref.WeakKeyDictionary()


def trusted(kind: type[PlainDecoder], model: GPT, cache: KVCache) -> PlainDecoder | None:
    """A decoder of a kind if it gives what the model gives, else None. They are compared at first use, and again when
    the structure of the model has changed."""
    known, found, made = verdicts.setdefault(model, {}), structure(model), None
    compared, agreed = known.get(kind, ([], True))
    if compared == found and not agreed:
        return None
    try:
        pieces = pieces_for(model.config.block_size)
        difference = None if compared == found else first_difference(model, kind, pieces=pieces)
        made = None if difference else kind(model, cache)
    except Exception as error:  # a model may be changed in any way; what matters is that the plain way goes on
        difference = f"{type(error).__name__}: {error}"
    known[kind] = found, made is not None
    if difference:
        logger.warning(
            f"the {kind.engine} engine does not compute what model.py computes ({difference}), so it is "
            "switched off for this model: generation goes on a slower way"
        )
    return made


def core_is_known() -> bool:
    """Whether model.py, as this process runs it, is the one that the fast decoders repeat."""
    return not running_core().changed


# ---- compiled code ----


class Preparation:
    """The compiled code of this process: asked for once, loaded when it is stamped."""

    def __init__(self):
        self.lock = threading.Lock()
        self.code: ModuleType | None = None
        self.watcher: threading.Thread | None = None  # of the child that this process started
        self.over = False  # nothing more will come: no Numba, or it failed
        self.missing = ""  # why Numba cannot be imported
        self.warned = False

    def poll(self) -> ModuleType | None:
        """The code if it is there; else has a child make it, once, and returns None. Never raises, never waits for a
        compiler."""
        with self.lock:
            if self.code is None and not self.over:
                self._look()
            return self.code

    def wait(self) -> ModuleType | None:
        """The code, however long its preparation takes; None where it cannot be had, which a warning explains."""
        while self.poll() is None and not self.over:
            if self.watcher and self.watcher.is_alive():
                self.watcher.join()
            else:  # another process does it
                time.sleep(0.2)
        if self.missing:  # without Numba a warning is for those who asked for it
            self._warn(self.missing)
        return self.code

    def _look(self) -> None:
        try:
            from nanogpt_hub.engine import prepare

            path = prepare.folder()
            prepare.check_private(path)
            stamp = prepare.read_stamp(path)
            if stamp.status == "ready" and not self._load(path, stamp.code):
                stamp = stamp._replace(status="lost", reason="its code was damaged again and again")
                prepare.write_stamp(path, stamp)  # a child makes it anew
            if self.code or (self.watcher and self.watcher.is_alive()) or prepare.is_at_work(path):
                return
            if self.watcher or not stamp.may_try:
                self._give_up(stamp.reason or "an earlier attempt did not end")
            else:
                self._start(path)
        except ImportError as error:
            self.over, self.missing = True, f"Numba cannot be imported: {error}"
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _load(self, path: Path, code: str) -> bool:
        """Loads stamped code. False where it is gone or damaged; a second time, after it was made anew, an error."""
        from nanogpt_hub.engine import numba_decoder, numba_sampler, prepare, threads

        try:
            if prepare.code_hash(path) != code:
                raise threads.NotPreparedError(f"the code in {path} is not what its stamp says")
            with threads.code_in(path / prepare.CODE):
                for work in (numba_decoder.decode_pass, numba_sampler.sample_rows):
                    threads.entry_point(work)
        except Exception:  # a damaged file may raise anything
            if self.watcher:
                raise
            return False
        self.code = numba_decoder
        return True

    def _start(self, path: Path) -> None:
        from nanogpt_hub.engine import prepare

        since, child = time.time(), prepare.start_child(path)

        def watch() -> None:
            stamp = prepare.record_end(path, child.wait(), since)
            if stamp.status == "failed":
                self._warn(stamp.reason)

        self.watcher = threading.Thread(target=watch, name="engine preparation", daemon=True)
        self.watcher.start()

    def _give_up(self, reason: str) -> None:
        self.over = True
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        """Says once why there is no compiled code."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "generation goes on in PyTorch: the compiled engine could not be prepared on this machine "
                f"({reason}); NANOGPT_HUB_ENGINE=torch asks for no other"
            )


preparation = Preparation()


# ---- what a generation asks ----


def engine_setting(engine: str | None = None, default: str = "auto") -> str:
    """The engine asked for: `engine`, else NANOGPT_HUB_ENGINE, else `default`. ValueError for an unknown one."""
    name = engine or os.environ.get(VARIABLE) or default
    if name not in ENGINES:
        where = "" if engine else f" (from {VARIABLE})"
        raise ValueError(f"engine is {name!r}{where}; it must be one of {', '.join(ENGINES)}")
    return name


def open_engine(engine: str | None = None, device: str | torch.device = "cpu") -> Engine:
    """The engine for one generation on a device. "numba" waits until it is prepared; "auto" takes it if it is, and has
    it prepared on the side if not. With an edited core it is model.py itself: an edit may show only far into a context,
    or once the weights are trained. ValueError for an unknown name."""
    name = engine_setting(engine)
    if name == "plain" or not core_is_known():
        return PLAIN
    if name == "torch" or torch.device(device).type != "cpu":
        return Engine("torch")
    code = preparation.wait() if name == "numba" else preparation.poll()
    return Engine("numba", code) if code else Engine("torch")
