"""A run over a real Mosquitto in which old updates are given up while the coordinator is stopped, and which goes on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from coordinator.records import Pruned, VersionCommitted
from tests.commands import call, refused
from tests.helpers import run_async, until
from tests.toys import RandomTrainer, toy_coordinator, toy_records, toy_site, write_toy

VERSIONS = 6


def newest(root: Path) -> int:
    """The newest version in the journal below `root`, which may not be there yet."""
    records = toy_records(root) if (root / "coordinator" / "journal.sqlite").exists() else []
    return max((each.version for each in records if isinstance(each, VersionCommitted)), default=0)


@pytest.mark.parametrize(("codec", "steps", "mode"), [("f32", 0, "sync"), ("int8", 4, "sync"), ("int8", 5, "fedasync")])
def test_a_run_goes_on_without_its_old_updates_and_is_proven(
    codec: str, steps: int, mode: str, tmp_path: Path, mosquitto_url: str
) -> None:
    """The master that stands in for them stays; the rest is computed again from there, here and by an outsider.

    Where versions travel as steps, all of them stay: what is computed again begins with one of them.
    """
    write_toy(
        tmp_path, mosquitto_url, sites=2, versions=VERSIONS, quorum=2, mode=mode, codec=codec, steps=steps, sealed=True
    )

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            sites = [
                group.create_task(
                    toy_site(tmp_path / f"site-{number}.toml", trainer=RandomTrainer(number, seconds=0.3))
                )
                for number in (1, 2)
            ]
            first = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            await until(lambda: newest(tmp_path) >= 3)
            first.cancel()
            await asyncio.wait([first])
            pruned = await asyncio.to_thread(call, tmp_path, "coordinator", "prune", "--yes")
            assert pruned.returncode == 0, pruned.stderr
            assert not any(site.done() for site in sites)
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))

    run_async(everybody(), timeout_s=100)
    records = toy_records(tmp_path)
    (pruned,) = (record for record in records if isinstance(record, Pruned))
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [version.version for version in versions] == list(range(1, VERSIONS + 1))
    here = {path.stem for path in (tmp_path / "coordinator" / "updates").glob("*.frames")}
    assert here == {part.update_id for each in versions if each.version > pruned.version for part in each.contributions}
    assert (tmp_path / "coordinator" / "masters" / f"v{pruned.version:08d}.safetensors").exists()

    receipts = [word for number in (1, 2) for word in ("--receipts", f"site-{number}/receipts")]
    verified = call(tmp_path, "audit", "verify", *receipts, "--json")
    assert verified.returncode == 0, verified.stdout
    assert "given up" in json.loads(verified.stdout)["pruned"][0]
    replayed = call(tmp_path, "audit", "replay", "--all")
    assert replayed.returncode == 0, replayed.stderr
    assert replayed.stdout.count("the same, bit for bit") == VERSIONS - pruned.version + 1
    assert call(tmp_path, "audit", "export", "--out", "run.tar").returncode == 0
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    script = [sys.executable, "-I", str(tmp_path / f"toy-v{VERSIONS:08d}" / "verify.py")]
    outside = subprocess.run(script, capture_output=True, text=True, check=False, cwd="/")
    assert outside.returncode == 0, outside.stdout
    merged = versions[0].contributions[0].update_id
    shown = call(tmp_path, "audit", "show", merged)
    assert "into version 1" in shown.stdout
    assert "are not kept" in refused(tmp_path, "audit", "show", merged, "--extract", "delta.safetensors", status=2)
    assert "updates merged up to version" in call(tmp_path, "audit", "tail").stdout
    assert call(tmp_path, "coordinator", "fsck").returncode == 0
