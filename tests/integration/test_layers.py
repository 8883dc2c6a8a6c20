"""What is trained, by name from federation.toml, in real runs over a real Mosquitto with a tiny real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_client import depth
from mailboat import cli, console
from shared.manifest import IMPORTANCE
from shared.plan import Blocks, blocks_from
from shared.selection import best
from shared.store import FrameStore
from tests.tiny_run import metrics_of, run_tiny, updates_of, write_tiny

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("plan", "blocks"),
    [
        ("top:0.5", {2, 3}),
        ("bottom:2", {0, 1}),
        ("middle:2", {1, 2}),
        ("random:2", {1, 3}),
        ("0,2", {0, 2}),
        ("all", {0, 1, 2, 3}),
    ],
)
def test_a_plan_runs_by_its_name(plan: str, blocks: set[int], tmp_path: Path, mosquitto_url: str) -> None:
    """Each site's updates hold the plan's blocks and the head, and no other block."""
    write_tiny(tmp_path, mosquitto_url, federation=f'[layers]\nplan = "{plan}"\n')
    found = run_tiny(tmp_path)
    assert {loaded.plan.layers for loaded in found.values()} == {tuple(sorted(blocks))}
    updates = updates_of(tmp_path)
    assert set(updates) == {(site, version) for site in ("site-1", "site-2") for version in (0, 1)}
    for tensors in updates.values():
        assert _blocks(tensors) == blocks
        assert "score.weight" in tensors
        assert ("model.embed_tokens.weight" in tensors) == (plan == "all")


@pytest.mark.parametrize(
    ("first", "second", "missing"),
    [(("at_most", 1), ("upload_mib", 0.02), "omit"), (("memory_mib", 1.1), ("seconds", 2.5), "zero")],
    ids=["counted", "measured"],
)
def test_sites_train_to_different_depths(
    first: tuple[str, float],
    second: tuple[str, float],
    missing: str,
    tmp_path: Path,
    mosquitto_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each says what it trains by what its updates hold; a tensor's mean is over those who have it, or over all three.

    A replay agrees. Of the three planned blocks site-1 may train one, and site-2 two. What a machine takes is not for a
    test to say: the process counts as if it had no memory but what training adds to it (about 0.8, 1.5 and 2.2 MiB for
    one to three blocks), and the clock as if an update took a second for each block.
    """
    monkeypatch.setattr(depth, "_held_bytes", lambda _device: 0)
    monkeypatch.setattr(depth, "_seconds", lambda loaded, _data, _training: float(len(loaded.here)))
    limits = {site: f"[layers]\n{key} = {value}\n" for site, (key, value) in (("site-1", first), ("site-2", second))}
    federation = f'missing = "{missing}"\n[layers]\nplan = "top:3"\n'
    write_tiny(tmp_path, mosquitto_url, sites=3, federation=federation, locals_=limits)
    found = run_tiny(tmp_path, sites=3)
    assert {site: (loaded.depth, loaded.limit) for site, loaded in found.items()} == {
        "site-1": (1, first[0]),
        "site-2": (2, second[0]),
        "site-3": (3, ""),
    }
    said = metrics_of(tmp_path)
    assert [said[site, 0].get("blocks") for site in ("site-1", "site-2", "site-3")] == [1.0, 2.0, None]
    updates = updates_of(tmp_path)
    assert [_blocks(updates[site, 1]) for site in ("site-1", "site-2", "site-3")] == [{3}, {2, 3}, {1, 2, 3}]
    masters = [load_file(tmp_path / "coordinator" / "masters" / f"v{n:08d}.safetensors") for n in (0, 1)]
    for name, before in masters[0].items():
        holders = [updates[site, 0][name] for site in ("site-1", "site-2", "site-3") if name in updates[site, 0]]
        assert len(holders) == {"1": 1, "2": 2}.get(name.split(".")[2] if ".layers." in name else "", 3)
        mean = np.sum(holders, axis=0) / (len(holders) if missing == "omit" else 3)
        np.testing.assert_allclose(masters[1][name], before + mean, rtol=1e-5, atol=1e-7)
    capsys.readouterr()
    config = str(tmp_path / "coordinator.toml")
    assert console.run(lambda: cli.app(["audit", "verify", "-c", config])) == 0
    assert console.run(lambda: cli.app(["audit", "replay", "-c", config])) == 0
    assert console.run(lambda: cli.app(["status", "-c", config, "--json"])) == 0
    told = capsys.readouterr().out
    status = json.loads(told[told.index("{") :])
    assert [site["blocks"] for site in status["sites"]] == [1, 2, None]


