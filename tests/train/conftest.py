"""What tests that train share: a cache away from the user's, and processes that train together."""

import os
from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Several processes in a moment."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here, and torchrun needs libuv")
    ranks = Ranks()
    yield ranks
    ranks.close()
