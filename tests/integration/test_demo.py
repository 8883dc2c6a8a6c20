from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from coordinator.views import load_run
from edge_client.worker_client import WorkerClient
from mailboat.demo.live import Lines
from mailboat.demo.plan import DemoOptions, Plan, make_plan
from mailboat.demo.report import Result, to_json
from mailboat.demo.run import _Demonstration, run_demo
from mailboat.flaky import Conditions, FlakyProxy
from mailboat.modelling import score_model
from shared.config import ComputeSection
from shared.errors import UnavailableError
from tests.audited import spoilt
from tests.commands import Running, call, running
from tests.helpers import run_async
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

RUN_S = 540.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA that reads windows as long as the demonstration's."""
    folder = tiny.save_model(tmp_path_factory.mktemp("model"), "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


def small(tmp_path: Path, model: Path, **changes: object) -> Plan:
    """A demonstration of few notes on a tiny model."""
    options = DemoOptions(
        workdir=tmp_path / "run", model=str(model), layers="2", sites=2, versions=2, notes=4, heldout=4
    )
    return make_plan(dataclasses.replace(options, **changes))  # type: ignore[arg-type]


def run(plan: Plan) -> tuple[Result, str]:
    """The result, and the lines that were shown on the way."""
    out = io.StringIO()
    return run_async(run_demo(plan, Lines(Console(file=out))), timeout_s=RUN_S), out.getvalue()


def exported_scores(plan: Plan) -> Mapping[str, float]:
    """What the exported model gets on the held-out notes."""
    layout, compute = plan.layout, ComputeSection(device="cpu")
    return score_model(layout.export, plan.federation, layout.heldout, compute=compute, skip_bad=False).scores.overall


def children_of(pid: int) -> dict[int, str]:
    """Command lines of all living descendants, by process id; one may end while we look."""
    found: dict[int, str] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= {int(each): Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()}
            found |= children_of(int(each))
    return found


def gone(pids: list[int], timeout_s: float = 60.0) -> bool:
    """Whether none of the processes lives any more."""
    until = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_whole_run_with_baselines_and_a_site_that_never_comes(tmp_path: Path, model: Path) -> None:
    """Every version is scored, each update counted once, and the exported model has the F1 that was reported."""
    plan = small(tmp_path, model, sites=3, absent=1)
    result, lines = run(plan)
    told = to_json(result)
    assert [version["version"] for version in told["versions"]] == [0, 1, 2]
    parts = [part["update_id"] for version in told["versions"] for part in version["contributions"]]
    assert len(parts) == len(set(parts)) == 4
    assert told["local_only"].keys() == {"site-1", "site-2"}
    assert result.centralized is not None
    assert told["broker"]["kind"] in {"mosquitto", "amqtt"}
    assert 0 < told["bytes"]["saving"] < 1
    assert (told["bytes"]["uplink_transfers"], told["bytes"]["downlink_transfers"]) == (4, 6)
    assert told["bytes"]["full_model_file"] > 4 * told["total_parameters"]
    assert load_run(plan.layout.storage).current.state.file_digest == told["versions"][2]["state_digest"]
    exported = exported_scores(plan)
    assert exported == pytest.approx(result.federated.measures, abs=1e-9)
    assert plan.layout.plot.read_bytes().startswith(b"\x89PNG")
    for expected in ("version 2 published", "the run is complete", "centralized: strict F1", "site-2 alone: strict F1"):
        assert expected in lines
    assert "site-3: connected" not in lines


def test_stays_and_their_codes_are_a_task_by_name(tmp_path: Path, model: Path) -> None:
    """With another task the same run ends with that task's measures, for baselines and the exported model too."""
    plan = small(tmp_path, model, task="multilabel")
    result, lines = run(plan)
    assert list(result.federated.measures) == ["micro_f1", "macro_f1"]
    assert result.local_only.keys() == {"site-1", "site-2"}
    assert result.centralized is not None
    exported = exported_scores(plan)
    assert exported == pytest.approx(result.federated.measures, abs=1e-9)
    assert "version 2: micro F1 " in lines
    assert plan.layout.plot.read_bytes().startswith(b"\x89PNG")


def test_adapters_are_trained_when_asked_for(tmp_path: Path, model: Path) -> None:
    """With --adapter the same run sends adapters, trains baselines of them, and exports the whole model at the end."""
    plan = small(tmp_path, model, adapter="fedex-lora")
    result, lines = run(plan)
    assert "fedex-lora of rank 16" in lines
    assert "go to the sites with each version, not back" in lines
    assert result.centralized is not None
    exported = exported_scores(plan)
    assert exported == pytest.approx(result.federated.measures, abs=1e-9)


def test_cut_links_and_a_killed_site_change_nothing_but_the_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --flaky the run ends, the site was killed, and each update is counted once.

    A fresh process computes the same versions again, bit for bit, and a bit that is turned over is found and located.
    The links, which run in this process, are slow besides: no version comes between two looks at so small a run.
    """
    slow = functools.partial(FlakyProxy, conditions=Conditions(latency_s=0.05))
    monkeypatch.setattr("mailboat.demo.run.FlakyProxy", slow)
    plan = small(tmp_path, model, mode="fedbuff", flaky=True, versions=6, baselines=False)
    result, lines = run(plan)
    assert "killed with SIGKILL" in lines
    parts = [part.update_id for version in result.facts.versions for part in version.contributions]
    assert result.facts.version == 6
    assert len(parts) == len(set(parts))
    replayed = call(plan.layout.root, "audit", "replay", "--all", timeout_s=300)
    assert replayed.returncode == 0, replayed.stderr
    assert [line.partition("  ")[0] for line in replayed.stdout.splitlines()] == [f"version {v} of 6" for v in range(7)]
    assert replayed.stdout.count("the same, bit for bit") == 7
    assert call(plan.layout.root, "audit", "verify").returncode == 0
    merged = result.facts.versions[3].contributions[0].update_id
    for name, where in ((f"updates/{merged}.frames", "frame 0"), (f"updates/{merged}.manifest", "manifest")):
        with spoilt(plan.layout.storage / name, 8 * 40):
            verified = call(plan.layout.root, "audit", "verify")
            assert verified.returncode == 3
            assert name in verified.stdout
            assert where in verified.stdout


def test_a_run_that_takes_too_long_is_given_up_and_says_where_it_stood(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline names the step, here one that has no end; nothing is left running."""

    async def never(_run: _Demonstration, worker: WorkerClient) -> None:
        await worker.load()
        await asyncio.Event().wait()

    monkeypatch.setattr(_Demonstration, "_seal", never)
    with pytest.raises(UnavailableError, match="did not end within 8 s: resolving the plan") as caught:
        run(small(tmp_path, model, deadline_s=8.0))
    assert str(tmp_path / "run" / "logs") in caught.value.hint
    assert not [command for command in children_of(os.getpid()).values() if str(tmp_path) in command]


def begun(demo: Running) -> dict[int, str]:
    """Processes of a demonstration in which the federated part has begun."""
    demo.wait_for("== federated training", timeout_s=120)
    until = time.monotonic() + 20
    while not any("site run" in command for command in children_of(demo.process.pid).values()):
        assert time.monotonic() < until, "no site was started"
        time.sleep(0.05)
    return children_of(demo.process.pid)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=str)
