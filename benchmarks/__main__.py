"""Runs the benchmarks, one after another: `python -m benchmarks [NAME ...] [--nanogpt DIR]`; each is also a module.

DIR is a checkout of https://github.com/karpathy/nanoGPT, for those that compare with it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_") and p.stem not in ("common", "peers"))
WITH_NANOGPT = ("generate", "memory", "speedrun", "train_step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--nanogpt", help="folder of a nanoGPT checkout")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]}; there are: {', '.join(NAMES)}")
    status = 0
    for name in args.names or NAMES:
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if args.nanogpt and name in WITH_NANOGPT:
            command += ["--nanogpt", str(Path(args.nanogpt).resolve())]
        status |= subprocess.run(command, cwd=HERE.parent, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
