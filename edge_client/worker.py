"""The training worker: a process that holds model and notes, trains when asked, and dies with its agent.

`python -m edge_client.worker`, started by `edge_client/worker_client.py`. It is a process of its own so that training
does not hold up the link, and so that the kernel, when memory runs out, ends it and not the agent with its outbox.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, assert_never

import structlog
import torch

from edge_client import pipe
from edge_client.data import AnyNote, NoteSet, load_notes
from edge_client.depth import Depth, choose_depth, measures
from edge_client.device import find_device
from edge_client.importance import measure
from edge_client.layout import PREFIX
from edge_client.model import (
    LoadedModel,
    State,
    apply_state,
    export,
    load_model,
    read_personal,
    seal,
    train_only,
    version_zero,
)
from edge_client.prefix import MEMORY
from edge_client.prefix_store import NOWHERE, Keep, OnDisk, Slot
from edge_client.statefile import Tensors, read_blocks, read_own, read_state, write_own, write_tensors
from edge_client.tasks import Scores
from edge_client.trainer import (
    EVALUATION_BATCH,
    Dataset,
    evaluate,
    make_dataset,
    mean_loss,
    round_section,
    round_seed,
    train,
)
from edge_client.weights import absent
from shared.config import ComputeSection, FederationConfig
from shared.errors import MailboatError, RefusedError, UnavailableError
from shared.manifest import BLOCKS
from shared.plan import Blocks, SealedPlan
from shared.room import MIB
from shared.selection import best, score_name

if TYPE_CHECKING:
    from edge_client.privacy.descent import Private

UPDATE_BYTES = 4 * 4
"""Bytes that an update wants on the disk for each trained parameter: state, delta, sealed, residual; see `disk`."""

PROGRESS_S = 0.2
"""Progress is told at most this often; a tiny model takes a hundred steps a second."""

Send = Callable[[pipe.Answer], None]
N = TypeVar("N", bound=AnyNote)

log = structlog.get_logger("worker")


class Worker:
    """One model and one site's notes, and what can be asked of them; `send` tells progress on the way."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._job: pipe.Load
        self._loaded: LoadedModel
        self._plan: SealedPlan
        self._seeded: State
        """The personal tensors as everybody has them before the first update."""
        self._loaded_for: tuple[str, FederationConfig, ComputeSection] | None = None
        """Source and federation of the model, and where it is: other notes under the same three need no other model."""
        self._depth: Depth
        self._training: Dataset
        self._private: Private | None
        """The same by record, with what an update of it costs; None without `[privacy]`."""
        self._held_out: Dataset
        self._other: tuple[Path, Dataset] | None = None
        """The notes asked for last beside our own: the same ones are scored after every version."""

    def handle(self, request: pipe.Request) -> pipe.Answer:
        """Carry out one request; Failed instead of a MailboatError, and when memory ran out."""
        try:
            match request:
                case pipe.Load():
                    return self._load(request)
                case pipe.Train():
                    return self._train(request)
                case pipe.Evaluate():
                    return self._evaluate(request)
                case pipe.Measure():
                    return self._measure(request)
                case pipe.Export():
                    return self._export(request)
                case _:
                    assert_never(request)
        except MailboatError as error:
            return _failed(error)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            return _failed(UnavailableError("training ran out of memory", hint=LESS_MEMORY))

    def _load(self, job: pipe.Load) -> pipe.Loaded:
        if job.threads:
            torch.set_num_threads(job.threads)
        if job.initial is not None or self._loaded_for != (job.source, job.federation, job.compute):
            self._other = None
            device = find_device(job.compute)
            log.info("computes", device=device.title, precision=device.precision)
            self._loaded = load_model(job.source, job.federation, suffix=True, device=device)
            self._loaded_for = (job.source, job.federation, job.compute)
            self._plan = seal(self._loaded, job.federation)
            self._seeded = read_personal(self._loaded)
        if job.initial is not None:
            write_tensors(job.initial, version_zero(self._loaded))
        self._job = job
        found = self._read(job.notes)
        kept, held_out = split_holdout(found.notes, job.holdout, job.federation.federation.seed)
        self._prepare(kept, held_out)
        self._depth = self._limited(job)
        return pipe.Loaded(
            plan=self._plan,
            depth=self._depth.blocks,
            limit=self._depth.limit,
            examples=self._training.examples,
            notes=len(kept),
            held_out=len(held_out),
            skipped=found.skipped,
            uncached=self._training.prepared.reason,
        )

    def _prepare(self, kept: Sequence[AnyNote], held_out: Sequence[AnyNote]) -> None:
        """Make batches of the notes, and of the frozen blocks what they make of these."""
        size, loaded = self._job.federation.training.batch_size, self._loaded
        self._private = self._by_record(kept) if self._job.trains else None
        records = self._private and self._private.records.data
        self._training = records or self._dataset(kept, size, self._keep("training"))
        # A model that writes its answers runs as a whole for each word.
        scores = NOWHERE if loaded.task.head.writes else self._keep("held-out")
        self._held_out = self._dataset(held_out, EVALUATION_BATCH, scores)
        reason = self._training.prepared.reason
        if reason:
            log.warning("prefix-not-cached", reason=reason, consequence="each epoch runs the frozen blocks again")
            loaded.weights.load(loaded.model, absent(loaded.model))

    def _keep(self, slot: Slot) -> Keep:
        """Where the frozen prefix of these notes goes. The disk keeps room for an update beside it."""
        job = self._job
        if job.storage is None:
            return MEMORY
        return OnDisk(
            job.storage / PREFIX,
            slot,
            dtype=job.prefix.dtype,
            limit=job.prefix.limit_mib * MIB,
            keep_free=job.keep_free + UPDATE_BYTES * self._loaded.trained_parameters,
        )

    def _limited(self, job: pipe.Load) -> Depth:
        """Decided before, or by this site's limits; without anything to train on there is nothing to measure.

        Where importance chooses, the lowest candidates are measured: training any others takes no more.
        """
        planned = self._plan.layers[: self._plan.at_once]
        if job.depth is not None or not self._training.prepared.batches:
            return Depth(job.depth or len(planned), "")
        how = measures(self._loaded, self._training, job.federation)
        return choose_depth(planned, job.limits, how)

    def _choose(self, state: Tensors, chosen: Blocks | None, base_version: int, seed: int) -> dict[str, float]:
        """Say which blocks are trained from a state, whose header names the `chosen`; return what was measured for it.

        Where importance chooses, that is this site's own choice until there is one of all; it measures for the next.
        """
        plan, section, scores = self._plan, self._job.federation.layers, dict[str, float]()
        planned = plan.layers
        if plan.at_once is not None:
            if not set(chosen or ()) <= set(planned):
                raise RefusedError("the state names blocks that are not in the plan", rule="state-shape")
            if chosen is None or (section.rechoose and base_version % section.rechoose == 0):
                apply_state(self._loaded, state)
                found = measure(self._loaded, self._training.prepared, section.by, seed=seed)
                scores = {score_name(block): score for block, score in found.items()}
            # Where not one score is above 0 all blocks are alike, and of equal ones the higher are taken.
            planned = chosen or best([(1.0, scores)], planned, plan.at_once) or planned[-plan.at_once :]
        self._loaded = train_only(self._loaded, planned[-self._depth.blocks :])
        if plan.at_once is not None:
            log.info("trains", version=base_version, blocks=", ".join(map(str, self._loaded.here)))
        return scores

    def _train(self, request: pipe.Train) -> pipe.Trained:
        federation, private, told = self._job.federation, self._private, 0.0
        seed = round_seed(federation.federation.seed, self._job.site, request.base_version)
        state, spent, descent = self._complete(request.state, request.own), None, None
        scores = self._choose(state, read_blocks(request.state), request.base_version, seed)
        if private is not None:
            # Nothing of such a training may follow from what others know, dropout included.
            seed = secrets.randbits(63)
            spent = private.spend(request.so_far, request.limits)
            descent = private.descent(self._loaded)

        def progress(share: float, loss: float) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= PROGRESS_S or share >= 1.0:
                told = now
                self._send(pipe.Progress(share=share, loss=loss))

        result = train(
            self._loaded,
            state,
            self._training,
            round_section(federation.training, request.base_version, federation.federation.versions),
            seed=seed,
            descent=descent,
            progress=progress,
        )
        metrics = result.metrics | scores
        if self._held_out.notes:
            metrics |= evaluate(self._loaded, self._held_out).overall
        if self._depth.blocks < len(self._plan.layers[: self._plan.at_once]):
            metrics[BLOCKS] = float(self._depth.blocks)
        write_tensors(request.out, result.delta)
        own = request.out.with_suffix(".own") if result.personal else None
        if own is not None:
            write_own(own, result.personal, self._plan.fingerprint)
        return pipe.Trained(examples=result.examples, metrics=metrics, own=own, spent=spent)

    def _evaluate(self, request: pipe.Evaluate) -> pipe.Evaluated:
        data = self._held_out if request.notes is None else self._others(request.notes)
        apply_state(self._loaded, self._complete(request.state, request.own))
        return _scored(evaluate(self._loaded, data))

    def _measure(self, request: pipe.Measure) -> pipe.Measured:
        apply_state(self._loaded, self._complete(request.state))
        loss = mean_loss(self._loaded, self._training)
        return pipe.Measured(loss=loss if math.isfinite(loss) else None)

    def _export(self, request: pipe.Export) -> pipe.Exported:
        apply_state(self._loaded, self._complete(request.state))
        export(self._loaded, request.out)
        return pipe.Exported()

    def _complete(self, state: Path, own: Path | None = None) -> Tensors:
        """A published state with the personal tensors: this site's own, or those that everybody begins with."""
        personal = self._seeded if own is None else read_own(own, self._plan.fingerprint)
        return read_state(state).beside(personal)

    def _others(self, notes: Path) -> Dataset:
        if self._other is None or self._other[0] != notes:
            self._other = (notes, self._dataset(self._read(notes).notes, EVALUATION_BATCH, MEMORY))
        return self._other[1]

    def _read(self, notes: Path) -> NoteSet[AnyNote]:
        return load_notes(notes, self._loaded.task, skip_bad=self._job.skip_bad)

    def _by_record(self, notes: Sequence[AnyNote]) -> Private | None:
        section = self._job.federation.privacy
        if section is None:
            return None
        from edge_client.privacy.descent import make_private  # and Opacus, which takes 1.5 s and 110 MB

        job = self._job
        return make_private(self._loaded, notes, job.federation, section, job.clipping, self._keep("training"))

    def _dataset(self, notes: Sequence[AnyNote], batch_size: int, keep: Keep) -> Dataset:
        seed = self._job.federation.federation.seed
        return make_dataset(self._loaded, notes, batch_size=batch_size, seed=seed, keep=keep)


