"""One chaotic run from its plan to its outcome: real broker, coordinator and sites, and somebody who strikes them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

from broker.launcher import find_mosquitto
from mailboat.flaky import FlakyProxy
from tests.chaos import checks, disks
from tests.chaos.folder import NAME, write_broker, write_run
from tests.chaos.plan import BROKER, COORDINATOR_NAME, Fault, Plan
from tests.chaos.processes import TOKEN, Actor, Death, with_token
from tests.chaos.tap import Tap, Traffic
from tests.chaos.worker import CALM, SECONDS
from tests.helpers import any_free_port

READY_S = 60.0
"""Longest wait for a process that a fault is meant for; on a busy machine an interpreter starts slowly."""
HANG_S = 120.0
"""A run in which nothing on any disk has changed for so long, and no process has ended, hangs."""
FAULTS_S = 3600.0
"""Longest wait for the end of the last fault; a site may have to miss a thousand versions."""
LOOK_S = 0.25
STARVED_S = 2 * LOOK_S
"""A look that comes later than this says that the machine was busy with something else; that time is not counted."""
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Applied:
    """A fault that struck at `at` (unix seconds) and was over at `until`."""

    fault: Fault
    at: float
    until: float


@dataclass(slots=True)
class Outcome:
    """What came of one run; `problems` is empty when all held."""

    plan: Plan
    problems: list[str] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    """Faults whose process was not there to be struck."""
    deaths: list[Death] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else is worth telling."""
    sealed: int = 0
    seconds: float = 0.0
    up: Traffic = field(default_factory=Traffic)
    down: Traffic = field(default_factory=Traffic)

    @property
    def kills(self) -> int:
        """Processes ended by SIGKILL: at random instants, at commit points, the broker and the workers included."""
        workers = sum(applied.fault.kind == "worker" for applied in self.applied)
        return workers + sum(not death.how.startswith("exit") for death in self.deaths)


