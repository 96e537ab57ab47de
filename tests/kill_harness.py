"""Kills training runs at every file operation, damages their files, and looks whether anything is lost.

    python -m tests.kill_harness                     # everything: an hour on two cores, and a tally
    python -m tests.kill_harness kills --only adamw muon --random 20 --seed 7
    python -m tests.kill_harness damage

kills: in a forked child that calls the command's own main, SIGKILL at one file operation (an open, write, sync, rename,
removal, link or new folder below the run's folder; half-written files included), then the same command again, killed
again in one case of three; it must end with the files of a run that was never killed, and nothing else. Of a fresh run
each operation is taken once, of each scenario some at random. Commands of their own are stopped at random moments too.
damage: each file of a run that was stopped halfway is truncated, emptied, removed, replaced by another run's, or has a
bit flipped; the same command must refuse it by name and change nothing, or end with the right files.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(60))
COMMON = (
    "--max_steps 6 --batch_size 4 --log_interval 2 --eval.interval 3 --eval.max_windows 4 --eval.sample_tokens 4 "
    "--save.interval 2 --optim.warmup_steps 1 --device cpu"
).split()
TINY = "--model.n_layer 1 --model.n_head 2 --model.n_embd 8 --model.block_size 8 --data.tokenizer char".split()
HUB = "--hub.repo_id alice/fox --hub.minutes 0 --hub.patience_minutes 0.5".split()
TIMING = {"seconds", "tokens_per_second", "mfu"}  # what no two runs have in common
DEADLINE = 600.0  # seconds for a child, which takes one or two where nothing else is at work
TOKEN = "hf_" + "KillHarness" * 3


@dataclass(frozen=True)
class Scenario:
    """A kind of run: the settings that make it, and whether it is a fine-tune or pushes."""

    name: str
    flags: tuple[str, ...] = ()
    finetune: bool = False
    hub: bool = False

    def command(self, place: Path, out: Path) -> list[str]:
        start = ["--from", str(place / "base")] if self.finetune else TINY
        pushes = [*HUB, "--hub.repo_id", f"alice/{out.name}"] if self.hub else []
        return [*COMMON, *start, *self.flags, *pushes, "--data.source", str(place / "fox.txt"), "--out_dir", str(out)]


SCENARIOS = [
    Scenario("adamw", ("--optim.name", "adamw")),
    Scenario("muon", ("--optim.name", "muon")),
    Scenario("dropout", ("--optim.name", "adamw", "--model.dropout", "0.1")),
    Scenario("accumulation", ("--micro_batch_size", "2")),
    Scenario("lora", ("--lora.rank", "2"), finetune=True),
    Scenario("hub", ("--hub.push_state", "true", "--hub.push_steps", "true"), hub=True),
]


# ---- a child that dies -----------------------------------------------------------------------------------------------


class FileOperations:
    """Counts what this process does to files below a folder, and kills it before operation number `kill_at`."""

    NAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")

    def __init__(self, folder: Path, kill_at: int = -1):
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0

    def watch(self) -> None:
        sys.addaudithook(self._audit)
        sync, writing = os.fsync, {name: getattr(Path, name) for name in ("write_text", "write_bytes")}
        os.fsync = lambda handle: (self.tick(), sync(handle))[1]
        for name, real in writing.items():
            setattr(Path, name, self._in_halves(real))
        import nanogpt_hub.checkpoint
        import train.state

        for module in (nanogpt_hub.checkpoint, train.state):
            module.save_file = self._half_saved(module.save_file)

    def tick(self) -> None:
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _audit(self, event: str, args: tuple) -> None:
        if (event in self.NAMES or event == "open") and isinstance(args[0], (str, os.PathLike)):
            reading = event == "open" and isinstance(args[2], int) and not args[2] & (os.O_WRONLY | os.O_RDWR)
            if not reading and os.path.abspath(os.fspath(args[0])).startswith(self.folder):
                self.tick()

    def _in_halves(self, real: Callable) -> Callable:
        """A kill may come when half of a file is written."""

        def write(path: Path, data, *args, **kwargs):
            if os.path.abspath(path).startswith(self.folder):
                real(path, data[: len(data) // 2], *args, **kwargs)
                self.tick()
            return real(path, data, *args, **kwargs)

        return write

    def _half_saved(self, real: Callable) -> Callable:
        """So it may in safetensors, which writes its file under another name first."""

        def save_file(tensors, path, **kwargs):
            half = Path(path).with_name(".tmpKilled")
            with open(half, "wb") as file:
                file.write(b"\0" * 100)
            self.tick()
            half.unlink()
            return real(tensors, path, **kwargs)

        return save_file


@dataclass
class Ended:
    """How a child ended: its exit status (negative: by that signal), what it printed, its file operations."""

    status: int
    said: str
    operations: int = 0


def run_child(scenario: Scenario, place: Path, out: Path, kill_at: int = -1, more: tuple[str, ...] = ()) -> Ended:
    """The scenario's command in a forked child. Raises TimeoutError for one that hangs."""
    log, count = place / "said.txt", place / "count.txt"
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            operations = FileOperations(out, kill_at)
            operations.watch()
            status = call(scenario, [*scenario.command(place, out), *more])
            count.write_text(str(operations.count))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = wait_for(pid)
    said = log.read_text(errors="replace")
    return Ended(status, said, int(count.read_text()) if status == 0 and kill_at < 0 else 0)