LESS_MEMORY = "lower training.batch_size or task.max_length, train fewer layers, or give this machine more memory"


def split_holdout(notes: Sequence[N], share: float, seed: int) -> tuple[tuple[N, ...], tuple[N, ...]]:
    """Return the notes to train on and those held out, each in their order; no patient has notes in both.

    `share` of the patients, rounded, at least one and never all, unless it is 0 or there is only one. Which ones
    follows from the seed and their ids, so that a restart never trains on what it held out before.
    """
    patients = {note.patient for note in notes}
    count = min(max(1, round(share * len(patients))), len(patients) - 1) if share > 0 else 0
    ranked = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}\n{patient}".encode()).digest())
    chosen = set(ranked[: max(0, count)])
    kept = tuple(note for note in notes if note.patient not in chosen)
    return kept, tuple(note for note in notes if note.patient in chosen)


def main() -> NoReturn:
    """Answer requests from standard input until it closes, which is when the agent ends, however it ends."""
    requests, answers = _take_pipes()
    # Ctrl-C goes to the whole group of the terminal; the agent decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def send(answer: pipe.Answer) -> None:
        try:
            answers.write(pipe.pack(answer))
            answers.flush()
        except BrokenPipeError:
            os._exit(0)

    structlog.configure(processors=[_forward_to(send)])
    worker = Worker(send)
    inbox: queue.SimpleQueue[pipe.Request] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, inbox), daemon=True).start()
    while True:
        send(worker.handle(inbox.get()))


