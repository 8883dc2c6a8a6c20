"""Every rule of merging, by name from federation.toml, over a real Mosquitto; and each run recomputed bit for bit."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.masters import master_path
from coordinator.proof import prove
from coordinator.records import Rejected, Substituted, Validated, VersionCommitted
from coordinator.replay import replay
from coordinator.validation import Validator
from edge_client.training import Trainer
from shared.config import FederationConfig, MergeRule, Quality, ServerOptimizerName, StalenessKind
from shared.configfile import load_config
from shared.errors import ConfigError
from shared.manifest import manifest_from_bytes
from shared.plan import load_plan
from shared.states import open_state
from shared.store import FrameStore
from tests.commands import call
from tests.helpers import run_async
from tests.toys import INITIAL, InTurn, ToyValidator, toy_coordinator, toy_records, toy_site, write_toy

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


def run(
    root: Path,
    *,
    sites: int = 3,
    validator: Validator | None = None,
    trainers: Mapping[str, Trainer] = MappingProxyType({}),
) -> list[VersionCommitted]:
    """Run it to its end and return its versions, all of them proven and made again without a difference.

    By the `trainers`, where there are any; they are all the sites then.
    """

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(root / "coordinator.toml", validator))
            for name, trainer in trainers.items():
                group.create_task(toy_site(root / f"{name}.toml", trainer=trainer))
            for number in range(1, 1 if trainers else sites + 1):
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
    return float(load_file(master_path(root / "coordinator" / "masters", version))["a.weight"][0])


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


def run_late(root: Path, url: str, extra: str, *, mode: str = "fedbuff") -> tuple[float, ...]:
    """Run two sites, one update a version, and return by how much each of the four versions moved the master.

    The first site adds 1 in versions 1, 2 and 4; the second adds 1/8 in version 3, having begun on version 0.
    """
    write_toy(root, url, sites=2, versions=4, mode=mode, buffer=1, parameters=FEW, slice_kib=4, extra=extra)
    begun, waits = set[int](), set[int]()
    third = master_path(root / "coordinator" / "masters", 3)

    def first(base: int) -> bool:
        begun.add(base)
        return {0: 0 in waits, 1: True, 2: third.exists()}.get(base, False)

    def second(base: int) -> bool:
        waits.add(base)
        return base == 0 and 2 in begun

    versions = run(root, trainers={"site-1": InTurn(first, step=1.0), "site-2": InTurn(second, step=0.125)})
    found = [[(part.site, part.staleness) for part in version.contributions] for version in versions]
    assert found == [[("site-1", 0)], [("site-1", 0)], [("site-2", 2)], [("site-1", 1)]]
    # States, which are kept, travel as they are: their values are those of the masters.
    states = FrameStore(root / "coordinator" / "states")
    parts = (manifest_from_bytes(version.state).transfer_id for version in versions)
    values = [INITIAL, *(float(open_state(states, (part,))["a.weight"][0]) for part in parts)]
    return tuple(after - before for before, after in pairwise(values))


FIRST = (0.1, 0.19, 0.9 * 0.19 + 0.0125, 0.9 * (0.9 * 0.19 + 0.0125) + 0.1)
"""The running mean of 1, 1, 1/8 and 1, a tenth of each new one."""
SQUARE = (0.01, 0.0199, 0.99 * 0.0199 + 0.01 / 64, 0.99 * (0.99 * 0.0199 + 0.01 / 64) + 0.01)
"""That of their squares, a hundredth of each new one: the third is smaller than the second."""


def adaptive(squares: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Steps of Adam and its kin, which share the running mean."""
    return [
        rate * first / (math.sqrt(square) + 1e-3) for first, square, rate in zip(FIRST, squares, rates, strict=True)
    ]


