"""Damaged and hostile files against everything that reads them: `python tests/fuzz.py --cases 10000`.

    folder      config.json, tokenizer.json and model.safetensors of a model, then loaded and encoded with
    tokenizer   tokenizer.json alone: normalizers, decoders and patterns that were put together at random
    log         metrics.jsonl, config.yaml and samples of a run
    state       a training state
    data        text, jsonl, csv, parquet, and packed ones
    template    chat templates
    yaml        configs of fetched runs
    card        README.md

A case is a number: the same one does the same each time. Cases run in a child that has SECONDS of the processor for
each and MEMORY bytes above what it begins with. What may come out of a case is a result (`accepted`) or one of the
announced errors (`refused`). Another exception, a signal, a case out of time or memory is a failure, whose
number is told.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SECONDS, MEMORY = 5.0, 3 * 2**30
TEXT = "To be, or not to be: that is the question.\n" * 40
ODD = [None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, -0.0, "", "x" * 5000, "\ud83d", [], {}, [[[[]]]],
       {"a": {"b": 1}}, "../../etc/passwd", "NaN", ["x"] * 1000, float("inf")]  # fmt: skip
PIECES = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"[" * 500, b'"' * 3, b"\\u", b"9" * 400, b"*a", b"&a ",
          b"---\n", b"{% for a in range(99999) %}", b"{{ 'a' * 10**9 }}", b"{% endfor %}", b",,,", b"\r\n",
          b": "]  # fmt: skip


# ---- mutations -------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few changes anywhere: flipped, cut, doubled, put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 64, 1000))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 3:
            data[at:at] = rng.choice(PIECES)
        else:
            del data[at:]
    return bytes(data)


def mutate_json(content, rng: random.Random):
    """The same object with a few values replaced, removed or doubled."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = content
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = rng.choice(keys)
            inside = place[key]
            if isinstance(inside, dict | list) and inside and rng.random() < 0.7:
                place = inside
                continue
            if rng.random() < 0.2:
                del place[key]
            else:
                place[key] = rng.choice(ODD)
            break
    return content