def _take_pipes() -> tuple[FileIO, BinaryIO]:
    """Keep standard input and output for frames alone: whatever else prints goes to standard error."""
    # Unbuffered: a thread that waits inside a buffered reader would hold its lock when the interpreter ends.
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted, not a file's content
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, answers


def _read_requests(requests: FileIO, inbox: queue.SimpleQueue[pipe.Request]) -> None:
    """Pass requests on; at the end of input leave at once, in the middle of whatever the other thread does."""
    while True:
        (length,) = pipe.LENGTH.unpack(_exactly(requests, pipe.LENGTH.size))
        inbox.put(pipe.unpack_request(_exactly(requests, length)))


def _exactly(requests: FileIO, size: int) -> bytes:
    parts = []
    while size > 0:
        part = requests.read(size)
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _forward_to(send: Send) -> structlog.typing.Processor:
    """A processor that gives log lines to the agent, which knows where logs go."""

    def forward(_logger: Any, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        name = event.pop("event")
        send(pipe.Notice(level=level, event=name, fields=dict(event)))
        raise structlog.DropEvent

    return forward


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """True for torch's own ways to say so: on a CPU it is a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _failed(error: MailboatError) -> pipe.Failed:
    rule = error.rule if isinstance(error, RefusedError) else ""
    return pipe.Failed(error=type(error).__name__, message=error.message, hint=error.hint, rule=rule)


def _scored(scores: Scores) -> pipe.Evaluated:
    return pipe.Evaluated(
        overall=dict(scores.overall), labels={name: dict(measures) for name, measures in scores.labels.items()}
    )


if __name__ == "__main__":
    main()
