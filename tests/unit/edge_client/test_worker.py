"""The real worker process, driven through its client; some tests kill it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import structlog
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForTokenClassification

from edge_client import pipe, worker
from edge_client.device import Device
from edge_client.model import seal_plan
from edge_client.statefile import Tensors, read_state, shapes_of
from edge_client.worker import Worker, split_holdout
from edge_client.worker_client import RETRIES, WorkerClient, load_request
from shared.config import ComputeSection, SiteConfig, StateCodecName
from shared.errors import ConfigError, RefusedError, UnavailableError
from tests.helpers import run_async
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

FEDERATION = tiny.federation()
LONG = tiny.federation(training={"epochs": 1000})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a site's notes, other notes, and version 0 as a file."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ground")
    tiny.save_model(root / "model", "llama")
    tiny.write_conll(root / "site.conll", tiny.notes(10))
    tiny.write_conll(root / "other.conll", tiny.notes(4, seed=3))
    _, state = seal_plan(FEDERATION, root / "model")
    save_file(state, root / "v0.safetensors")
    _, bottom = seal_plan(tiny.federation(layers={"plan": "0,3"}), root / "model")
    save_file(bottom, root / "v0-bottom.safetensors")
    return root


def config(ground: Path, **data: object) -> SiteConfig:
    """A site's configuration; `data` changes its section on notes."""
    return SiteConfig.model_validate(
        {
            "name": "north",
            "federation": "unused.toml",
            "storage": tempfile.mkdtemp(dir=ground),
            "data": {"notes": ground / "site.conll", **data},
            "model_dir": ground / "model",
            "threads": 1,
        }
    )


def test_a_round_through_the_worker(ground: Path, tmp_path: Path) -> None:
    """Load, train, evaluate: the plan is that of the model, the delta a plain F32 file, the scores those of a state."""

    async def story() -> None:
        async with WorkerClient(config(ground, holdout=0.2), FEDERATION) as client:
            loaded = await client.load()
            plan, _ = seal_plan(FEDERATION, ground / "model")
            assert loaded.plan == plan
            assert (loaded.notes, loaded.held_out, loaded.skipped, loaded.uncached) == (8, 2, 0, "")
            assert loaded.examples == 8 * 5
            heard: list[float] = []
            trained = await client.train(
                ground / "v0.safetensors", 0, tmp_path / "delta", on_progress=lambda share, _: heard.append(share)
            )
            assert heard[-1] == 1.0
            assert trained.examples == 40
            assert set(trained.metrics) == {"loss", "steps", "seconds", "strict_f1", "lenient_f1"}
            delta = load_file(tmp_path / "delta")
            assert {name: array.shape for name, array in delta.items()} == plan.tensors
            assert all(array.dtype == np.float32 for array in delta.values())
            assert any(array.any() for array in delta.values())
            local = {name: array + delta[name] for name, array in load_file(ground / "v0.safetensors").items()}
            save_file(local, tmp_path / "local")
            before, after = [
                await client.evaluate(path, ground / "other.conll")
                for path in (ground / "v0.safetensors", tmp_path / "local")
            ]
            assert set(after.labels) == {"problem", "treatment", "test"}
            assert before != after
            own = await client.evaluate(tmp_path / "local")
            assert own.overall["strict_f1"] == pytest.approx(trained.metrics["strict_f1"])

    run_async(story(), timeout_s=100)


def test_it_gives_the_initial_tensors_and_the_whole_model_with_a_state(ground: Path, tmp_path: Path) -> None:
    """Version 0 comes out as sealing makes it, even after a training; the exported folder holds the state's tensors."""

    async def story() -> None:
        async with WorkerClient(config(ground), FEDERATION) as client:
            await client.train(ground / "v0.safetensors", 0, tmp_path / "delta")
            await client.load(initial=tmp_path / "initial")
            delta, initial = load_file(tmp_path / "delta"), load_file(tmp_path / "initial")
            assert {name: array.tobytes() for name, array in initial.items()} == {
                name: array.tobytes() for name, array in load_file(ground / "v0.safetensors").items()
            }
            save_file({name: array + delta[name] for name, array in initial.items()}, tmp_path / "local")
            await client.export(tmp_path / "local", tmp_path / "model")

    run_async(story(), timeout_s=100)
    exported = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").state_dict()
    for name, array in load_file(tmp_path / "local").items():
        assert np.array_equal(exported[name].numpy(), array), name


