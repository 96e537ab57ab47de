"""Preparing text and reading batches: is either ever what a run waits for?

    python -m benchmarks.data [--tokenizer bpe:1024] [--megabytes 64] [--rounds 3] [--large 2000]
    python -m benchmarks.data --stream 5000 [--tokenizer gpt2]
    python -m benchmarks.data --kills 20 [--processes 1,2] [--steps 6000] [--megabytes 64] [--tokenizer gpt2]

prepare  a text file becomes token shards on disk, against tiktoken alone on the same text in memory, on one core; both
         with the same vocabulary. The text is Python's own standard library, again and again.
memory   the most that a process has in memory when it prepares that file, and when one of --large megabytes.
batches  how many tokens a second are read from the shards, and how many the smallest model here trains on.
stream   instead of these: a text of so many megabytes that nobody has tokenised yet. How long until a run on it has
         done its first step, the most memory that the run and the process beside it have, and how long the preparation
         takes to its end with one worker and with two.
kills    instead of these: a run that tokenises beside the training is killed with SIGKILL so many times, at random
         moments, the trainer, the tokenising process or both; then it is let to its end. Its shards, its losses and its
         weights must be those of a run that was left alone, bit for bit. With --processes 1,2 the trainer is started as
         one process and as two in turn, of which one or both are killed, with AdamW at a small rate: then losses differ
         by roundings, at most 1e-5.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from safetensors.torch import load_file

from benchmarks.common import alternate, in_fresh_process, process_peak, ratio, report
from benchmarks.train_step import SHAPES, our_steps
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import build_tokenizer
from train.data import Batches
from train.report import read_metrics
from train.shards import prepare

MB = 10**6


def write_text(path: Path, n_bytes: int) -> None:
    """The standard library's source, repeated."""
    text = "\n".join(open_source("python").documents()).encode()
    with open(path, "wb") as file:
        for _ in range(-(-n_bytes // len(text))):
            file.write(text[: n_bytes - file.tell()].decode(errors="ignore").encode())


def preparing(path: Path, tokenizer, rounds: int) -> list[dict]:
    source, encoding = open_source(str(path)), tokenizer._tiktoken
    if encoding is None:
        sys.exit(f"a {tokenizer.kind} tokenizer is not tiktoken's; give bpe:N or gpt2")
    pieces = list(source.texts())

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            prepare(source, tokenizer, cache, quiet=True)

    runs = {"tiktoken": lambda: [encoding.encode_ordinary(piece) for piece in pieces], "ours": ours}
    taken = alternate(runs, rounds, "prepare")
    size = path.stat().st_size
    rates = {name: size / MB / median(taken[name]) for name in runs}
    return [
        {"preparing": name, "MB/s": rate, "part of tiktoken's rate": ratio(taken, "tiktoken", name)}
        for name, rate in rates.items()
    ]


def prepare_one(path: str, tokenizer: str) -> int:
    with tempfile.TemporaryDirectory() as cache:
        prepare(open_source(path), build_tokenizer(tokenizer, []), cache, quiet=True)
    return process_peak()


def reading(path: Path, tokenizer, folder: Path, rounds: int) -> list[dict]:
    shape = SHAPES[0]
    batches = Batches(prepare(open_source(str(path)), tokenizer, folder, quiet=True).tokens(), shape.block_size, seed=0)
    train, n = our_steps(shape, folder), 2000
    runs = {"read": lambda: [batches.batch(step, shape.batch_size) for step in range(n)], "train": train}
    taken = alternate(runs, rounds, "batches")
    tokens = shape.batch_size * shape.block_size
    read, used = (steps * tokens / median(taken[name]) for name, steps in (("read", n), ("train", shape.steps)))
    return [{"batches": shape.name, "read, tokens/s": read, "trained on, tokens/s": used, "ratio": read / used}]


TINY = (
    "--model.preset nanogpt --model.n_layer 1 --model.n_head 1 --model.n_embd 16 --model.block_size 64 --device cpu "
    "--eval.interval 1000000 --eval.max_windows 20 --eval.sample_tokens 0 --log_interval 1 "
    "--save.interval 50"
).split()
CALM = "--optim.name adamw --optim.learning_rate 1e-4".split()  # roundings do not grow; Muon's steps double them soon


LAUNCHER = "torch.distributed.run --nproc_per_node {} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0 -m"


class Run:
    """A training run in a process of its own, on a model so small that the data is what counts."""

    def __init__(
        self,
        text: Path,
        tokenizer: str,
        folder: Path,
        steps: int,
        batch_size: int = 64,
        processes: int = 1,
        optimizer: Sequence[str] = (),
    ):
        self.out, self.peaks = folder / "run", {"trainer": 0, "tokenizing": 0}
        env = {**os.environ, "NANOGPT_HUB_CACHE": str(folder / "cache")}
        # A fixed micro-batch: one process and two add the same gradients in the same order.
        flags = ["--data.source", str(text), "--data.tokenizer", tokenizer, "--max_steps", str(steps),
                 "--batch_size", str(batch_size), "--micro_batch_size", str(batch_size // 2), *optimizer]  # fmt: skip
        launcher = LAUNCHER.format(processes).split() if processes > 1 else []
        command = [sys.executable, "-m", *launcher, "train.pretrain", *TINY, *flags, "--out_dir", str(self.out)]
        with open(folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self._note("trainer", psutil.Process(self.process.pid))
            for child in self.beside():
                self._note("tokenizing", child)
            time.sleep(0.2)

    def _note(self, name: str, process: psutil.Process) -> None:
        try:
            memory = process.memory_info()
            self.peaks[name] = max(self.peaks[name], memory.rss - memory.shared)  # mapped shards are the system's
        except psutil.NoSuchProcess:
            pass

    def beside(self) -> list[psutil.Process]:
        """The processes that tokenise for it."""
        return [child for child, words in self._children().items() if "train.tokenizing" in words]

    def trainers(self) -> list[psutil.Process]:
        """The launcher, where there is one, and the processes that train."""
        others = [child for child, words in self._children().items() if "train.pretrain" in words]
        return [psutil.Process(self.process.pid), *others]

    def _children(self) -> dict[psutil.Process, list[str]]:
        """The processes that it started, and how they were."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                    found[child] = child.cmdline()
        return found

    def wait_somewhat(self, dice: random.Random) -> None:
        """Until a moment at random: one time in four while it starts, else while it trains."""
        before = self.steps()
        training = dice.random() < 0.75
        while training and self.process.poll() is None and self.steps() == before:
            time.sleep(0.1)
        time.sleep(dice.uniform(0, SOME_SECONDS))

    def kill_some(self, dice: random.Random) -> bool:
        """Kills the trainer, the tokenising processes, both, or of several trainers one, whose end the launcher makes
        that of all. Returns whether the run has ended."""
        trainers, beside = self.trainers(), self.beside()
        choices = [trainers, beside, trainers + beside, trainers[-1:]]
        victims = dice.choice([processes for processes in choices if processes])
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        if victims == beside:
            return False
        self.process.wait()
        psutil.wait_procs(trainers)
        return True

    def said(self) -> str:
        return (self.out.parent / "log.txt").read_text(errors="replace")[-2000:]

    def steps(self) -> int:
        """Optimizer steps done, by the log."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else -1


def prepared(folder: Path) -> bool:
    return any(folder.glob("cache/tokens/*/manifest.json"))


def streaming(text: Path, tokenizer: str, folder: Path) -> list[dict]:
    """Seconds to the first step and to the end of the preparation beside the run, and peaks of memory."""
    start, rows = time.perf_counter(), []
    (folder / "beside").mkdir()
    run = Run(text, tokenizer, folder / "beside", 10**8)
    while run.steps() < 1 and run.process.poll() is None:
        time.sleep(0.1)
    first = time.perf_counter() - start
    while not prepared(folder / "beside") and run.process.poll() is None:
        time.sleep(0.1)
    rows.append({"stream": "beside a run", "first step, s": first, "whole, s": time.perf_counter() - start,
                 "trainer, MB": run.peaks["trainer"] / MB, "tokenizing, MB": run.peaks["tokenizing"] / MB})  # fmt: skip
    run.process.kill()
    run.process.wait()
    for workers in (1, 2):
        seconds = ahead(text, tokenizer, folder / str(workers), workers)
        rows.append({**dict.fromkeys(rows[0], ""), "stream": f"ahead, workers: {workers}", "whole, s": seconds})
    return rows


def ahead(text: Path, tokenizer: str, folder: Path, workers: int) -> float:
    """Seconds of a preparation without a run."""
    env = {**os.environ, "NANOGPT_HUB_CACHE": str(folder)}
    flags = ["--data.source", str(text), "--data.tokenizer", tokenizer, "--workers", str(workers)]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "train.prepare", *flags], env=env, check=True)
    return time.perf_counter() - start


def killing(text: Path, tokenizer: str, folder: Path, n_kills: int, steps: int, processes: list[int]) -> list[dict]:
    """A run left alone and one killed n_kills times, started as so many processes in turn: do they end alike?"""
    dice, results, optimizer = random.Random(1), [], CALM if len(set(processes)) > 1 else []
    for name, kills in (("alone", 0), ("killed", n_kills)):
        here, counts, start = folder / name, itertools.cycle(processes), time.perf_counter()
        here.mkdir()
        run, killed_at = Run(text, tokenizer, here, steps, SMALL_BATCH, next(counts), optimizer), set()
        for done in range(kills):
            run.wait_somewhat(dice)
            if run.process.poll() is not None:
                sys.exit(f"the run ended after {done} kills, at step {run.steps()}: more --steps\n{run.said()}")
            if run.kill_some(dice):
                killed_at.add(run.steps())
                run = Run(text, tokenizer, here, steps, SMALL_BATCH, next(counts), optimizer)
        if run.process.wait():
            sys.exit(f"the run failed:\n{run.said()}")
        results.append({"run": name, "kills": kills, "trainer killed at": f"{len(killed_at)} steps",
                        "steps": run.steps(), "seconds": time.perf_counter() - start, **digests(here)})  # fmt: skip
    differing = differences(folder / "alone", folder / "killed")
    assert results[0]["shards"] == results[1]["shards"], results
    # Another count of processes adds in another order; a lost or repeated example would move a loss by far more.
    assert differing["losses differ by"] <= (1e-5 if len(set(processes)) > 1 else 0), differing
    assert len(set(processes)) > 1 or not differing["weights differ by"], differing
    return [{**result, **differing} for result in results]


SOME_SECONDS = 5  # a kill comes at most so many after a trainer has started, or after it has done a step
SMALL_BATCH = 4  # of a run that is killed, which then saves every few seconds, whatever its vocabulary


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of the losses of all steps, each of which must be there once, and of the weights."""
    logs = [read_metrics(folder / "run" / "metrics.jsonl") for folder in (one, other)]
    losses = [[(row["step"], row["train_loss"]) for row in log if "train_loss" in row] for log in logs]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]] == list(range(1, len(losses[0]) + 1))
    weights = [load_file(folder / "run" / "last" / "model.safetensors") for folder in (one, other)]
    return {
        "losses differ by": max(abs(a - b) for (_, a), (_, b) in zip(*losses, strict=True)),
        "weights differ by": max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]),
    }


def digests(folder: Path) -> dict:
    """Of the shards and of the weights."""

    def of(paths: Iterator[Path]) -> str:
        digest = hashlib.sha256()
        for path in sorted(paths):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]

    return {
        "shards": of(folder.glob("cache/tokens/*/tokens-*.bin")),
        "weights": of(folder.glob("run/last/*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bpe:1024", help="bpe:N or gpt2")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--large", type=int, default=0, help="megabytes of a second file for the memory; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", type=int, default=0, help="megabytes of a text that is trained on while tokenised")
    parser.add_argument("--kills", type=int, default=0, help="how often such a run is killed")
    parser.add_argument("--steps", type=int, default=6000, help="how many it makes")
    parser.add_argument("--processes", default="1", help="how many train in it, in turn after each kill, as in 1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    if args.one:
        print(prepare_one(args.one, args.tokenizer))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.stream or args.kills:
            write_text(folder / "text.txt", (args.stream or args.megabytes) * MB)
            processes = [int(n) for n in args.processes.split(",")]
            kill = partial(killing, n_kills=args.kills, steps=args.steps, processes=processes)
            trial = streaming if args.stream else kill
            report("data_stream" if args.stream else "data_kills", trial(folder / "text.txt", args.tokenizer, folder))
            return
        tokenizer = build_tokenizer(args.tokenizer, open_source("python").texts())
        tokenizer.save(folder / "tokenizer")
        text = folder / "text.txt"
        write_text(text, args.megabytes * MB)
        report("data_prepare", preparing(text, tokenizer, args.rounds))
        report("data_batches", reading(text, tokenizer, folder, args.rounds))
        rows = []
        for megabytes in filter(None, (args.megabytes, args.large)):
            write_text(text, megabytes * MB)
            peak = in_fresh_process("benchmarks.data", "--one", str(text), "--tokenizer", str(folder / "tokenizer"))
            rows.append({"prepared, MB": megabytes, "process at its peak, MB": peak / MB})
        report("data_memory", rows)


if __name__ == "__main__":
    main()
