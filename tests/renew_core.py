"""Makes the model.py that lies here the verified core: `python tests/renew_core.py`.

For those who change this project's own model.py, and its families with it. It writes the hashes of its parts into
nanogpt_hub/edits/fingerprint.py, runs the parity tests with Transformers, and puts the old hashes back where one fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanogpt_hub.edits.fingerprint import parts  # noqa: E402

TABLE = re.compile(r"(?<=\nVERIFIED = \{)([^\n]*\n)(?:    \"[^\n]+\n)*(?=\}\n)")
PARITY = ("tests/test_families.py", "tests/test_model.py")


def main(root: Path = ROOT) -> int:
    """Exit status: 0 where the table is new and verified, that of pytest where it is as it was."""
    path = root / "nanogpt_hub" / "edits" / "fingerprint.py"
    before = path.read_text(encoding="utf-8")
    found = parts((root / "nanogpt_hub" / "model.py").read_text(encoding="utf-8"))
    rows = "".join(f'    "{name}": "{value}",\n' for name, value in found.items())
    path.write_text(TABLE.sub(lambda match: match[1] + rows, before, count=1), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARITY]
    status = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}).returncode
    if status:
        path.write_text(before, encoding="utf-8")
        print("the parity tests failed: fingerprint.py is as it was")
    return status


if __name__ == "__main__":
    sys.exit(main())
