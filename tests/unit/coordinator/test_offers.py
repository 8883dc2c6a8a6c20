"""What an offer must satisfy before a byte of it is taken: one case for each rule."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.offers import BYTES_PER_PARAMETER, HEADER_ALLOWANCE, check_offer
from shared.errors import RefusedError
from shared.manifest import Manifest
from tests.factories import SLICE, digest, make_federation, make_plan, make_state, make_update

FEDERATION = make_federation()
PLAN = make_plan(FEDERATION)
BASE = make_state(PLAN, 0)


def _changed(**changes: Any) -> Manifest:
    """A valid offer of site `a`, with these fields changed and checked anew."""
    return Manifest.model_validate({**dict(make_update(PLAN, "a", BASE)), **changes})


def _of_size(size: int) -> Manifest:
    frames = -(-size // SLICE)
    return _changed(file_size=size, frame_lengths=(1,) * frames, frame_hashes=bytes(32 * frames))


def _check(manifest: Manifest, site: str = "a") -> None:
    check_offer(manifest, site=site, plan=PLAN, federation=FEDERATION)


LARGEST = HEADER_ALLOWANCE + BYTES_PER_PARAMETER * PLAN.trained_parameters


@pytest.mark.parametrize(
    "manifest", [make_update(PLAN, "a", BASE), _of_size(LARGEST), _changed(frame_lengths=(SLICE + 1024,) * 5)]
)
def test_a_sound_offer_passes(manifest: Manifest) -> None:
    """Also the largest one that the plan admits, and one whose frames zstd could not make smaller."""
    _check(manifest)


@pytest.mark.parametrize(
    ("manifest", "site", "rule"),
    [
        (make_state(PLAN, 0), "a", "not-an-update"),
        (make_update(PLAN, "a", BASE), "b", "other-site"),
        (_changed(federation="other"), "a", "other-federation"),
        (_changed(fingerprint=digest("other")), "a", "other-fingerprint"),
        (_changed(codec="bf16"), "a", "other-codec"),
        (_changed(slice_size=2 * SLICE, file_size=5 * 2 * SLICE), "a", "other-slice-size"),
        (_of_size(LARGEST + 1), "a", "too-large"),
        (_changed(frame_lengths=(SLICE + 1024,) * 4 + (SLICE + 1025,)), "a", "inflated-frames"),
    ],
)
def test_each_rule_has_its_name(manifest: Manifest, site: str, rule: str) -> None:
    """The operator of the site reads this name, and the journal keeps it."""
    with pytest.raises(RefusedError) as refused:
        _check(manifest, site)
    assert refused.value.rule == rule


def test_a_roster_admits_those_whom_it_names_only() -> None:
    """A client that skips its hello does not get past [federation] sites."""
    federation = make_federation(federation={"name": "ward", "sites": ["a"]})
    plan = make_plan(federation)
    base = make_state(plan, 0)
    check_offer(make_update(plan, "a", base), site="a", plan=plan, federation=federation)
    with pytest.raises(RefusedError) as refused:
        check_offer(make_update(plan, "b", base), site="b", plan=plan, federation=federation)
    assert refused.value.rule == "unknown-site"
