"""The training state on disk: all that a run needs to go on as if nothing had happened, in safetensors and JSON.

    state/state.json                     step, counters, best loss, and which two files belong to it
    state/model-00000500.safetensors     the weights in the precision they are trained in
    state/optimizer-00000500.safetensors moments and momenta, by parameter name

The tensors are written under new names first and state.json is replaced last, in one rename: a process killed at any
moment leaves either the old state or the new one, whole. No random state is kept: data order and dropout are functions
of (seed, step).
"""

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_hub.checkpoint import write_atomic

FORMAT = 1


def save_state(folder: Path, facts: dict, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Writes the state of step `facts["step"]`; the one before is deleted only when the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, tensors in (("model", model), ("optimizer", optimizer)):
        files[name] = f"{name}-{facts['step']:08d}.safetensors"
        part = folder / (files[name] + ".part")
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part)
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        part.replace(folder / files[name])
    write_atomic(folder / "state.json", json.dumps({"format": FORMAT, **facts, "files": files}, indent=2))
    for old in folder.glob("*.safetensors*"):
        if old.name not in files.values():
            old.unlink()


def read_facts(folder: Path) -> dict | None:
    """What state.json says, or None where there is no state. Raises ValueError for one that cannot be read."""
    path = folder / "state.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        known = facts["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a training state ({error}); start anew with --overwrite") from error
    if not known:
        raise ValueError(
            f"{path} has format {facts['format']}, this version reads {FORMAT}; start anew with --overwrite"
        )
    return facts


def load_tensors(folder: Path, facts: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and the optimizer's tensors that belong to `facts`. Raises ValueError when a file is gone."""
    paths = [folder / Path(facts["files"][name]).name for name in ("model", "optimizer")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"the training state in {folder} lacks {path.name}; start anew with --overwrite")
    model, optimizer = (load_file(path) for path in paths)
    return model, optimizer
