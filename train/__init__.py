"""The trainer: `python -m train.pretrain`, `python -m train.finetune`."""

import os

# Between two operations OpenMP's threads wait by spinning, for so long that on a machine that does anything else
# (a browser is enough) training gets several times slower. A short spin, then sleep, costs nothing on an idle one.
# Read by OpenMP when torch is first imported, so it has to be set here; whatever is set already wins.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