def test_what_stays_is_trained_on_from_update_to_update(ground: Path, tmp_path: Path) -> None:
    """The head comes in a file of its own, beside a delta without it; the next update goes on from there."""
    federation = tiny.federation(layers={"personal": ["score.*"]})
    _, state = seal_plan(federation, ground / "model")
    save_file(state, tmp_path / "v0")
    kept: list[Path | None] = [None]

    async def story() -> list[pipe.Trained]:
        async with WorkerClient(config(ground), federation, own=lambda: kept[0]) as client:
            first = await client.train(tmp_path / "v0", 0, tmp_path / "first")
            again = await client.train(tmp_path / "v0", 0, tmp_path / "again")
            kept[0] = first.own
            return [first, again, await client.train(tmp_path / "v0", 0, tmp_path / "second")]

    trained = run_async(story(), timeout_s=100)
    heads = [load_file(each.own)["score.weight"] for each in trained if each.own is not None]
    assert set(load_file(tmp_path / "first")) == set(state)
    assert np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])
    assert trained[2].metrics["loss"] < trained[0].metrics["loss"]


def test_a_worker_can_stand_back(ground: Path) -> None:
    """With a niceness the process runs at that priority, and a worker without one at that of its agent."""

    async def story() -> list[int]:
        async with (
            WorkerClient(config(ground), FEDERATION, niceness=7) as nice,
            WorkerClient(config(ground), FEDERATION) as plain,
        ):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(nice.load())
                tasks.create_task(plain.load())
            return [os.getpriority(os.PRIO_PROCESS, client.pid) for client in (nice, plain) if client.pid]

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert run_async(story(), timeout_s=100) == [7, own]


def test_one_process_serves_one_site_after_the_other(ground: Path, tmp_path: Path) -> None:
    """A worker that is given other notes trains as a fresh one would, in the process that it has."""
    other = config(ground, notes=ground / "other.conll")

    async def delta(client: WorkerClient, name: str) -> bytes:
        await client.train(ground / "v0.safetensors", 0, tmp_path / name)
        return (tmp_path / name).read_bytes()

    async def story() -> None:
        async with WorkerClient(other, FEDERATION) as fresh:
            wanted = await delta(fresh, "fresh")
        async with WorkerClient(config(ground), FEDERATION) as client:
            own, pid = await delta(client, "own"), client.pid
            client.serve(other)
            assert await delta(client, "other") == wanted != own
            assert client.pid == pid

    run_async(story(), timeout_s=100)


def test_a_killed_worker_starts_again_and_gives_the_same_delta(ground: Path, tmp_path: Path) -> None:
    """Killed (-9) in mid-training, the worker is started again, both log it, and the delta is the same."""
    # Long enough not to end before the first word of its progress has been read.
    federation = tiny.federation(layers={"plan": "0,3"}, training={"epochs": 30})

    async def story() -> list[MutableMapping[str, Any]]:
        async with WorkerClient(config(ground), federation) as client:
            await client.train(ground / "v0-bottom.safetensors", 3, tmp_path / "undisturbed")
            first = client.pid
            assert first is not None

            def kill_once(_share: float, _loss: float) -> None:
                if client.pid == first:
                    os.kill(first, signal.SIGKILL)

            with structlog.testing.capture_logs() as logs:
                await client.train(ground / "v0-bottom.safetensors", 3, tmp_path / "disturbed", on_progress=kill_once)
            return logs

    death, computes, notice = run_async(story(), timeout_s=100)
    assert (death["event"], death["during"], death["retries"]) == ("worker-died", "train", RETRIES)
    assert "SIGKILL" in death["cause"]
    assert (computes["event"], computes["device"], computes["precision"]) == ("computes", "cpu", "f32")
    assert "memory" in death["cause"]
    assert "batch_size" in death["hint"]
    assert (notice["event"], notice["log_level"]) == ("prefix-not-cached", "warning")
    assert (tmp_path / "undisturbed").read_bytes() == (tmp_path / "disturbed").read_bytes()