MOVES: dict[str, tuple[str, list[float]]] = {
    "sgd": ("", [1, 1, 0.125, 1]),
    # The momentum is 1, 1.9, 0.9 * 1.9 + 0.125, and 0.9 of that + 1.
    "momentum": ("", [1, 1.9, 1.835, 2.6515]),
    "nesterov": ("", [0.7 * (0.9 * u + m) for u, m in ((1, 1), (1.9, 1), (1.835, 0.125), (2.6515, 1))]),
    "adam": ("", adaptive(SQUARE, [0.1] * 4)),
    # The square rises by a hundredth of 1 each time, and for 1/8, whose square it is above, falls by one of 1/64.
    "yogi": ("", adaptive((0.01, 0.02, 0.02 - 0.01 / 64, 0.03 - 0.01 / 64), [0.01] * 4)),
    # The greatest square so far, and half the rate for an update that is two versions late; one is not too late.
    "fadas": ("lr = 0.1\nslow_after = 1\n", adaptive((0.01, 0.0199, 0.0199, SQUARE[3]), (0.1, 0.1, 0.05, 0.1))),
    # Half of each, and at versions 2 and 4 the momentum besides: 1, and 0.9 of it + the mean of 1/8 and 1.
    "delayed-nesterov": (
        "every = 2\n",
        [0.7 * 0.5, 0.7 * (0.5 + 0.9 * 1), 0.7 * 0.0625, 0.7 * (0.5 + 0.9 * (0.9 + 0.5625))],
    ),
}
"""Keys of each server optimizer, and by how much it moves the master at each version of `run_late`."""


@pytest.mark.parametrize("server", SERVERS)
def test_every_server_optimizer_runs_by_its_name(server: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Four versions, one of an update that is late: each moves the master by what the formula says."""
    keys, moves = MOVES[server]
    extra = f'[aggregation.staleness]\nkind = "constant"\n[aggregation.server]\noptimizer = "{server}"\n{keys}'
    assert run_late(tmp_path, mosquitto_url, extra) == pytest.approx(moves, abs=1e-6)


DAMPED: dict[str, tuple[str, tuple[float, float]]] = {
    "constant": ('kind = "constant"\n', (1, 1)),
    "polynomial": ('kind = "polynomial"\n', (3**-0.5, 2**-0.5)),
    "hinge": ('kind = "hinge"\na = 2\nb = 1\n', (1 / 3, 1)),
}
"""Of each staleness function its keys, and what it gives at two versions of lateness and at one."""


@pytest.mark.parametrize("mode", ["fedbuff", "fedasync"])
@pytest.mark.parametrize("kind", STALENESS)
def test_every_staleness_function_runs_by_its_name(kind: str, mode: str, tmp_path: Path, mosquitto_url: str) -> None:
    """In both modes in which updates come late as a rule, a late one moves the master by less where it should.

    FedBuff adds s times the update. FedAsync goes 0.6 s of the way to what the site has: from 2.2 to 1.125, which the
    second made of version 0, and then to 3.2, which the first made of version 2.
    """
    keys, (later, late) = DAMPED[kind]
    moves = run_late(tmp_path, mosquitto_url, f"[aggregation.staleness]\n{keys}", mode=mode)
    if mode == "fedbuff":
        assert moves == pytest.approx([1, 1, 0.125 * later, late], abs=1e-6)
    else:
        third = 0.6 * later * (1.125 - 2.2)
        fourth = 0.6 * late * (3.2 - (2.2 + third))
        assert moves == pytest.approx([0.6, 0.6, third, fourth], abs=1e-6)


def test_ca2fl_goes_on_with_what_an_absent_site_said_last(tmp_path: Path, mosquitto_url: str) -> None:
    """Rounds of one: the other site's cached update speaks in the mean, and one's own is taken back.

    Version 3: the mean of 1 and nothing, and 1/8. Version 4: the mean of 1 and 1/8, and 1 less the 1 said before.
    """
    moves = run_late(tmp_path, mosquitto_url, 'rule = "ca2fl"\n[aggregation.staleness]\nkind = "constant"\n')
    assert moves == pytest.approx([1, 1, 1 / 2 + 0.125, 1.125 / 2], abs=1e-6)


@pytest.mark.parametrize(("rule", "moved"), [("mean", (1 + 2 * 1.2 + 3 * 1.2) / 6), ("median", 1.2)])
def test_an_update_is_clipped_to_the_norm_by_name(rule: str, moved: float, tmp_path: Path, mosquitto_url: str) -> None:
    """Of 1, 1.25 and 1.5 in each of 2,000 values the last two are above sqrt(2000) times 1.2, and are scaled to it.

    Without it the mean would be 4/3, the median 1.25.
    """
    begun(tmp_path, mosquitto_url, f'rule = "{rule}"\nclip_norm = {1.2 * math.sqrt(FEW)!r}\n')
    run(tmp_path)
    assert [first_value(tmp_path, version) for version in (1, 2)] == pytest.approx(
        [INITIAL + moved, INITIAL + 2 * moved], abs=1e-5
    )


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
        digests.append([each.master_digest for each in toy_records(root) if isinstance(each, VersionCommitted)])
    assert digests[0] == digests[1]
