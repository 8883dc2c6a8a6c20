"""The federated part of a demonstration: processes are watched, broken where that was asked for, and waited for."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import replace

from mailboat.demo import defaults
from mailboat.demo.facts import Facts, ProcessState, Watcher
from mailboat.demo.live import View
from mailboat.demo.plan import Plan
from mailboat.demo.processes import Children
from mailboat.demo.scoring import Scorer
from mailboat.demo.screen import describe_sites, site_state
from shared.errors import UnavailableError

COORDINATOR = "coordinator"
GIVE_UP_S = "30"
"""A process that cannot reach the broker for this long leaves, and says so."""
POLL_S = 0.25
KILLED_FOR_S = 2.0
SETTLE_S = 0.75
"""The coordinator writes its status every half second; this much later it holds the last words of sites that left."""


class Federation:
    """A coordinator and its sites; `facts` is what is known of them, kept up to date while `run` runs."""

    def __init__(self, plan: Plan, children: Children, scorer: Scorer, view: View) -> None:
        self._plan = plan
        self._children = children
        self._scorer = scorer
        self._view = view
        self._watcher = Watcher(plan.layout.storage)
        self._ended_at: float | None = None
        self._moved = asyncio.Event()
        """Wakes, with each reading of the facts, who waits for something in them."""
        states: dict[str, ProcessState] = dict.fromkeys(plan.started, "starting")
        self.facts = Facts(processes=states | dict.fromkeys(plan.absent, "absent"))

    async def start(self) -> None:
        """Start the coordinator and all sites that shall be there."""
        config = str(self._plan.layout.coordinator)
        await self._children.start(COORDINATOR, "coordinator", "run", "--config", config, "--give-up-s", GIVE_UP_S)
        for name in self._plan.started:
            await self.start_site(name)

    async def start_site(self, name: str) -> None:
        """Start one site, for the first time or again."""
        config = str(self._plan.layout.site(name))
        await self._children.start(name, "site", "run", "--config", config, "--give-up-s", GIVE_UP_S)

    async def run(self) -> None:
        """Return when the last version is published, every site has left and every version is scored.

        Raises what a process says that ended too early, and UnavailableError when nothing has moved for long.
        """
        patience = Patience(defaults.STALLED_S)
        while not self._complete():
            states = self._states()  # before the facts: a site that has left must find the run complete in them
            facts = self._watcher.read(self.facts)
            self.facts = replace(facts, processes=states, scores=dict(self._scorer.scores))
            self._view.show(self.facts)
            self._scorer.ask(self.facts)
            self._moved.set()
            self._moved.clear()
            self._check()
            if patience.spent(self.facts, time.monotonic()):
                raise UnavailableError(
                    f"nothing has moved for {defaults.STALLED_S:.0f} s: {self.waiting_for()}",
                    hint=f"the logs are in {self._plan.layout.logs}",
                )
            await asyncio.sleep(POLL_S)

    async def kill_one(self) -> None:
        """End one site with SIGKILL in the middle of its work, once, and start it again: a power cut.

        A site says once a second what it does; one that is never seen at work is killed before the last version.
        """
        victim = random.Random(self._plan.options.seed).choice(self._plan.started)
        at_last = max(1, self._plan.federation.federation.versions - 1)
        while not self.facts.finished:
            at_work = self.facts.version >= 1 and site_state(self.facts, victim) in {"training", "uploading"}
            if at_work or self.facts.version >= at_last:
                break
            await self._moved.wait()
        if self.facts.finished:
            return
        await self._children.kill(victim)
        self._view.say(f"{victim}: killed with SIGKILL, to be started again in {KILLED_FOR_S:.0f} s")
        await asyncio.sleep(KILLED_FOR_S)
        await self.start_site(victim)
        self._view.say(f"{victim}: started again")

    def waiting_for(self) -> str:
        """Name what is not done yet, in words."""
        facts = self.facts
        if not facts.finished:
            version = f"version {facts.version} of {self._plan.federation.federation.versions} is published"
            return f"{version}; {describe_sites(facts, self._plan.started)}"
        staying = tuple(name for name in self._plan.started if facts.processes[name] != "ended")
        if staying:
            return f"the run is complete, but not everybody has left: {describe_sites(facts, staying)}"
        return f"{len(facts.versions) + 1 - len(facts.scores)} versions are still being scored"

    def _complete(self) -> bool:
        """The last condition: the coordinator has written down what the sites last said."""
        facts = self.facts
        left = all(facts.processes[name] == "ended" for name in self._plan.started)
        if left and self._ended_at is None:
            self._ended_at = time.time()
        if not (left and facts.finished and facts.all_scored):
            return False
        assert facts.live is not None, "a run that finished has a status"
        assert self._ended_at is not None
        return facts.live.at > self._ended_at + SETTLE_S

    def _states(self) -> Mapping[str, ProcessState]:
        states: dict[str, ProcessState] = dict.fromkeys(self._plan.absent, "absent")
        for name in self._plan.started:
            child = self._children[name]
            if child.status is None:
                states[name] = "running"
            else:
                states[name] = "killed" if child.killed else "ended"
        return {name: states[name] for name in self._plan.sites}

    def _check(self) -> None:
        self._children.check()
        log = f"the logs are in {self._plan.layout.logs}"
        if self._children[COORDINATOR].status is not None:
            raise UnavailableError("the coordinator has left although nobody told it to", hint=log)
        if not self.facts.finished:
            early = [name for name, state in self.facts.processes.items() if state == "ended"]
            if early:
                raise UnavailableError(f"{', '.join(early)} left before the run was complete", hint=log)


class Patience:
    """Whether anything has moved lately; bytes alone do not count, they go back and forth on a broken link too."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: tuple[object, ...] = ()
        self._since = 0.0

    def spent(self, facts: Facts, now: float) -> bool:
        """Take the newest facts; True when they have said the same for longer than the limit."""
        sites = facts.live.sites if facts.live else {}
        seen = (
            len(facts.versions),
            len(facts.accepted),
            len(facts.scores),
            tuple(facts.processes.values()),
            tuple((name, site.phase, site.version, site.progress) for name, site in sites.items()),
        )
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since > self._limit_s