@pytest.mark.parametrize(
    ("script", "cause", "hint"),
    [
        ("kill -9 $$", "SIGKILL", "batch_size"),
        ("kill -15 $$", "SIGTERM", "the system's log"),
        ("exit 3", "status 3", "standard error"),
    ],
)
def test_a_worker_that_keeps_dying_is_given_up(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, cause: str, hint: str
) -> None:
    """After the last retry the error says how often and how the worker died, and what may help."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))

    async def story() -> None:
        async with WorkerClient(config(ground), FEDERATION) as client:
            await client.train(ground / "v0.safetensors", 0, tmp_path / "delta")

    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(UnavailableError, match=f"died {RETRIES + 1} times over one train") as caught,
    ):
        run_async(story())
    assert [entry["retries"] for entry in logs] == list(range(RETRIES, -1, -1))
    assert cause in caught.value.message
    assert hint in caught.value.hint


def test_a_cancelled_training_ends_the_worker(ground: Path, tmp_path: Path) -> None:
    """Cancelling kills the process at once and leaves no file; the client is then as before its first request."""

    async def story() -> None:
        async with WorkerClient(config(ground), LONG) as client:
            begun = asyncio.Event()
            task = asyncio.create_task(
                client.train(ground / "v0.safetensors", 0, tmp_path / "delta", on_progress=lambda *_: begun.set())
            )
            task.add_done_callback(lambda _: begun.set())
            await begun.wait()
            pid = client.pid
            assert pid is not None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            assert client.pid is None

    run_async(story(), timeout_s=100)
    assert list(tmp_path.iterdir()) == []


def test_errors_cross_the_pipe_as_what_they_are(ground: Path, tmp_path: Path) -> None:
    """What model, notes and states get wrong is raised here in its own family, with rule and hint; the worker lives."""
    save_file({"score.bias": np.zeros(7, np.float32)}, tmp_path / "wrong")
    (tmp_path / "garbage").write_bytes(b"\xff" * 40)
    later = config(ground).model_copy(update={"model_dir": tmp_path / "model"})

    async def story() -> None:
        async with WorkerClient(later, FEDERATION) as client:
            for request in (client.load(), client.evaluate(ground / "v0.safetensors")):
                with pytest.raises(ConfigError, match="model: no such folder"):
                    await request
            pid = client.pid
            shutil.copytree(ground / "model", tmp_path / "model")
            with pytest.raises(RefusedError, match="lacks tensor model") as shape:
                await client.train(tmp_path / "wrong", 0, tmp_path / "delta")
            assert (shape.value.rule, shape.value.hint != "") == ("state-shape", True)
            with pytest.raises(RefusedError) as refused:
                await client.evaluate(tmp_path / "garbage")
            assert refused.value.rule.startswith("header-")
            with pytest.raises(UnavailableError, match="cannot be read"):
                await client.evaluate(tmp_path / "nowhere")
            with pytest.raises(RefusedError, match=r"nothing.conll does not exist"):
                await client.evaluate(ground / "v0.safetensors", ground / "nothing.conll")
            assert client.pid == pid

    run_async(story(), timeout_s=100)


def test_the_worker_does_not_outlive_its_agent(ground: Path) -> None:
    """When standard input closes in the middle of a training, the process leaves at once, without an error."""
    job = pipe.Load(
        federation=LONG,
        source=str(ground / "model"),
        notes=ground / "site.conll",
        skip_bad=False,
        holdout=0.0,
        threads=1,
        site="north",
    )
    train = pipe.Train(state=ground / "v0.safetensors", base_version=0, out=ground / "never")
    with subprocess.Popen(
        [sys.executable, "-m", "edge_client.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pipe.pack(job) + pipe.pack(train))
        process.stdin.flush()
        kind = ""
        while kind not in {"progress", "failed"}:
            (length,) = pipe.LENGTH.unpack(process.stdout.read(pipe.LENGTH.size))
            kind = pipe.unpack_answer(process.stdout.read(length)).kind
        process.stdin.close()
        assert process.wait(timeout=10) == 0
    assert kind == "progress"
    assert not (ground / "never").exists()


def test_running_out_of_memory_is_told(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that fails inside training comes back as unavailable, with what to lower; a bug does not."""

    def greedy(*_: object, **__: object) -> None:
        torch.empty(1 << 50)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    request = pipe.Evaluate(state=ground / "v0.safetensors", notes=None)
    monkeypatch.setattr(Worker, "_evaluate", greedy)
    answer = Worker(lambda _: None).handle(request)
    assert isinstance(answer, pipe.Failed)
    assert (answer.error, "training.batch_size" in answer.hint) == ("UnavailableError", True)
    monkeypatch.setattr(Worker, "_evaluate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        Worker(lambda _: None).handle(request)


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(10, 0.2, 2), (10, 0.0, 0), (10, 0.01, 1), (10, 0.99, 9), (2, 0.9, 1), (1, 0.5, 0)]
)
def test_the_holdout_is_a_share_and_never_all(count: int, share: float, held_out: int) -> None:
    """At least one note is held out and at least one trained on, where there are two."""
    notes = tiny.notes(count)
    kept, away = split_holdout(notes, share, 7)
    assert len(away) == held_out
    assert sorted([*kept, *away], key=lambda note: note.id) == list(notes)


def test_the_holdout_stays_the_same() -> None:
    """Which notes are held out depends on seed and ids alone, neither on their order nor on the others."""
    notes = tiny.notes(20)
    away = {note.id for note in split_holdout(notes, 0.3, 7)[1]}
    assert {note.id for note in split_holdout(notes[::-1], 0.3, 7)[1]} == away
    assert {note.id for note in split_holdout(notes, 0.3, 8)[1]} != away


