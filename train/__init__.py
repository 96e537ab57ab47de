"""The trainer: `python -m train.pretrain`, `python -m train.finetune`.

In a checkout it is the package `train`; a wheel has it as `nanogpt_hub.train`. Its modules import each other
relatively, so that both names work.
"""

import os
import sys

from nanogpt_hub.system.installed import need

# Between two operations OpenMP's threads wait by spinning, for so long that on a machine that does anything else
# (a browser is enough) training gets several times slower. A short spin, then sleep, costs nothing on an idle one.
# Read by OpenMP when torch is first imported, so it has to be set here; whatever is set already wins.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if sys.argv[:1] == ["-m"]:  # `python -m train.pretrain` is at its start: a sentence now, not a traceback later
    need("the trainer", "train")