def mutated_file(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        data = json.dumps(mutate_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = mutate_bytes(data, rng)
    path.write_bytes(data)


# ---- what is tried ---------------------------------------------------------------------------------------------------


class Cases:
    """The honest files that cases begin with, and a function for each kind of case. Lives in the child."""

    def __init__(self, home: Path):
        from helpers import make_model

        self.home = home
        self.model = make_model(home / "model")
        self.run = make_run(home / "run")

    def copy_of(self, folder: Path) -> Path:
        import shutil

        place = self.home / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        return place

    def folder(self, rng: random.Random) -> None:
        from nanogpt_hub.checkpoint import load_model

        place = self.copy_of(self.model)
        for path in rng.sample(sorted(place.iterdir()), rng.choice((1, 1, 2))):
            mutated_file(path, rng)
        _, tokenizer = load_model(place)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("To be\n"))

    def tokenizer(self, rng: random.Random) -> None:
        from nanogpt_hub.tokenizer import Tokenizer

        data = json.loads((self.model / "tokenizer.json").read_text(encoding="utf-8"))
        data["normalizer"] = rng.choice((None, {"type": "Sequence", "normalizers": steps(rng)}))
        data["decoder"] = rng.choice((data["decoder"], {"type": "Sequence", "decoders": steps(rng)}))
        pattern = rng.choice((r"(a+)+$", r"(\w|\w\w)*x", r"\s+", "["))
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        data["pre_tokenizer"] = rng.choice((None, split))
        made = Tokenizer(json.dumps(data))
        made.decode(made.encode(rng.choice(("To be", "a" * 60 + "!", "\n"))))

    def log(self, rng: random.Random) -> None:
        from nanogpt_hub.runs import read_run

        place = self.copy_of(self.run)
        mutated_file(
            rng.choice((place / "metrics.jsonl", place / "config.yaml", place / "samples/step-000001.txt")), rng
        )
        run = read_run(place)
        for row in run.rows:
            run.at(int(row["step"]))
        for step in run.samples:
            run.sample(step)
        run.going_on(), run.curve("val_loss"), run.best_step

    def state(self, rng: random.Random) -> None:
        from train import state

        place = self.copy_of(self.run) / "state"
        mutated_file(rng.choice(sorted(place.iterdir())), rng)
        facts = state.read_facts(place)
        if facts is not None:
            state.load_tensors(place, facts)

    def data(self, rng: random.Random) -> None:
        from nanogpt_hub.sources import open_source

        suffix, content = rng.choice(self.texts())
        content = mutate_bytes(content, rng)
        if rng.random() < 0.2:
            suffix, content = suffix + ".gz", gzip.compress(content * rng.choice((1, 5000)))
            content = content if rng.random() < 0.7 else mutate_bytes(content, rng)
        path = self.home / f"text{suffix}"
        path.write_bytes(content)
        try:
            for _ in zip(range(200), open_source(str(path)).pieces(), strict=False):
                pass
        finally:
            path.unlink()

    def texts(self) -> list[tuple[str, bytes]]:
        import pyarrow
        import pyarrow.parquet

        rows, table = [{"text": line} for line in TEXT.splitlines()], io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        return [
            (".txt", TEXT.encode()), (".jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()),
            (".csv", ("text\n" + "".join(f'"{row["text"]}"\n' for row in rows)).encode()),
            (".parquet", table.getvalue()),
        ]  # fmt: skip

    def template(self, rng: random.Random) -> None:
        from nanogpt_hub.chat import PLAIN, ChatTemplate
        from nanogpt_hub.tokenizer import build_tokenizer

        tokenizer = build_tokenizer("byte", [])
        tokenizer.config["chat_template"] = mutate_bytes(PLAIN.encode(), rng).decode("utf-8", "replace")
        [
            *ChatTemplate(tokenizer).encode(
                [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]]
            )
        ]

    def yaml(self, rng: random.Random) -> None:
        from train.fetched import read_settings, take

        path = self.home / "config.yaml"
        path.write_bytes(mutate_bytes((self.run / "config.yaml").read_bytes(), rng))
        take(read_settings(path), self.home)

    def card(self, rng: random.Random) -> None:
        from nanogpt_hub.hub.readme import merge_edits, update_readme, validate_readme

        honest = update_readme("words above", {"license": "mit", "tags": ["a"], "language": "en"}, "block")
        odd = mutate_bytes(honest.encode(), rng).decode("utf-8", "replace")
        validate_readme(odd)
        validate_readme(merge_edits(honest, odd)[0])
        update_readme(odd, {"license": "mit"}, "new")


def steps(rng: random.Random) -> list[dict]:
    """Steps of a normalizer or a decoder: honest ones, and those that make a text grow."""
    times = rng.choice((1, 10, 10**5))
    grown = [{"type": "Replace", "pattern": {"String": a}, "content": b * times} for a, b in ("ab", "ba", "aa")]
    honest = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Fuse"}, {"type": "ByteFallback"},
              {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Prepend", "prepend": "a" * 99},
              {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "aa"}]  # fmt: skip
    return [rng.choice(grown if rng.random() < 0.5 else honest) for _ in range(rng.choice((1, 2, 9, 40)))]


def make_run(folder: Path) -> Path:
    """What a run leaves, but for its models."""
    import torch

    from train.state import save_state

    (folder / "samples").mkdir(parents=True)
    rows = [{"step": i, "train_loss": 3.0 - i / 10, "val_loss": 3.1} for i in range(10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = "max_steps: 10\nmodel:\n  n_layer: 2\noptim:\n  learning_rate: 0.01\nlora:\n  targets:\n  - c_attn\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "samples" / "step-000001.txt").write_text(TEXT, encoding="utf-8")
    save_state(folder / "state", {"step": 1, "fixed": {}}, {"w": torch.ones(3)}, {"m": torch.ones(3)})
    return folder


KINDS = [name for name in vars(Cases) if not name.startswith("_") and name not in ("copy_of", "texts")]


# ---- the child -------------------------------------------------------------------------------------------------------


def outcome(case: Callable[[random.Random], None], number: int) -> str:
    """accepted, refused: of which kind, or what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
    try:
        case(random.Random(number))
    except (ValueError, OSError):
        return "refused"
    except MemoryError:
        return "FAILED out of memory"
    except Exception as error:
        return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted"


def child(kind: str) -> None:
    """Numbers in, outcomes out, a line each."""
    import resource

    with tempfile.TemporaryDirectory() as home, open(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of libraries
        case = getattr(Cases(Path(home)), kind)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for line in sys.stdin:
            answers.write(outcome(case, int(line)) + "\n")
            answers.flush()


class Child:
    """A process that runs cases of one kind; started anew when one ends it."""

    def __init__(self, kind: str):
        self.kind, self.process = kind, None

    def __call__(self, number: int) -> str:
        if self.process is None:
            here = Path(__file__)
            path = os.pathsep.join((str(here.parent), str(here.parents[1])))
            self.process = subprocess.Popen(
                [sys.executable, str(here), "--child", self.kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        return answer or self.ended()

    def ended(self) -> str:
        code = self.process.wait()
        self.close()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return "FAILED out of time" if name == "SIGPROF" else f"FAILED {name}"

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        self.process = None


def fuzz(kinds: list[str], cases: int, seed: int = 0) -> tuple[dict[str, Counter], list[str]]:
    """How often each kind came out how, and a line for each failure."""
    tally: dict[str, Counter] = {kind: Counter() for kind in kinds}
    failures = []
    for kind in kinds:
        run = Child(kind)
        for number in range(seed, seed + max(1, cases // len(kinds))):
            found = run(number)
            tally[kind][found.split(":")[0]] += 1
            if found.startswith("FAILED"):
                failures.append(f"{kind} {number}: {found}")
        run.close()
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged and hostile files against everything that reads them.")
    parser.add_argument("--cases", type=int, default=10_000, help="in all (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case of each kind (default: 0)")
    parser.add_argument("--kind", choices=KINDS, help="this one alone (default: all)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    tally, failures = fuzz([args.kind] if args.kind else KINDS, args.cases, args.seed)
    outcomes = sorted({found for counts in tally.values() for found in counts})
    print(f"| kind | {' | '.join(outcomes)} |\n|---|{'---:|' * len(outcomes)}")
    for kind, counts in tally.items():
        print(f"| {kind} | {' | '.join(str(counts[found]) for found in outcomes)} |")
    print("\n".join(failures[:50]), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