@pytest.mark.parametrize("name", get_args(StateCodecName))
def test_a_state_of_any_codec_is_read(tmp_path: Path, name: str) -> None:
    """States travel in the federation's codec; the worker tells it from the file."""
    from shared.codec import codec_named, encode_file

    values = np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30)
    tensors = {"a.weight": values, "b": values[0]}
    (tmp_path / "state").write_bytes(b"".join(encode_file(tensors, codec_named(name), {})))
    state = read_state(tmp_path / "state")
    assert list(state) == ["a.weight", "b"]
    np.testing.assert_allclose(state["a.weight"], values, atol=0.08 if name == "int4" else 5e-3)
    assert state["a.weight"].shape == values.shape


def test_a_state_is_decoded_a_tensor_at_a_time(tmp_path: Path) -> None:
    """Nothing is kept of what was looked up, no shape is decoded for, and what stays at the site lies beside it."""
    save_file({"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.float32)}, tmp_path / "state")
    state, own = read_state(tmp_path / "state"), {"own": np.full(5, 2, np.float32)}
    whole = state.beside(own)
    assert list(whole) == ["a", "b", "own"]
    assert shapes_of(whole) == {"a": (4,), "b": (2, 3), "own": (5,)} == shapes_of(dict(whole))
    assert (whole["b"] == 1).all()
    assert (whole["own"] == 2).all()
    first = state["b"]
    first[:] = 9
    assert (state["b"] == 1).all()
    unread = Tensors({"a": (4,)}, lambda _name: pytest.fail("it was decoded"))
    assert "a" in unread
    assert "b" not in unread
    assert shapes_of(unread.beside(own)) == {"a": (4,), "own": (5,)}


def test_a_file_of_no_codec_is_refused(tmp_path: Path) -> None:
    """Tensors of a type that no codec writes are refused with the rule."""
    save_file({"a": np.zeros(3, np.int8)}, tmp_path / "state")
    with pytest.raises(RefusedError) as caught:
        read_state(tmp_path / "state")
    assert caught.value.rule == "codec-parts"


def test_the_agents_side_does_not_import_torch() -> None:
    """The agent's process stays small: its half of the worker needs neither torch nor transformers."""
    code = "import sys, edge_client.worker_client; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert worker.LESS_MEMORY


def test_the_loss_of_a_state_is_that_of_the_notes_it_would_train_on(ground: Path, tmp_path: Path) -> None:
    """It falls with training, is the same after the worker was killed, and NaN for weights that overflow."""

    async def story() -> None:
        async with WorkerClient(config(ground, holdout=0.0), tiny.federation(training={"epochs": 8})) as client:
            before = await client.loss(ground / "v0.safetensors")
            await client.train(ground / "v0.safetensors", 0, tmp_path / "delta")
            initial, delta = load_file(ground / "v0.safetensors"), load_file(tmp_path / "delta")
            save_file({name: values + delta[name] for name, values in initial.items()}, tmp_path / "local")
            after = await client.loss(tmp_path / "local")
            assert 0 < after < before
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            assert await client.loss(tmp_path / "local") == after
            save_file({name: np.full_like(values, 1e19) for name, values in initial.items()}, tmp_path / "broken")
            assert np.isnan(await client.loss(tmp_path / "broken"))

    run_async(story(), timeout_s=100)


def test_who_only_measures_spends_nobodys_privacy(ground: Path) -> None:
    """In a private federation the loss of a state is the plain one, over all notes, and no records are drawn."""
    private = tiny.federation(privacy={"delta": 1e-5, "noise_multiplier": 1.0})
    told: list[float] = []

    async def story() -> None:
        for federation, trains in ((FEDERATION, True), (private, False)):
            async with WorkerClient(config(ground, holdout=0.0), federation, trains=trains) as client:
                told.append(await client.loss(ground / "v0.safetensors"))

    run_async(story(), timeout_s=100)
    assert told[0] == told[1]
    worker = Worker(lambda _answer: None)
    site = config(ground, holdout=0.0)
    source = {"source": str(ground / "model"), "notes": site.data.notes, "skip_bad": False, "holdout": 0.0}
    worker.handle(pipe.Load(federation=private, **source, threads=1, site="north", trains=False))  # type: ignore[arg-type]
    assert worker._private is None


def test_a_worker_trains_where_the_site_s_file_says(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 where that is asked for; for a GPU that is not there the processor never takes its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = config(ground).model_copy(update={"training": ComputeSection(precision="bf16")})
    used = Worker(lambda _: None)
    assert isinstance(used.handle(load_request(asked, FEDERATION)), pipe.Loaded)
    assert used._loaded.device == Device(torch.device("cpu"), "bf16")
    elsewhere = asked.model_copy(update={"training": ComputeSection(device="cuda")})
    answer = used.handle(load_request(elsewhere, FEDERATION))
    assert isinstance(answer, pipe.Failed)
    assert (answer.error, 'device = "cuda"' in answer.message) == ("ConfigError", True)
