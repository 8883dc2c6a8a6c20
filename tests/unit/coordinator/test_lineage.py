"""A journal whose versions do not follow from each other, under a sound chain: each forgery by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from coordinator.proof import prove
from coordinator.records import Anchored, Record, VersionCommitted
from shared.manifest import manifest_from_bytes
from tests.audited import AuditedRun, on, put


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """One whose versions travel as steps, version 2 whole as well; each test leaves it as it was."""
    return AuditedRun(tmp_path_factory.mktemp("stepped") / "storage", "sync, steps")


def of_state(*, facts: dict[str, Any] | None = None, **changes: Any) -> Callable[[Any], Sequence[Record]]:
    """The record with other fields in its manifest."""

    def change(record: Any) -> Sequence[Record]:
        manifest = manifest_from_bytes(record.state)
        told = manifest.facts.model_copy(update=facts or {})
        return put(state=manifest.model_copy(update={**changes, "facts": told}).to_bytes())(record)

    return change


FORGED_STEPS = {
    "a step from another state": (
        on(VersionCommitted, of_state(facts={"base_digest": "ab" * 32}), nth=1),
        "state-manifest",
    ),
    "a step to another version": (on(VersionCommitted, of_state(facts={"version": 7}), nth=1), "state-manifest"),
    "a step to another state": (on(VersionCommitted, of_state(facts={"state_digest": "ab" * 32})), "state-manifest"),
    "no anchor": (on(Anchored, lambda _record: []), "anchor-gone"),
    "an anchor of another state": (on(Anchored, of_state(file_digest="ab" * 32)), "anchor-differs"),
    "an anchor in another codec": (on(Anchored, of_state(codec="int8")), "state-manifest"),
    "an anchor twice": (on(Anchored, lambda record: [record, record]), "anchor-place"),
    "an anchor of an older version": (on(Anchored, put(version=1)), "anchor-place"),
    "an anchor of no version": (on(Anchored, put(version=9)), "anchor-place"),
    "an anchor out of turn": (
        on(VersionCommitted, lambda record: [record, Anchored(record.version, record.state, record.at)], nth=2),
        "anchor-place",
    ),
    "an anchor that is none": (on(Anchored, put(state=b"\xc1")), "state-manifest"),
}


@pytest.mark.parametrize("kind", FORGED_STEPS)
def test_steps_that_cannot_lead_there_are_found(stepped: AuditedRun, kind: str) -> None:
    """From one published state to the next, and anchors in their turn, of the very state that the step makes."""
    begin, rule = FORGED_STEPS[kind]
    with stepped.forged(begin()):
        findings = prove(stepped.storage, stepped.federation, stepped.plan).findings
    rules = {finding.rule for finding in findings}
    assert rule in rules
    assert "chain" not in rules