def call(scenario: Scenario, argv: list[str]) -> int:
    from train import finetune, pretrain, run

    module = finetune if scenario.finetune else pretrain
    return run.main(parser_of(module), module.start, argv)


@functools.cache
def parser_of(module: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command, which takes longer to make than one of these runs."""
    caught, real = [], module.run_main
    module.run_main = lambda parser, *_: caught.append(parser)
    try:
        module.main([])
    finally:
        module.run_main = real
    return caught[0]


def wait_for(pid: int) -> int:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError


# ---- what must be the same -------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, object]:
    """All files of a run's folder, without what measures time."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name.startswith(".push/step-"):
            continue  # a step that a kill kept from the Hub stays there, to be pushed by hand
        if path.is_file() and name not in (".lock", "loss.png"):
            found[name] = content(path)
        elif path.is_file():
            found[name] = path.stat().st_size > 0 or name == ".lock"
    return found


def content(path: Path) -> object:
    if path.name == "metrics.jsonl":
        return [without_timing(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("run.json", "state.json", "previous.json"):
        return without_timing(json.loads(path.read_text()))
    if path.name == "README.md":
        return (
            re.sub(r"\| (wall time|speed|commit of the code) \|.*\n", "", path.read_text())
            .replace(" --resume previous", "")
            .replace(path.parents[1].name, "RUN")
        )
    if path.name == "config.yaml":  # each run that pushes has a repo of its own
        return path.read_text().replace(f"alice/{path.parent.name}", "alice/RUN")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_timing(value):
    """JSON without times, without the hashes over text that holds them, and without what forks do not look up."""
    if isinstance(value, dict):
        ours = TIMING | {"seal", "log", "command", "commit"}
        return {k: without_timing(v) for k, v in value.items() if k not in ours}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def differences(want: dict, got: dict) -> list[str]:
    return sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))


def fingerprints(out: Path) -> dict[str, tuple]:
    """What a refusal must not change: bytes and times of all files."""
    return {
        p.relative_to(out).as_posix(): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in out.rglob("*") if p.is_file() and p.name != ".lock"
    }  # fmt: skip


# ---- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Harness:
    """A place to work in, the Hub on loopback, and the tally."""

    place: Path
    random: random.Random
    tally: collections.Counter = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    references: dict[str, dict] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        """Text, a base model, and the imports that children shall not repeat."""
        for name in ("torch._dynamo", "nanogpt_hub.generate"):
            importlib.import_module(name)
        from nanogpt_hub.system.files import write_atomic
        from train import facts, finetune, pretrain, trainer

        trainer.matmul_flops = lambda *_: 1e11  # measuring it, and drawing, take longer than the runs
        trainer.plot_loss = lambda metrics, out, baselines: write_atomic(out, metrics.read_bytes())
        facts.installed.commit = lambda: ""
        for module in (pretrain, finetune):
            parser_of(module)
        (self.place / "fox.txt").write_text(TEXT)
        base = Scenario("base", ("--max_steps", "1", "--eval.interval", "1"))
        assert run_child(base, self.place, self.place / "base-run").status == 0
        (self.place / "base-run" / "best").rename(self.place / "base")

    def reference(self, scenario: Scenario) -> dict:
        """The files of the run that was never killed."""
        if scenario.name not in self.references:
            out = self.place / f"{scenario.name}-whole"
            ended = run_child(scenario, self.place, out)
            assert ended.status == 0, ended.said
            self.references[scenario.name], self.operations[scenario.name] = contents(out), ended.operations
            again = run_child(scenario, self.place, out)  # a finished run is left as it is
            assert again.status == 0, again.said
            assert differences(self.references[scenario.name], contents(out)) == []
        return self.references[scenario.name]

    def kill(self, scenario: Scenario, at: int, again_at: int = -1) -> None:
        """One kill (or two), the same command again, and the comparison."""
        want, out = self.reference(scenario), self.place / f"{scenario.name}-killed"
        shutil.rmtree(out, ignore_errors=True)
        what = f"{scenario.name}, operation {at}" + (f", then {again_at}" if again_at >= 0 else "")
        try:
            ends = [run_child(scenario, self.place, out, kill_at) for kill_at in (at, again_at) if kill_at >= 0]
            last = run_child(scenario, self.place, out)
        except TimeoutError:
            self.count(what, "hung")
            return
        killed = sum(end.status == -signal.SIGKILL for end in ends)
        bad = [end for end in (*ends, last) if end.status not in (0, -signal.SIGKILL)]
        wrong = differences(want, contents(out))
        if bad:
            self.count(what, "did not go on", bad[0].said[-800:])
        elif wrong:
            self.count(what, "other files", ", ".join(wrong))
        elif scenario.hub and (missing := self.not_on_hub(out)):
            self.count(what, "not on the Hub", missing)
        else:
            self.count(what, f"same files after {killed} kills")

    def not_on_hub(self, out: Path) -> str:
        """What of a run that pushed did not arrive as it lies in its folder."""
        repo = hub().repo(f"alice/{out.name}")
        here = (out / "best" / "model.safetensors").read_bytes()
        if repo.files().get("model.safetensors") != here:
            return "the best model"
        state = json.loads((out / "state" / "state.json").read_text())["files"].values()
        return "" if all(f"state/{name}" in repo.files("training-state") for name in state) else "the training state"

    def count(self, what: str, outcome: str, detail: str = "") -> None:
        good = outcome.startswith(("same files", "refused"))
        self.tally[outcome] += 1
        if not good:
            self.failures.append(f"{what}: {outcome}: {detail}")
            print(self.failures[-1], file=sys.stderr)

    def each_operation(self, scenario: Scenario, every: int = 1) -> None:
        self.reference(scenario)
        for at in range(0, self.operations[scenario.name], every):
            self.kill(scenario, at)

    def at_random(self, scenario: Scenario, times: int) -> None:
        self.reference(scenario)
        most = self.operations[scenario.name]
        for i in range(times):
            self.kill(scenario, self.random.randrange(most), self.random.randrange(most) if i % 3 == 0 else -1)

    def stop_commands(self, scenario: Scenario, number: int, times: int) -> None:
        """A command of its own, sent a signal at a random moment; SIGSTOP is followed by SIGCONT."""
        want, out = self.reference(scenario), self.place / f"{scenario.name}-stopped"
        for _ in range(times):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "train.pretrain", *scenario.command(self.place, out)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=TESTS.parent)
            wait_until((out / "config.yaml").exists, process)
            time.sleep(self.random.uniform(0, 0.5))
            process.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(0.5)
                process.send_signal(signal.SIGCONT)
            said = process.communicate(timeout=DEADLINE)[0].decode()
            if process.returncode not in (0, -number, 130):
                self.count(scenario.name, "did not end well", said[-800:])
            last = run_child(scenario, self.place, out)
            wrong = differences(want, contents(out))
            wrong = [name for name in wrong if "previous" not in name and "00000" not in name]  # saved at another step
            good = last.status == 0 and not wrong
            outcome = f"same files after {signal.Signals(number).name}" if good else "other files"
            self.count(scenario.name, outcome, ", ".join(wrong) + last.said[-300:])

    # ---- damage

    def damage(self, scenario: Scenario, most: int = 10**9) -> None:
        """Each file of a half-finished run, damaged in each way; or `most` of these cases, chosen at random."""
        want, half, other = self.reference(scenario), self.place / "half", self.place / "other"
        for out, flags in ((half, ()), (other, ("--seed", "2"))):
            if not out.is_dir():
                self.half_a_run(scenario, out, flags)
        names = sorted(p.relative_to(half).as_posix() for p in half.rglob("*") if p.is_file() and p.name != ".lock")
        cases = [(name, kind) for name in names for kind in DAMAGE]
        for name, kind in self.random.sample(cases, min(most, len(cases))):
            self.damaged(scenario, want, name, kind, DAMAGE[kind])

    def half_a_run(self, scenario: Scenario, out: Path, flags: tuple[str, ...] = ()) -> None:
        """A run that was killed in its fifth step, after two saves."""
        from train.trainer import Trainer

        step = Trainer._train_step

        def killed(trainer):
            if trainer.progress.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer)

        Trainer._train_step = killed
        try:
            assert run_child(scenario, self.place, out, more=flags).status == -signal.SIGKILL
        finally:
            Trainer._train_step = step

    def damaged(self, scenario: Scenario, want: dict, name: str, kind: str, hurt: Callable) -> None:
        out, what = self.place / "damaged", f"{name} {kind}"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.place / "half", out)
        hurt(out / name, self.place / "other" / name, self.random)
        before = fingerprints(out)
        try:
            ended = run_child(scenario, self.place, out)
        except TimeoutError:
            self.count(what, "hung")
            return
        if ended.status == 0:
            wrong = differences(want, contents(out))
            told = name == "metrics.jsonl" and kind == "missing" and "a new one begins here" in ended.said
            known = [name] if told or is_output(name) else []  # an output stays as it was damaged: nothing reads it
            self.count(what, "same files" if set(wrong) <= set(known) else "other files", ", ".join(wrong))
        elif ended.status != 2 or "Traceback" in ended.said or ended.said.count("error:") != 1:
            self.count(what, "crashed", ended.said[-800:])
        elif Path(name).name not in ended.said and "best is damaged" not in ended.said:
            self.count(what, "refused without its name", ended.said[-300:])
        elif fingerprints(out) != before:
            self.count(what, "refused, but changed", ended.said[-300:])
        else:
            self.count(what, "refused by name")
            if name.startswith("state/") and "--resume previous" in ended.said:
                last = run_child(scenario, self.place, out, more=("--resume", "previous"))
                wrong = differences(want, contents(out))
                good = last.status == 0 and not wrong
                outcome = "same files from the state before" if good else "other files"
                self.count(what, outcome, f"{wrong} {last.said[-300:]}")


