"""`python -m nanogpt_hub ...` is the command `nanogpt-hub ...`."""

import sys

from nanogpt_hub.cli import main

if __name__ == "__main__":
    sys.exit(main())
