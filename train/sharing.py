"""When a run publishes what: the best model to main, evaluated steps as tags, the training state on a branch.

The pushes themselves happen in a thread of hub/background.py; training never waits for them. Only the main process
makes a `Sharing`, before any heavy work: name, login and rights are checked right then.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanogpt_hub.checkpoint import CheckpointError
from nanogpt_hub.hub.background import Pusher
from nanogpt_hub.hub.card import RunFacts
from nanogpt_hub.hub.publish import preflight, verify
from nanogpt_hub.hub.resolve import HubError
from nanogpt_hub.hub.static import create_static_space

from .config import HubConfig
from .facts import given_facts


class Sharing:
    """A run's line to one repo on the Hub. Raises HubError when made, where a push would not be let in."""

    def __init__(self, config: HubConfig, out: Path, say: Callable[[str], None]):
        self.config, self.out, self.say = config, out, say
        place = preflight(config.repo_id, private=config.private, facts=given_facts(config))
        say(f"hub: signed in as {place.user}; pushing to {place.url}; {place.who_reads}")
        if not config.license:
            say("hub: no license is given, so others may not use the model; say --hub.license mit (or another)")
        self.page: RunFacts = {}
        if config.page:
            page = create_static_space(place.repo_id, place.repo_id, private=config.private, say=say)
            say(f"hub: the page in which a browser runs the model is {page.url}")
            self.page = {"page": page.space_id}
        self.pusher = Pusher(place.repo_id, say=say, notebook=config.notebook)
        self.waiting: RunFacts | None = None  # facts of a best model that is not submitted yet
        self.submitted_at = -float("inf")
        self.refused = ""  # why the newest best model was not submitted
        self.unsure = False  # whether a best model of an earlier sitting is on the Hub

    def best(self, model: torch.nn.Module, facts: RunFacts) -> None:
        """Takes note of a new best/ whose weights are the live model's; submits it unless the last one is recent."""
        try:
            verify(self.out / "best", model)
        except (HubError, CheckpointError) as error:
            self.refused = f"{(self.out / 'best').as_posix()} is not on the Hub: {error}"
            self.say(f"not pushed: {error}")
            return
        self.waiting, self.refused = facts, ""
        if time.monotonic() - self.submitted_at >= 60 * self.config.minutes:
            self._submit_best()

    def _submit_best(self) -> None:
        self.pusher.submit(self.out / "best", facts={**(self.waiting or {}), **self.page})
        self.waiting, self.submitted_at, self.unsure = None, time.monotonic(), False

    def go_on(self) -> None:
        """Takes note that best/ is of an earlier sitting, whose end may have kept it from the Hub: unless there is a
        better one it is submitted at the end. What is there already is not sent again."""
        self.unsure = True

    def step(self, step: int, model: torch.nn.Module, facts: RunFacts) -> None:
        """Submits last/, whose weights are the live model's, as a step to walk back to."""
        self.pusher.submit(self.out / "last", facts={**facts, **self.page}, tag=f"step-{step:06d}", model=model)

    def state(self) -> None:
        """Submits the training state that was just saved."""
        if self.config.push_state:
            self.pusher.submit_state(self.out)

    def finish(self) -> list[str]:
        """Waits for what is on its way, and returns a sentence for each thing that did not arrive."""
        if self.waiting is not None or self.unsure:
            self._submit_best()
        self.say("waiting for the pushes to finish ...")
        left = self.pusher.close(timeout=60 * self.config.patience_minutes)
        return [*([self.refused] if self.refused else []), *(unpushed.sentence for unpushed in left)]
