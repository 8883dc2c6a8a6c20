"""The agent's side of the training worker: starts it, restarts it when it dies, and asks again.

Nothing here imports torch: the agent's process stays small, and the kernel's out-of-memory killer finds the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import structlog

from edge_client import pipe
from edge_client.privacy.ledger import Charge, Limit
from edge_client.training import Standing
from shared.config import FederationConfig, SiteConfig
from shared.errors import ConfigError, CorruptError, MailboatError, RefusedError, UnavailableError
from shared.room import MIB

RETRIES = 2
"""A worker that dies three times over one request will die a fourth time."""

WORKER = "edge_client.worker"
"""The worker's module."""

LEAVE_S = 5.0
"""A worker whose input has closed leaves at once; after this long it is killed."""

Progress = Callable[[float, float], None]
_A = TypeVar("_A", pipe.Loaded, pipe.Trained, pipe.Evaluated, pipe.Measured, pipe.Exported)

log = structlog.get_logger("worker")


class WorkerDiedError(Exception):
    """The worker ended in the middle of a request; `cause` says how, `hint` what may help."""

    def __init__(self, returncode: int) -> None:
        if returncode == -signal.SIGKILL:
            self.cause = "it was killed (SIGKILL), most likely by the system because memory ran out"
            self.hint = "lower training.batch_size or task.max_length, train fewer layers, or free memory"
        elif returncode < 0:
            self.cause = f"it was ended by {signal.Signals(-returncode).name}"
            self.hint = "look into the system's log"
        else:
            self.cause = f"it ended with status {returncode}"
            self.hint = "its last words are on the standard error of this process"
        super().__init__(self.cause)


def load_request(config: SiteConfig, federation: FederationConfig, *, trains: bool = True) -> pipe.Load:
    """Return what a worker has to load to train for this site, or with `trains` false to measure for it."""
    return pipe.Load(
        federation=federation,
        source=str(config.model_dir or federation.model.base),
        notes=config.data.notes,
        skip_bad=config.data.skip_bad,
        holdout=config.data.holdout,
        threads=config.threads,
        site=config.name,
        limits=config.layers,
        prefix=config.prefix,
        storage=config.storage if trains else None,
        keep_free=config.min_free_mib * MIB,
        trains=trains,
        clipping=config.privacy.clipping,
    )