def test_nothing_outlives_the_demonstration(tmp_path: Path, model: Path, how: signal.Signals, status: int) -> None:
    """Ctrl-C and even SIGKILL take every process along: broker, coordinator, sites and workers."""
    with running(tmp_path, "demo", "--workdir", "run", "--model", str(model), "--layers", "2", "--notes", "4") as demo:
        pids = begun(demo)
        assert demo.end(how) == status
        assert gone(list(pids)), pids
        assert "Traceback" not in demo.text()


def test_sigterm_is_no_good_end(tmp_path: Path, model: Path) -> None:
    """Told to stop, the demonstration cleans up, and its status does not say that it ended well."""
    with running(tmp_path, "demo", "--workdir", "run", "--model", str(model)) as demo:
        demo.wait_for("== resolving the plan")
        pids = children_of(demo.process.pid)
        assert demo.end(signal.SIGTERM) == 143
        assert gone(list(pids)), pids


def test_a_coordinator_that_dies_is_named(tmp_path: Path, model: Path) -> None:
    """Status 4, one line that names the process and its log, and nothing left running."""
    with running(tmp_path, "demo", "--workdir", "run", "--model", str(model), "--layers", "2", "--notes", "4") as demo:
        pids = begun(demo)
        (coordinator,) = [pid for pid, command in pids.items() if "coordinator run" in command]
        os.kill(coordinator, signal.SIGKILL)
        assert demo.process.wait(60) == 4
        assert "error: coordinator was ended by SIGKILL" in demo.text()
        assert "logs/coordinator.log" in demo.text()
        assert gone(list(pids)), pids


def test_a_plan_that_does_not_fit_the_model_ends_with_status_2(tmp_path: Path, model: Path) -> None:
    """The sealing process's own words reach the person, with the status of a wrong configuration."""
    with running(tmp_path, "demo", "--workdir", "run", "--model", str(model), "--layers", "9", "--notes", "4") as demo:
        assert demo.process.wait(120) == 2
        assert "error: " in demo.text()
        assert "Traceback" not in demo.text()
