"""Every rule of merging, by name from federation.toml, over a real Mosquitto; and each run recomputed bit for bit."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.proof import prove
from coordinator.records import Rejected, Substituted, Validated, VersionCommitted
from coordinator.replay import replay
from coordinator.validation import Validator
from shared.config import FederationConfig, MergeRule, Quality, ServerOptimizerName, StalenessKind
from shared.configfile import load_config
from shared.errors import ConfigError
from shared.plan import load_plan
from tests.commands import call
from tests.helpers import run_async
from tests.toys import INITIAL, ToyValidator, toy_coordinator, toy_records, toy_site, write_toy

STEPS = (1.0, 1.25, 1.5, 1.75, 10.0)
"""What each site adds to every value; the last one is far off."""
FEW = 2_000
"""Values: enough for several chunks."""

SERVERS = get_args(ServerOptimizerName)
RULES = get_args(MergeRule)
QUALITIES = tuple(name for name in get_args(Quality) if name != "none")
STALENESS = get_args(StalenessKind)


def begun(root: Path, url: str, extra: str, *, sites: int = 3, mode: str = "sync", versions: int = 2) -> None:
    """The files of a small run."""
    write_toy(
        root,
        url,
        sites=sites,
        versions=versions,
        quorum=sites,
        mode=mode,
        parameters=FEW,
        slice_kib=4,
        extra=extra,
    )


def run(root: Path, *, sites: int = 3, validator: Validator | None = None) -> list[VersionCommitted]:
    """Run it to its end and return its versions, all of them proven and made again without a difference."""

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(root / "coordinator.toml", validator))
            for number in range(1, sites + 1):
                group.create_task(toy_site(root / f"site-{number}.toml", step=STEPS[number - 1], examples=number))

    run_async(everybody(), timeout_s=60)
    federation = load_config(root / "federation.toml", FederationConfig)
    storage = root / "coordinator"
    plan = load_plan(storage / "plan.json", federation)
    assert prove(storage, federation, plan).findings == ()
    scratch = root / "scratch"
    scratch.mkdir()
    assert [made.differences for made in replay(storage, federation, plan, scratch)] == [()] * (
        federation.federation.versions + 1
    )
    return [record for record in toy_records(root) if isinstance(record, VersionCommitted)]


def first_value(root: Path, version: int) -> float:
    """Of the master."""
    return float(load_file(root / "coordinator" / "masters" / f"v{version:08d}.safetensors")["a.weight"][0])


def weights(version: VersionCommitted) -> dict[str, float]:
    """By site."""
    return {part.site: part.weight for part in version.contributions}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_by_its_name(rule: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Five sites, one far off, two versions: those rules that trust nobody stay near the four."""
    begun(tmp_path, mosquitto_url, f'rule = "{rule}"\n', sites=5)
    versions = run(tmp_path, sites=5)
    assert [list(weights(version)) for version in versions] == [[f"site-{number}" for number in range(1, 6)]] * 2
    moved = first_value(tmp_path, 2) - INITIAL
    trusting = {"mean": 2 * (1 + 2.5 + 4.5 + 7 + 50) / 15, "ca2fl": 2 * 15.5 / 5}
    if rule in trusting:
        assert moved == pytest.approx(trusting[rule], rel=0.02)
    else:
        assert 2 <= moved <= 3.5
    if rule == "krum":
        assert [sorted(weights(version).values()) for version in versions] == [[0, 0, 0, 0, 1]] * 2
        left_out = versions[1].contributions[4].update_id
        shown = call(tmp_path, "audit", "show", left_out).stdout
        assert "with version 2, which left it out, late by 0, weight 0" in shown
    if rule == "multi-krum":
        assert [weights(version)["site-5"] for version in versions] == [0, 0]


def test_krum_of_too_few_is_told(tmp_path: Path, mosquitto_url: str) -> None:
    """Three sites: each version has its row before it, and is the median of what they added."""
    begun(tmp_path, mosquitto_url, 'rule = "krum"\n')
    run(tmp_path)
    told = [record for record in toy_records(tmp_path) if isinstance(record, Substituted)]
    assert [(each.version, each.rule, each.updates, each.needed) for each in told] == [
        (version, "median", 3, 5) for version in (1, 2)
    ]
    assert first_value(tmp_path, 2) == pytest.approx(INITIAL + 2 * STEPS[1], rel=0.02)


