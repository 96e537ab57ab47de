"""A few hundred damaged files: no crash, no hang, bounded memory. `python tests/fuzz.py` runs thousands."""

import sys

import pytest
from fuzz import KINDS, fuzz


@pytest.mark.skipif(sys.platform != "linux", reason="limits of time and memory as Linux has them")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_and_nothing_worse(kind):
    tally, failures = fuzz([kind], 40, seed=1000)
    assert failures == []
    assert tally[kind].total() == 40
    assert tally[kind]["refused"] > 0 or kind in ("log", "yaml")
