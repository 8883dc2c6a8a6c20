"""What a proof and a replay find when a record belies the rule by which a version was merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from coordinator.proof import prove
from coordinator.records import Record, Substituted, Validated, VersionCommitted
from coordinator.replay import replay
from tests.audited import AuditedRun, Edit


@pytest.fixture(scope="module", params=["multi-krum", "size-exp-loss"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """A run by one of the rules; each test leaves it as it was."""
    return AuditedRun(tmp_path_factory.mktemp(request.param) / "storage", request.param)


@pytest.fixture
def krum(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """Versions of five updates, of three and of five."""
    return AuditedRun(tmp_path_factory.mktemp("krum") / "storage", "multi-krum")


@pytest.fixture
def valued(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """Updates with a loss each."""
    return AuditedRun(tmp_path_factory.mktemp("valued") / "storage", "size-exp-loss")


def found(run: AuditedRun, edit: Edit) -> set[str]:
    """Rules of the findings while the journal says something else."""
    with run.forged(edit):
        return {finding.rule for finding in prove(run.storage, run.federation, run.plan).findings}


def each(kind: type[Record], change: Callable[[Any], Sequence[Record]]) -> Edit:
    """Change all records of a kind."""
    return lambda record: change(record) if isinstance(record, kind) else [record]


def instead(record: Record, other: Record) -> Edit:
    """One record in the place of another."""
    return lambda found: [other] if found == record else [found]


def test_what_stood_in_for_krum_is_told_once_and_rightly(krum: AuditedRun) -> None:
    """The one version of three updates has its row; without it, of another rule, or of more updates, it is found."""
    told = [record for record in krum.records if isinstance(record, Substituted)]
    assert [(record.version, record.rule, record.updates, record.needed) for record in told] == [(2, "median", 3, 5)]
    assert "substituted" in found(krum, each(Substituted, lambda _record: []))
    (row,) = told
    for other in (
        dataclasses.replace(row, rule="mean"),
        dataclasses.replace(row, updates=2),
        dataclasses.replace(row, version=1),
    ):
        assert "substituted" in found(krum, instead(row, other))


def test_a_substitute_where_krum_could_judge_is_found(krum: AuditedRun) -> None:
    """Said of a version of five: the rule was another."""

    def said(record: VersionCommitted) -> Sequence[Record]:
        return [Substituted(record.version, "median", len(record.contributions), 5, record.at), record]

    assert "substituted" in found(krum, each(VersionCommitted, said))


def recounted(version: int, weights: Sequence[float]) -> Edit:
    """Other weights in one version."""

    def change(record: VersionCommitted) -> Sequence[Record]:
        if record.version != version:
            return [record]
        parts = [
            dataclasses.replace(part, weight=weight) for part, weight in zip(record.contributions, weights, strict=True)
        ]
        return [dataclasses.replace(record, contributions=tuple(parts))]

    return each(VersionCommitted, change)


def test_a_proof_knows_how_many_krum_chooses_and_what_they_count(krum: AuditedRun) -> None:
    """Four of five at a quarter each (less where late): five, three, none or other weights are found."""
    weights = [part.weight for part in krum.committed[0].contributions]
    assert sorted(weights) == [0, 0.25, 0.25, 0.25, 0.25]
    for forged in ([0.25] * 5, [0, 0, 0.25, 0.25, 0.25], [0] * 5, [0, 0.3, 0.25, 0.25, 0.25]):
        assert "contribution" in found(krum, recounted(1, forged))


def test_only_a_replay_knows_which_krum_chooses(krum: AuditedRun, tmp_path: Path) -> None:
    """That another update was left out fits the rule, and not the tensors."""
    weights = [part.weight for part in krum.committed[0].contributions]
    moved = recounted(1, [*weights[1:], weights[0]])
    assert found(krum, moved) <= {"audit-line"}
    with krum.forged(moved):
        *_, last = replay(krum.storage, krum.federation, krum.plan, tmp_path)
    assert last.version == 1
    assert {finding.rule for finding in last.differences} == {"contribution"}


def test_a_loss_stands_once_for_each_update_and_makes_its_weight(valued: AuditedRun) -> None:
    """Without it, twice, or another than the one that weighed, it is found."""
    assert "not-validated" in found(valued, each(Validated, lambda _record: []))
    assert "validated-in-vain" in found(valued, each(Validated, lambda record: [record, record]))
    assert "contribution" in found(valued, each(Validated, lambda record: [dataclasses.replace(record, loss=0.1)]))


def test_a_loss_where_none_is_measured_or_of_an_update_that_nobody_sent(krum: AuditedRun, valued: AuditedRun) -> None:
    """Both are found."""

    def measured(update_id: str) -> Edit:
        return each(VersionCommitted, lambda record: [Validated(update_id, 1.0, 3.0), record])

    assert "validated-in-vain" in found(krum, measured(krum.accepted[0].update_id))
    assert "not-pending" in found(valued, measured("ee" * 16))


def test_nothing_is_found_where_nothing_is_wrong(run: AuditedRun) -> None:
    """The same journal, chained anew, is sound: what the others find is what they changed."""
    assert found(run, lambda record: [record]) == set()