@pytest.mark.parametrize("mode", ["sync", "fedasync"])
def test_the_proximal_term_runs_by_its_name(mode: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Under a strong pull an update of more than one step is shorter than the same one without it."""
    lengths = []
    for mu in (0.0, 50.0):
        root = tmp_path / f"mu-{mu:g}"
        root.mkdir()
        training = f"[training]\nepochs = 4\nbatch_size = 4\nlr = 0.005\nproximal = {mu}\n"
        write_tiny(root, mosquitto_url, sites=1, mode=mode, federation=f'[layers]\nplan = "top:2"\n{training}')
        run_tiny(root, sites=1)
        first = updates_of(root)["site-1", 0]
        lengths.append(sum(float(np.square(values).sum()) for values in first.values()))
    assert 0 < lengths[1] < 0.5 * lengths[0]


@pytest.mark.parametrize(
    ("by", "mode", "codec", "rechoose"),
    [
        ("gradient-norm", "sync", 'down = "f32"', 2),
        ("gradient-norm", "sync", 'down = "f32"', 0),
        ("relative-gradient-norm", "fedbuff", 'down = "f32"', 2),
        ("snr", "sync", 'down = "int8"\nsteps = 2', 2),
    ],
)
def test_all_sites_train_what_matters_most(
    by: str,
    mode: str,
    codec: str,
    rechoose: int,
    tmp_path: Path,
    mosquitto_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each site measures on version 0, and again on version 2 or never, and trains its own choice, then that of all.

    The choice is made from what the updates told, stands in the state's header, and in that of a step to it, and comes
    out the same in a replay.
    """
    layers = f'[layers]\nplan = "importance:2"\namong = "top:3"\nby = "{by}"\nrechoose = {rechoose}\n'
    write_tiny(
        tmp_path, mosquitto_url, mode=mode, versions=3, codec=codec, federation=f"{layers}[training]\nlr = 0.01\n"
    )
    run_tiny(tmp_path)
    updates, said = updates_of(tmp_path), metrics_of(tmp_path)
    held = {key: tuple(sorted(_blocks(tensors))) for key, tensors in updates.items()}
    scores = {key: {name for name in told if name.startswith(IMPORTANCE)} for key, told in said.items()}
    chosen = _chosen(tmp_path)
    assert chosen[0] is None
    for (site, version), blocks in held.items():
        assert len(scores[site, version]) == (3 if version in {0, rechoose} else 0)
        own = best([(1.0, said[site, version])], (1, 2, 3), 2)
        assert blocks == (own if version == 0 else chosen[version])
    assert chosen[1] == best([(35.0, said["site-1", 0]), (35.0, said["site-2", 0])], (1, 2, 3), 2)
    assert chosen[2] == chosen[1]
    if rechoose:
        votes = [(35.0, said[site, 2]) for site in ("site-1", "site-2")]
        assert chosen[3] == best(votes, (1, 2, 3), 2)
    else:
        assert chosen[3] == chosen[1]
    config = str(tmp_path / "coordinator.toml")
    assert console.run(lambda: cli.app(["audit", "replay", "-c", config])) == 0
    capsys.readouterr()
    assert console.run(lambda: cli.app(["status", "-c", config])) == 0
    assert chosen[3] is not None
    assert f"blocks      {', '.join(map(str, chosen[3]))}, chosen by importance" in capsys.readouterr().out
    # The choice survives what led to it: a replay that begins with version 2 knows its blocks.
    assert console.run(lambda: cli.app(["coordinator", "prune", "-c", config, "--yes"])) == 0
    assert console.run(lambda: cli.app(["audit", "replay", "-c", config, "--all"])) == 0


def _blocks(tensors: dict[str, np.ndarray]) -> set[int]:
    return {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}


def _chosen(root: Path) -> list[Blocks | None]:
    """What each version's state says of the blocks to train."""
    store, found = FrameStore(root / "coordinator" / "states"), dict[int, Blocks | None]()
    for each in store.ids():
        stored = store.get(each)
        assert stored is not None
        with stored.open_tensors(verify=True) as reader:
            found[stored.manifest.version] = blocks_from(reader.header.metadata)
    return [found[version] for version in sorted(found)]