class WorkerClient:
    """The training worker of one site. Use as `async with`; one request at a time, others wait for their turn.

    `niceness` (0 to 19): how far the worker stands back from other processes when the processor is busy. With `trains`
    false it measures and scores, and never trains. `own` gives the file of what stayed at the site after its newest
    update, or None.
    """

    standing = Standing()

    def __init__(
        self,
        config: SiteConfig,
        federation: FederationConfig,
        *,
        niceness: int = 0,
        trains: bool = True,
        own: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self._federation = federation
        self._trains = trains
        self._own = own
        self.serve(config)
        self._niceness = niceness
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def serve(self, config: SiteConfig) -> None:
        """Train with the notes of `config` from the next request on; a running worker keeps its process and model."""
        self._load = load_request(config, self._federation, trains=self._trains)
        self._ready = False
        """True when the running worker has loaded model and these notes."""

    @property
    def pid(self) -> int | None:
        """Process id of the worker while it runs."""
        return self._process.pid if self._process else None

    async def load(self, *, initial: Path | None = None) -> pipe.Loaded:
        """Load model and notes; the other requests do it by themselves when needed.

        `initial` names a file that receives the trained tensors as the model's folder has them, plain F32 safetensors.
        Raises what model and notes get wrong, as `load_model` and `load_notes` do, and UnavailableError when the worker
        dies over it again and again.
        """
        return await self._ask(self._load.model_copy(update={"initial": initial}), pipe.Loaded)

    async def train(
        self,
        state: Path,
        base_version: int,
        delta: Path,
        *,
        on_progress: Progress = lambda _share, _loss: None,
        so_far: tuple[Charge, ...] = (),
        limits: tuple[Limit, ...] = (),
    ) -> pipe.Trained:
        """Train from the published state in the file `state` and write the delta to `delta`, plain F32 safetensors.

        What stays here goes to a file beside it. When the worker dies, training begins anew: from the same seed, so
        that the delta is the same, and in a private federation with noise of its own. There `so_far` is what trainings
        have cost and `limits` what they may come to; of a worker that died nothing has come out, so it has cost
        nothing. Cancelling ends the worker; the next request starts another. Raises RefusedError when training
        diverged, the state does not fit, or a limit would be passed (rule 'privacy-budget', before it begins),
        CorruptError when what stayed here is spoilt, UnavailableError when the worker dies again and again or the disk
        is full.
        """
        request = pipe.Train(
            state=state, base_version=base_version, out=delta, own=self._own(), so_far=so_far, limits=limits
        )
        return await self._ask(request, pipe.Trained, on_progress)

    async def evaluate(self, state: Path, notes: Path | None = None) -> pipe.Evaluated:
        """Score the state in a file on `notes`, or on this site's held-out notes."""
        return await self._ask(pipe.Evaluate(state=state, notes=notes), pipe.Evaluated)

    async def loss(self, state: Path) -> float:
        """Return the mean loss of the state in a file on all notes but the held-out ones; NaN where it is not finite.

        Errors as `evaluate`.
        """
        measured = await self._ask(pipe.Measure(state=state), pipe.Measured)
        return math.nan if measured.loss is None else measured.loss

    async def export(self, state: Path, out: Path) -> None:
        """Write the model with the state in a file to the folder `out`, as transformers' `from_pretrained` reads it.

        Raises RefusedError when the state does not fit, UnavailableError when the folder cannot be written.
        """
        await self._ask(pipe.Export(state=state, out=out), pipe.Exported)

    async def _ask(
        self, request: pipe.Request, wanted: type[_A], on_progress: Progress = lambda _share, _loss: None
    ) -> _A:
        async with self._turn:
            for left in range(RETRIES, -1, -1):
                try:
                    process = await self._running()
                    if not self._ready and not isinstance(request, pipe.Load):
                        await self._exchange(process, self._load, pipe.Loaded, on_progress)
                    return await self._exchange(process, request, wanted, on_progress)
                except WorkerDiedError as death:
                    log.warning("worker-died", during=request.kind, cause=death.cause, hint=death.hint, retries=left)
                    if left == 0:
                        raise UnavailableError(
                            f"the training worker died {RETRIES + 1} times over one {request.kind}: {death.cause}",
                            hint=death.hint,
                        ) from None
        raise AssertionError("the last try returns or raises")

    async def _exchange(self, process: Process, request: pipe.Request, wanted: type[_A], on_progress: Progress) -> _A:
        """Ask and wait for the answer. Left before it has come (cancelled, say), the worker is of no more use."""
        assert process.stdin is not None
        answered = False
        try:
            process.stdin.write(pipe.pack(request))
            await process.stdin.drain()
            while not answered:
                match await _receive(process):
                    case pipe.Progress() as progress:
                        on_progress(progress.share, progress.loss)
                    case pipe.Notice() as notice:
                        log.log(_LEVELS[notice.level], notice.event, **notice.fields)
                    case answer:
                        answered = True
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
            raise WorkerDiedError(await _ended(process)) from None
        finally:
            if not answered:
                await self._kill()
        if isinstance(answer, pipe.Failed):
            raise raised(answer)
        assert isinstance(answer, wanted), "an answer to another request"
        if isinstance(answer, pipe.Loaded):
            # One that is started again trains as deep, so that an update can be trained anew bit for bit.
            self._load = self._load.model_copy(update={"depth": answer.depth})
            self._ready = True
        return answer

    async def _running(self) -> Process:
        """Return the worker's process, a fresh one that has loaded nothing when there is none."""
        process = self._process
        if process is not None and process.returncode is None:
            return process
        if process is not None:
            log.warning("worker-died", during="idle", cause=WorkerDiedError(process.returncode or 0).cause)
        environment = {**os.environ, **_ENVIRONMENT}
        if self._load.threads:
            environment["OMP_NUM_THREADS"] = str(self._load.threads)
        self._ready = False
        self._process = await asyncio.create_subprocess_exec(
            # -P: what lies in the current folder is never imported in place of the installed package.
            *(sys.executable, "-P", "-m", WORKER),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
        )
        if self._niceness:
            # At once, before it has threads: each inherits what the one that starts it has. One that has died already
            # is found out by the exchange.
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, self._niceness)
        return self._process

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            await _ended(process)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _receive(process: Process) -> pipe.Answer:
    assert process.stdout is not None
    (length,) = pipe.LENGTH.unpack(await process.stdout.readexactly(pipe.LENGTH.size))
    assert length <= pipe.MAX_FRAME, "the worker writes frames alone"
    return pipe.unpack_answer(await process.stdout.readexactly(length))


async def _ended(process: Process) -> int:
    """The exit status of a worker that is about to leave."""
    try:
        async with asyncio.timeout(LEAVE_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()


def raised(failure: pipe.Failed) -> MailboatError:
    """Return the error that a worker met, as it was there."""
    if failure.error == RefusedError.__name__:
        return RefusedError(failure.message, rule=failure.rule, hint=failure.hint)
    return _FAMILIES[failure.error](failure.message, hint=failure.hint)


_FAMILIES: dict[str, type[ConfigError | CorruptError | UnavailableError]] = {
    family.__name__: family for family in (ConfigError, CorruptError, UnavailableError)
}
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads would compete with torch's for the same cores
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # a hospital's machine tells nobody what it loads
}
