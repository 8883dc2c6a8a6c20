"""The whole demonstration, from an empty folder to the result; each step says what it does before it does it."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from broker.launcher import RunningBroker, run_broker
from edge_client.pipe import Loaded
from edge_client.worker_client import WorkerClient
from mailboat.demo.baselines import POOLED, Baselines, baseline_federation, baseline_site
from mailboat.demo.facts import Facts
from mailboat.demo.federate import COORDINATOR, Federation
from mailboat.demo.live import View
from mailboat.demo.plan import Plan, write_federation, write_processes
from mailboat.demo.plot import draw
from mailboat.demo.processes import Children
from mailboat.demo.report import BrokerFacts, Result, count_wire
from mailboat.demo.retained import clear_retained
from mailboat.demo.scoring import Scorer, extract
from mailboat.demo.screen import size
from mailboat.demo.wire import FullTransfer, measure_full_transfer
from mailboat.flaky import FlakyProxy, demo_faults
from mailboat.reach import reachable
from mailboat.sealing import INITIAL, describe, write_sealed
from shared.errors import UnavailableError
from shared.link.endpoints import parse_endpoints
from shared.plan import SealedPlan
from shared.tasks import first_error
from shared.tensorfile import map_tensors


async def run_demo(plan: Plan, view: View) -> Result:
    """Run one demonstration in the plan's folder and return what came out.

    Raises ConfigError, RefusedError or UnavailableError that name the process or step; all processes are gone by then.
    """
    demonstration = _Demonstration(plan, view)
    limit = plan.options.deadline_s
    try:
        async with asyncio.timeout(limit):
            with first_error():
                return await demonstration.run()
    except TimeoutError:
        raise UnavailableError(
            f"the demonstration did not end within {limit:.0f} s: {demonstration.waiting_for()}",
            hint=f"the logs are in {plan.layout.logs}; --deadline gives it more time",
        ) from None


@dataclass(frozen=True, slots=True)
class _Broker:
    facts: BrokerFacts
    running: RunningBroker | None
    """None for a broker that is not ours."""

    async def watch(self) -> NoReturn:
        """Raise when our broker ends by itself."""
        if self.running is None:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody answers this")
        status = await self.running.wait()
        raise UnavailableError(
            f"the broker {self.facts.kind} ended by itself with status {status}", hint=f"its log is {self.running.log}"
        )


class _Demonstration:
    """One run; what is waited for can be asked at any moment."""

    def __init__(self, plan: Plan, view: View) -> None:
        self._plan = plan
        self._view = view
        self._began = time.monotonic()
        self._doing = ""
        self._federation: Federation | None = None

    def waiting_for(self) -> str:
        """Name the step that goes on, and who is late in it."""
        return f"{self._doing}; {self._federation.waiting_for()}" if self._federation else self._doing

    def _begin(self, what: str) -> None:
        self._doing = what
        self._view.headline(what)

    async def run(self) -> Result:
        """See `run_demo`."""
        plan, layout = self._plan, self._plan.layout
        self._begin("notes and broker")
        await asyncio.to_thread(self._prepare)
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(self._open_broker())
            site_urls = await self._site_urls(stack, broker.facts.url)
            write_processes(plan, broker.facts.url, site_urls)
            children = await stack.enter_async_context(Children(layout.logs, layout.root))
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(broker.watch())
                result = await self._steps(children, broker.facts)
                watching.cancel()
        await asyncio.to_thread(draw, result, layout.plot)
        await asyncio.to_thread(shutil.rmtree, layout.scratch)
        return result

    def _prepare(self) -> None:
        plan = self._plan
        for folder in (plan.layout.root, plan.layout.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        options = plan.options
        plan.task.notes.make(
            plan.layout.notes,
            sites=options.sites,
            notes=options.notes,
            alpha=options.alpha,
            seed=options.seed,
            heldout=options.heldout,
        )
        if options.baselines:
            plan.task.notes.pool([plan.layout.notes / name for name in plan.started], plan.layout.pooled)
        write_federation(plan)

    @asynccontextmanager
    async def _open_broker(self) -> AsyncIterator[_Broker]:
        """A broker of our own, or the one that the options name; says which, and why."""
        wanted = self._plan.options.broker
        if wanted.startswith("mqtt://"):
            if not await reachable(parse_endpoints(wanted)):
                raise UnavailableError(f"no broker answers at {wanted}", hint="start it, or leave --broker out")
            self._view.say(f"broker: {wanted}, as asked for")
            yield _Broker(BrokerFacts("external", "", wanted), None)
            # Only after a good end: when something has failed, the broker may be what failed.
            await clear_retained(wanted, self._plan.federation.federation.name, self._plan.started)
            return
        kind = cast('Literal["auto", "mosquitto", "amqtt"]', wanted)  # Options.check has looked
        async with run_broker(kind, self._plan.layout.root / "broker") as running:
            why = "as asked for" if wanted != "auto" else _WHY[running.kind]
            self._view.say(f"broker: {running.kind} {running.version} at {running.url}, {why}")
            if running.notice:
                self._view.say(running.notice, style="yellow")
            yield _Broker(BrokerFacts(running.kind, running.version, running.url), running)

    async def _site_urls(self, stack: AsyncExitStack, broker_url: str) -> dict[str, str]:
        """Where each site connects to: the broker, or a bad network of its own in front of it."""
        if not self._plan.options.flaky:
            return dict.fromkeys(self._plan.started, broker_url)
        (endpoint, *_) = parse_endpoints(broker_url)
        urls = {}
        for name in self._plan.started:
            faults = demo_faults(self._plan.options.seed, name)
            proxy = await stack.enter_async_context(FlakyProxy(endpoint.host, endpoint.port, faults=faults))
            urls[name] = proxy.url
        self._view.say("flaky: each site's link is cut again and again; one site will be killed with SIGKILL")
        return urls

    async def _steps(self, children: Children, broker: BrokerFacts) -> Result:
        plan, training = self._plan, baseline_federation(self._plan)
        baselines = Baselines(plan, self._view)
        async with (
            WorkerClient(baseline_site(plan, plan.started[0]), training) as worker,
            WorkerClient(baseline_site(plan, POOLED), training, niceness=BACKGROUND) as beside,
            asyncio.TaskGroup() as tasks,
        ):
            self._begin("resolving the plan (loading the base model)")
            loading = tasks.create_task(beside.load()) if plan.options.baselines else None
            sealed = await self._seal(worker)
            if loading is not None:
                tasks.create_task(self._train_beside(loading, baselines, beside))
            facts, federated_s = await self._federate(children, Scorer(worker, plan.layout))
            self._begin("baselines and comparison")
            full = await self._export(worker, facts, broker.url)
            if plan.options.baselines:
                baselines.show_progress()
                await baselines.train(worker)
        return Result(
            facts=facts,
            mode=plan.options.mode,
            codec=plan.options.codec,
            layers=sealed.layers,
            trained_parameters=sealed.trained_parameters,
            total_parameters=sealed.total_parameters,
            local_only=baselines.local_only,
            centralized=baselines.centralized,
            wire=count_wire(facts, full),
            broker=broker,
            federated_s=federated_s,
            wall_s=time.monotonic() - self._began,
        )

    async def _seal(self, worker: WorkerClient) -> SealedPlan:
        """Resolve the plan against the base model, for the coordinator to find; `worker` keeps the model."""
        layout, federation = self._plan.layout, self._plan.federation
        initial = layout.scratch / INITIAL
        loaded = await worker.load(initial=initial)
        # The worker is there for the baselines, which differ from the federation in nothing but how they train.
        sealed = loaded.plan.model_copy(update={"config_sha256": federation.config_sha256})
        await asyncio.to_thread(write_sealed, layout.storage, federation, sealed, map_tensors(initial))
        for line in describe(sealed, federation):
            self._view.say(line)
        return sealed

    async def _train_beside(self, loading: asyncio.Task[Loaded], baselines: Baselines, worker: WorkerClient) -> None:
        """Train baselines with what the sites leave of the processors: rounds begin and end with waiting."""
        await loading
        await baselines.train(worker)

    async def _federate(self, children: Children, scorer: Scorer) -> tuple[Facts, float]:
        """The facts at the end, and the seconds it took."""
        began = time.monotonic()
        self._begin("federated training")
        federation = self._federation = Federation(self._plan, children, scorer, self._view)
        await federation.start()
        async with asyncio.TaskGroup() as tasks:
            beside: list[asyncio.Task[None]] = [tasks.create_task(scorer.run())]
            if self._plan.options.flaky:
                beside.append(tasks.create_task(federation.kill_one()))
            await federation.run()
            for task in beside:
                task.cancel()
        await children.stop(COORDINATOR)
        self._federation = None
        return federation.facts, time.monotonic() - began

    async def _export(self, worker: WorkerClient, facts: Facts, broker_url: str) -> FullTransfer:
        """Write the model that came out, and move it once over the broker, whole."""
        layout = self._plan.layout
        file = layout.scratch / "last.safetensors"
        await asyncio.to_thread(extract, layout.storage, facts.published[-1], file)
        await worker.export(file, layout.export)
        self._view.say(f"version {facts.version} written to {layout.export}")
        federation = f"{self._plan.federation.federation.name}-full"
        measured = await measure_full_transfer(layout.export, broker_url, federation, self._plan.started[0])
        self._view.say(f"one full-model transfer took {size(measured.sent_bytes)} on the wire")
        return measured


BACKGROUND = 19
"""Niceness of baselines that train beside the federation: they get what is left over, which is little but not nothing.
"""
_WHY = {"mosquitto": "found on this machine", "amqtt": "because Mosquitto was not found on this machine"}