def is_output(name: str) -> bool:
    """What a run writes for people once and does not read: samples of steps that are done, the best model. Of a card it
    reads what people wrote around its block, and the rest of a damaged one may pass for that."""
    return name.startswith(("samples/", "best/", "run.json")) or name.endswith("README.md")


def flip(path: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def foreign(path: Path, other: Path, rng: random.Random) -> None:
    shutil.copyfile(other if other.exists() else Path(__file__), path)


DAMAGE: dict[str, Callable] = {
    "truncated": cut,
    "flipped": flip,
    "emptied": lambda path, *_: path.write_bytes(b""),
    "missing": lambda path, *_: path.unlink(),
    "foreign": foreign,
}


# ---- around it -------------------------------------------------------------------------------------------------------


def wait_until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + DEADLINE
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def hub():
    """The Hub on loopback, with an account."""
    import conftest

    conftest.HUB.add_user("alice", TOKEN) if "alice" not in getattr(conftest.HUB, "made", ()) else None
    conftest.HUB.made = ("alice",)
    return conftest.HUB


@contextlib.contextmanager
def harness(seed: int, keep: bool = False):
    """A harness in a folder of its own, with a cache of its own."""
    place = Path(tempfile.mkdtemp(prefix="kill-harness-"))
    before = {name: os.environ.get(name) for name in ("NANOGPT_HUB_CACHE", "HF_TOKEN", "PYTHONPATH", "OMP_NUM_THREADS")}
    hub()  # first: it sets the environment of a test
    os.environ |= {"NANOGPT_HUB_CACHE": str(place / "cache"), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(TESTS.parent)
    try:
        made = Harness(place, random.Random(seed))
        made.prepare()
        yield made
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_harness", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="kills, signals, damage (default: all)")
    parser.add_argument("--only", nargs="*", choices=[s.name for s in SCENARIOS], help="scenarios (default: all)")
    parser.add_argument("--random", type=int, default=50, help="kills at random operations in each scenario")
    parser.add_argument("--every", type=int, default=1, help="of a fresh run, take each Nth operation (0: none)")
    parser.add_argument("--damages", type=int, default=10**9, help="at most so many cases of damage, at random")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    parts = args.parts or ["kills", "signals", "damage"]
    chosen = [s for s in SCENARIOS if not args.only or s.name in args.only]
    start = time.monotonic()
    with harness(args.seed) as h:
        if "kills" in parts:
            if args.every:
                h.each_operation(chosen[0], args.every)
            for scenario in chosen:
                h.at_random(scenario, args.random)
        if "signals" in parts:
            for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP"):
                h.stop_commands(SCENARIOS[2], getattr(signal, name), 3)
        if "damage" in parts:
            h.damage(chosen[0], args.damages)
    print(f"file operations of a run: {h.operations}")
    for outcome, n in sorted(h.tally.items()):
        print(f"{n:6}  {outcome}")
    print(f"{len(h.failures)} failures in {sum(h.tally.values())} cases, {time.monotonic() - start:.0f} s")
    return 1 if h.failures else 0


if __name__ == "__main__":
    sys.exit(main())