class Run:
    """One run in the folder `root`; `begin` it, `strike` what the plan says, `end` it."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self.plan = plan
        self.token = secrets.token_hex(8)
        self.outcome = Outcome(plan)
        self.sealed: dict[str, set[str]] = {name: set() for name in plan.names[1:]}
        self.actors: dict[str, Actor] = {}
        self.proxies: dict[str, FlakyProxy] = {}
        self.tap: Tap
        self._stack = contextlib.AsyncExitStack()
        self._healing: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Start everything."""
        binary = find_mosquitto()
        assert binary is not None, "Mosquitto is not installed"
        self._stack.enter_context(disks.small_disks([self.root / name for name in self.plan.disks]))
        port = any_free_port()
        config = write_broker(self.root / BROKER, self.plan, port)
        self._add(BROKER, (str(binary), "-c", str(config))).begin()
        self._stack.push_async_callback(self._abandon)
        self.tap = await self._stack.enter_async_context(Tap(port, NAME))
        for name in self.plan.names:
            proxy = FlakyProxy("127.0.0.1", port, seed=self.plan.seed, conditions=self.plan.links[name])
            self.proxies[name] = await self._stack.enter_async_context(proxy)
        write_run(self.root, self.plan, {name: proxy.url for name, proxy in self.proxies.items()})
        self._add(COORDINATOR_NAME, (sys.executable, "-m", "mailboat", *self._words(COORDINATOR_NAME))).begin()
        sites = [
            self._add(name, (sys.executable, "-m", "tests.chaos.start", *self._words(name)))
            for name in self.plan.names[1:]
        ]
        for site in sites:
            if self.plan.first in ("", site.name):
                site.begin()
            else:
                self._later(self._begin_after(self.actors[self.plan.first], site))

    async def _begin_after(self, first: Actor, actor: Actor) -> None:
        await first.died.wait()
        actor.begin()

    def _words(self, name: str) -> tuple[str, ...]:
        role = "coordinator" if name == COORDINATOR_NAME else "site"
        return (role, "run", "--log-json", "--config", str(self.root / f"{name}.toml"))

    def _add(self, name: str, command: tuple[str, ...]) -> Actor:
        environment = {TOKEN: self.token, SECONDS: str(self.plan.training_s), "OMP_NUM_THREADS": "1"}
        self.actors[name] = actor = Actor(
            name,
            command,
            self.root / f"{name}.log",
            environment,
            lives=self.plan.points.get(name, ()),
            on_death=self._look,
        )
        return actor

    def _look(self, name: str) -> None:
        """Note what a site has sealed; called at each death, when nobody changes its folder."""
        if name in self.sealed:
            self.sealed[name] |= checks.sealed_now(self.root, name)
        elif name == BROKER and self._forgets:
            for kept in (self.root / BROKER).glob("mosquitto.db*"):
                kept.unlink()
            self._forgets = False

    _forgets = False

    async def strike(self) -> None:
        """Apply the faults one after the other."""
        for fault in self.plan.faults:
            await asyncio.sleep(fault.after_s)
            if fault.mid_upload:
                await self._mid_upload()
            if any(actor.failure for actor in self.actors.values()):
                return
            if not await self._apply(fault):
                self.outcome.missed.append(fault)
        if self._healing and (await asyncio.wait(self._healing, timeout=FAULTS_S))[1]:
            self.outcome.problems.append(f"hang: a fault was not over {FAULTS_S:.0f} s after the last one began")

    async def _mid_upload(self) -> None:
        """Wait until half of the chunks of some update have come by, and not all."""
        before = dict(self.tap.seen)
        chunks = -(-4 * self.plan.parameters // (self.plan.slice_kib * 1024))
        async with asyncio.timeout(READY_S):
            while not any(
                chunks // 2 <= count < chunks and before.get(name, 0) < chunks // 2
                for name, count in self.tap.seen.items()
            ):
                self.tap.news.clear()
                await self.tap.news.wait()

    async def _apply(self, fault: Fault) -> bool:
        actor = self.actors[fault.target]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                await actor.started_or_done()
        at = time.time()
        struck = await self._hit(fault, actor)
        with (self.root / "faults.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S', time.gmtime(at))}{at % 1:.2f} {struck} {fault}\n")
        if struck:
            self.outcome.applied.append(Applied(fault, at, at + fault.for_s))
        return struck

    async def _hit(self, fault: Fault, actor: Actor) -> bool:
        match fault.kind:
            case "kill" | "away" | "relapse":
                return actor.kill(away_s=fault.for_s)
            case "worker":
                return await self._kill_worker(actor)
            case "forget":
                self._forgets = True
                return actor.kill(away_s=fault.for_s)
            case "pause":
                return actor.pause() and self._later(self._resume(actor, fault.for_s))
            case "cut":
                self.proxies[fault.target].cut()
            case "reset":
                self.proxies[fault.target].reset()
            case "hole":
                self.proxies[fault.target].hole()
                return self._later(self._heal(self.proxies[fault.target], fault.for_s))
            case "down":
                await self.proxies[fault.target].down()
                return self._later(self._up(self.proxies[fault.target], fault.for_s))
            case "absent":
                actor.keep_away()
                return self._later(self._miss(actor, fault.versions))
            case "full":
                actor.full_until = math.inf
                await asyncio.to_thread(disks.fill, self.root / fault.target)
                return self._later(self._make_room(actor, fault.for_s))
            case _:
                assert_never(fault.kind)
        return True

    async def _kill_worker(self, actor: Actor) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                while not actor.kill_child() and not actor.done.is_set():  # noqa: ASYNC110 - another process's child
                    await asyncio.sleep(LOOK_S)
                return not actor.done.is_set()
        return False

    def _later(self, healing: Any) -> bool:
        task = asyncio.create_task(healing)
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)
        return True

    async def _resume(self, actor: Actor, after_s: float) -> None:
        await asyncio.sleep(after_s)
        actor.resume()

    async def _miss(self, actor: Actor, versions: int) -> None:
        """Let the site in again after so many versions, and wait until it was told what became of its update."""
        while checks.published(self.root) < versions:  # noqa: ASYNC110 - another process makes them
            await asyncio.sleep(LOOK_S)
        actor.let_in()
        while not (told := checks.receipts(self.root, actor.name)) and not actor.failure:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(LOOK_S)
        for receipt in told.values():
            self.outcome.notes.append(
                f"{actor.name} died with a sealed update and came back after {versions} versions; its update of "
                f"version {receipt['base_version']} was {receipt['outcome']}."
            )

    async def _heal(self, proxy: FlakyProxy, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await proxy.heal()

    async def _up(self, proxy: FlakyProxy, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await proxy.up()

    async def _make_room(self, actor: Actor, after_s: float) -> None:
        await asyncio.sleep(after_s)
        disks.empty(self.root / actor.name)
        actor.full_until = time.time()

    async def end(self) -> None:
        """Let the run come to its end, and stop what serves for ever."""
        (self.root / "model" / CALM).touch()
        sites = [self.actors[name] for name in self.plan.names[1:]]
        still_s, standing, looked_at = 0.0, self._standing(), time.monotonic()
        while late := [site.name for site in sites if not site.done.is_set()]:
            await asyncio.sleep(LOOK_S)
            passed_s, looked_at = time.monotonic() - looked_at, time.monotonic()
            still_s += passed_s if passed_s < STARVED_S else 0.0
            if (now := self._standing()) != standing:
                still_s, standing = 0.0, now
            if still_s > HANG_S:
                self.outcome.problems.append(f"hang: for {HANG_S:.0f} s nothing moved, without {', '.join(late)}")
                break
        self.outcome.problems += [actor.failure for actor in self.actors.values() if actor.failure]
        if not self.actors[COORDINATOR_NAME].failure:
            status = await self.actors[COORDINATOR_NAME].finish(STOP_S)
            if status != 0:
                self.outcome.problems.append(f"the coordinator ended with status {status} after SIGTERM")

    def _standing(self) -> tuple[int, int]:
        """Changes with each fact, receipt, stored chunk and death; a busy machine makes it change slowly."""
        newest = 0
        for name in self.plan.names:
            for path in (self.root / name).rglob("*"):
                if path.parent.name != name or path.name == "audit.jsonl":
                    with contextlib.suppress(FileNotFoundError):
                        newest = max(newest, path.stat().st_mtime_ns)
        return newest, sum(len(actor.deaths) for actor in self.actors.values())

    async def close(self) -> None:
        """End whatever still runs."""
        await self._stack.aclose()

    async def _abandon(self) -> None:
        for task in self._healing:
            task.cancel()
        for actor in reversed(self.actors.values()):
            actor.resume()
            self._look(actor.name)
            await actor.abandon()
            self.outcome.deaths += actor.deaths

    async def settle(self) -> None:
        """Look at what is left, once nothing runs any more."""
        for _ in range(round(STOP_S / LOOK_S)):
            if not with_token(self.token):
                break
            await asyncio.sleep(LOOK_S)  # a worker whose agent was killed leaves when its input closes
        self.outcome.up, self.outcome.down = self.tap.up, self.tap.down
        self.outcome.sealed = sum(len(checks.receipts(self.root, name)) for name in self.sealed)
        found = await asyncio.to_thread(checks.check, self.root, self.plan, self.sealed, self.token)
        self.outcome.problems += found


async def conduct(root: Path, plan: Plan) -> Outcome:
    """Run the plan in the empty folder `root`."""
    began = time.monotonic()
    run = Run(root, plan)
    async with _closing(run):
        await run.begin()
        await run.strike()
        await run.end()
    await run.settle()
    run.outcome.seconds = time.monotonic() - began
    return run.outcome


@contextlib.asynccontextmanager
async def _closing(run: Run) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await run.close()
