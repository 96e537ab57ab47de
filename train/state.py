"""The training state on disk: all that a run needs to go on as if nothing had happened, in safetensors and JSON.

    state/state.json                     step, counters, best loss, and which two files belong to it
    state/model-00000500.safetensors     the weights in the precision they are trained in
    state/optimizer-00000500.safetensors moments and momenta, by parameter name
    state/previous.json                  the same of the save before, with its two files

The tensors are written under new names first and state.json is replaced last, in one rename: a process killed at any
moment leaves either the old state or the new one, whole. state.json holds the SHA-256 of its two files and of itself,
so that damage shows before anything is trained on it; then the save before is still there. No random state is kept:
data order and dropout are functions of (seed, step).
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_hub.system.files import replacing, sha256_of, write_atomic

FORMAT = 1
STATE, PREVIOUS = "state.json", "previous.json"
PARTS = ("model", "optimizer")  # the two files of tensors
COUNTERS = ("step", "tokens", "seconds", "best_loss", "best_step", "first_loss", "last_loss", "evaluated_step", "stale")


class StateError(ValueError):
    """A training state that is damaged or foreign; nothing was changed."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_state(folder: Path, facts: dict, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Writes the state of step `facts["step"]` and keeps the one before; older ones go when the new one is complete.

    Raises OSError or SafetensorError where the disk is full or cannot be written: then all is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, hashes = {}, {}
    for part, tensors in zip(PARTS, (model, optimizer), strict=True):
        files[part] = f"{part}-{facts['step']:08d}.safetensors"
        with replacing(folder / files[part]) as aside:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
            hashes[part] = sha256_of(aside)
    _keep_previous(folder, facts["step"])
    write_atomic(folder / STATE, sealed({"format": FORMAT, **facts, "files": files, "sha256": hashes}))
    remove_older(folder)


def sealed(facts: dict) -> str:
    """The text of state.json: the facts, and a hash over them."""
    return json.dumps({**facts, "seal": seal_of(facts)}, indent=2)


def seal_of(facts: dict) -> str:
    return sha256_of(json.dumps({k: v for k, v in facts.items() if k != "seal"}, sort_keys=True).encode())


def _keep_previous(folder: Path, step: int) -> None:
    """What state.json says becomes what previous.json says; not where the same step is saved again."""
    with contextlib.suppress(StateError):  # damaged while the run went on: the one before it stays
        last = read_facts(folder)
        if last is not None and last["step"] != step:
            write_atomic(folder / PREVIOUS, (folder / STATE).read_bytes())


def remove_older(folder: Path) -> None:
    """Removes the tensors that neither the state nor the one before it names: a kill may have come before that."""
    named = set()
    for name in (STATE, PREVIOUS):
        with contextlib.suppress(StateError):
            named |= set((read_facts(folder, name) or {"files": {}})["files"].values())
    for path in folder.glob("*.safetensors*"):
        if path.name not in named:
            path.unlink()


def go_back(folder: Path) -> None:
    """Makes the state before the last one the state."""
    write_atomic(folder / STATE, (folder / PREVIOUS).read_bytes())


def seal_fetched(folder: Path) -> None:
    """Seals a state anew that came from the Hub, which has hashes of its own: on the way what is private was taken out
    of its texts, and the run's log was written anew."""
    with contextlib.suppress(ValueError, OSError):  # one that is none is refused where it is read
        facts = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if isinstance(facts, dict) and "seal" in facts:
            facts.pop("log", None)
            write_atomic(folder / STATE, sealed(facts))


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_facts(folder: Path, name: str = STATE) -> dict | None:
    """What state.json (or `name`) says, or None where there is none. Raises StateError for one that cannot be read."""
    path = folder / name
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(f"{path} is damaged: it is not a training state ({type(error).__name__})") from error
    if version != FORMAT:
        raise StateError(f"{path} has format {str(version)[:20]}, and this version reads {FORMAT}")
    if "seal" in facts and facts["seal"] != seal_of(facts):
        raise StateError(f"{path} is damaged: its content is not what was saved")
    return _checked(path, facts)


def _checked(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, if what a run needs of them is there. (States of earlier versions have no seal.)"""
    files = facts.get("files")
    names = [files.get(part) for part in PARTS] if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise StateError(f"{path} is damaged: it does not name the files of its tensors")
    if type(facts.get("step")) is not int or facts["step"] < 0:
        raise StateError(f"{path} is damaged: it does not tell its step")
    return facts


def check_files(folder: Path, facts: dict) -> bool:
    """Compares the files of a state with the hashes in it. False where it has none, being of an earlier version.

    Raises StateError for a file that is gone or is not the one that was saved.
    """
    hashes = facts.get("sha256", {})
    for part in PARTS:
        path = folder / facts["files"][part]
        if not path.is_file():
            raise StateError(f"{path} is missing: the training state of step {facts['step']} needs it")
        if part in hashes and sha256_of(path) != hashes[part]:
            raise StateError(f"{path} is damaged, or of another run: its sha256 is not the one in the state")
    return bool(hashes)


def find_whole(folder: Path, name: str) -> dict | None:
    """The facts of a state whose files are all there and as they were saved; None where it is none, or damaged."""
    try:
        facts = read_facts(folder, name)
        if facts is not None:
            check_files(folder, facts)
    except StateError:
        return None
    return facts


def load_tensors(folder: Path, facts: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and the optimizer's tensors that belong to `facts`. Raises StateError for a file that is gone or
    cannot be read; whether they are the ones that were saved is for `check_files` to say."""
    loaded = []
    for part in PARTS:
        path = folder / facts["files"][part]
        if not path.is_file():
            raise StateError(f"{path} is missing: the training state of step {facts['step']} needs it")
        try:
            loaded.append(load_file(path))
        except SafetensorError as error:
            raise StateError(f"{path} is damaged: {error}") from error
    return loaded[0], loaded[1]