@pytest.mark.parametrize("server", SERVERS)
def test_every_server_optimizer_runs_by_its_name(server: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Three versions of buffers of two, some of them late."""
    begun(tmp_path, mosquitto_url, f'[aggregation.server]\noptimizer = "{server}"\n', mode="fedbuff", versions=3)
    assert len(run(tmp_path)) == 3
    assert first_value(tmp_path, 3) > INITIAL


@pytest.mark.parametrize("mode", ["fedbuff", "fedasync"])
@pytest.mark.parametrize("kind", STALENESS)
def test_every_staleness_function_runs_by_its_name(kind: str, mode: str, tmp_path: Path, mosquitto_url: str) -> None:
    """In both modes in which updates come late as a rule."""
    extra = f'[aggregation.staleness]\nkind = "{kind}"\n'
    begun(tmp_path, mosquitto_url, extra, mode=mode, versions=4, sites=2)
    assert len(run(tmp_path, sites=2)) == 4


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_runs_by_its_name(quality: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Each update's loss stands in a row of its own beside its acceptance, and the weights of a version follow from it.

    The ideal is what the second site comes to first, so its loss is 0 and the others' 0.25.
    """
    begun(tmp_path, mosquitto_url, f'quality = "{quality}"\ntemperature = 0.5\n', versions=1)
    (version,) = run(tmp_path, validator=ToyValidator(ideal=INITIAL + STEPS[1]))
    losses = {record.update_id: record.loss for record in toy_records(tmp_path) if isinstance(record, Validated)}
    measured = {part.site: losses[part.update_id] for part in version.contributions}
    assert measured == pytest.approx({"site-1": 0.25, "site-2": 0.0, "site-3": 0.25}, abs=0.02)
    shares = {
        "exp-loss": [math.exp(1 - measured[f"site-{number}"]) for number in (1, 2, 3)],
        "size-exp-loss": [number * math.exp(-measured[f"site-{number}"] / 0.5) for number in (1, 2, 3)],
    }[quality]
    assert list(weights(version).values()) == pytest.approx([share / sum(shares) for share in shares], rel=1e-12)


def test_a_loss_that_is_no_number_keeps_its_update_out(tmp_path: Path, mosquitto_url: str) -> None:
    """One site's model cannot be measured: its update is rejected by rule, and the others' make the version."""

    class Broken(ToyValidator):
        async def loss(self, state: Path) -> float:
            return math.nan if load_file(state)["a.weight"][0] > 2.4 else await super().loss(state)

    begun(tmp_path, mosquitto_url, 'quality = "exp-loss"\n', versions=1)
    (version,) = run(tmp_path, validator=Broken(ideal=0.0))
    assert set(weights(version)) == {"site-1", "site-2"}
    rejected = [record for record in toy_records(tmp_path) if isinstance(record, Rejected)]
    assert [(record.site, record.rule) for record in rejected] == [("site-3", "loss-not-finite")]


def test_weighing_by_loss_without_notes_does_not_start(tmp_path: Path, mosquitto_url: str) -> None:
    """The error names the key that asks for a loss; nothing was written."""
    begun(tmp_path, mosquitto_url, 'quality = "exp-loss"\n')
    with pytest.raises(ConfigError, match="quality"):
        run_async(toy_coordinator(tmp_path / "coordinator.toml"))
    assert not (tmp_path / "coordinator" / "journal.sqlite").exists()


def test_a_sync_run_gives_the_same_bits_whoever_is_first(tmp_path: Path, mosquitto_url: str) -> None:
    """Two runs of five sites in which other sites are slow end with the same master, to the bit."""
    digests = []
    for name, slow in (("one", {1: 0.4, 2: 0.3}), ("other", {4: 0.3, 5: 0.4})):
        root = tmp_path / name
        root.mkdir()
        begun(root, mosquitto_url, "", sites=5)

        async def everybody(root: Path = root, slow: dict[int, float] = slow) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(root / "coordinator.toml"))
                for number in range(1, 6):
                    site = toy_site(
                        root / f"site-{number}.toml",
                        step=float(np.float32(0.1) * STEPS[number - 1]),
                        seconds=slow.get(number, 0.0),
                        examples=number,
                    )
                    group.create_task(site)

        run_async(everybody(), timeout_s=60)
        digests.append([each.master_sha256 for each in toy_records(root) if isinstance(each, VersionCommitted)])
    assert digests[0] == digests[1]
