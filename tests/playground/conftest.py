"""A playground of one model: `folder` is the test file's own."""

import pytest

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground


@pytest.fixture
def playground(folder) -> Playground:
    return Playground(ModelStore(str(folder)))


@pytest.fixture
def place(playground) -> Resolved:
    return playground.models.find()
