"""What an offer must satisfy before a byte of it is taken. Pure; what its bytes must satisfy is in admission.

Each rule has a name; the name is what the site's operator sees, what the journal keeps and what a test asks for.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.ledger import Ledger
from shared.config import FederationConfig
from shared.errors import RefusedError
from shared.ids import is_update_id_of
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Receipt
from shared.plan import SealedPlan

HEADER_ALLOWANCE = 16 * 1024 * 1024
"""A safetensors header may be this large; the rest of the file is bounded by the plan."""

BYTES_PER_PARAMETER = 5
"""float32 and, generously, one companion value per four; no codec needs more."""

UNRECORDED = frozenset({"not-an-update", "other-site", "foreign-id", "id-reused"})
"""Rules under which nothing is recorded: the id is another's, or has its record already."""

OVERTAKEN = {"run-complete", "too-stale"}
"""Rules that an update may keep when it is first offered, and break when it is offered again."""

REUSED = ("id-reused", "this update id was used before, with another manifest")
"""Rule and detail."""


def check_id(manifest: Manifest, *, site: str) -> None:
    """Raise RefusedError unless the very site that offers this drew its id, and says so in the manifest.

    Nothing may be recorded under another's id: the offer of the site that drew it must still count.
    """
    check_own(manifest, site=site)
    if not is_update_id_of(manifest.transfer_id, site):
        raise RefusedError(
            f"update id {manifest.transfer_id} was not drawn by {site}",
            rule="foreign-id",
            hint="an update that an older release sealed is trained again",
        )


def check_own(manifest: Manifest, *, site: str) -> None:
    """Raise RefusedError unless this is an update of the very site that offers it."""
    facts = manifest.facts
    if not isinstance(facts, UpdateFacts):
        raise RefusedError("a site offered something that is not an update", rule="not-an-update")
    if facts.site != site:
        raise RefusedError(f"the manifest names site {facts.site}, the topic site {site}", rule="other-site")


def check_offer(manifest: Manifest, *, site: str, plan: SealedPlan, federation: FederationConfig) -> None:
    """Raise RefusedError with the name of the first rule that an offered update breaks."""
    roster = federation.federation.sites
    if roster and site not in roster:
        raise RefusedError(f"{site} is not in [federation] sites", rule="unknown-site")
    check_own(manifest, site=site)
    if manifest.federation != federation.federation.name:
        raise RefusedError(f"the manifest names federation {manifest.federation}", rule="other-federation")
    if manifest.fingerprint != plan.fingerprint:
        raise RefusedError("the update was made for another fingerprint of this federation", rule="other-fingerprint")
    if manifest.codec != federation.codec.up:
        raise RefusedError(f"codec {manifest.codec}, agreed is {federation.codec.up}", rule="other-codec")
    if manifest.slice_size != federation.codec.slice_kib * 1024:
        raise RefusedError(
            f"slices of {manifest.slice_size} bytes, agreed are {federation.codec.slice_kib} KiB",
            rule="other-slice-size",
        )
    bound = HEADER_ALLOWANCE + BYTES_PER_PARAMETER * plan.trained_parameters
    if manifest.file_size > bound:
        raise RefusedError(f"{manifest.file_size} bytes, the plan admits at most {bound}", rule="too-large")
    if manifest.wire_bytes > manifest.file_size + 1024 * manifest.frames:
        raise RefusedError("frames longer than what they hold", rule="inflated-frames")


def check_standing(manifest: Manifest, ledger: Ledger, *, limit: int) -> None:
    """Raise RefusedError unless an update fits where the run stands; `limit` is how many versions late it may be."""
    facts = manifest.update
    base = ledger.published.get(facts.base_version)
    if base is None or base.digest != facts.base_digest:
        raise RefusedError(f"version {facts.base_version} of that digest was never published", rule="base-unknown")
    if ledger.finished:
        raise RefusedError(f"the run was complete at version {ledger.version}", rule="run-complete")
    if ledger.version - facts.base_version > limit:
        raise RefusedError(f"more than {limit} versions late", rule="too-stale")


def objection(
    manifest: Manifest,
    *,
    site: str,
    plan: SealedPlan,
    federation: FederationConfig,
    ledger: Ledger,
    attest: Callable[[Manifest], bytes | None],
) -> RefusedError | None:
    """Return why an offered update is refused for good, None when its bytes may come; `attest` as of `Core`."""
    try:
        check_offer(manifest, site=site, plan=plan, federation=federation)
        attest(manifest)
        check_standing(manifest, ledger, limit=federation.aggregation.staleness.limit)
    except RefusedError as refusal:
        return refusal
    return None


def unrecorded(manifest: Manifest, rule: str, detail: str) -> Receipt:
    """An answer about this manifest that leaves the fate of its update id open."""
    return Receipt(
        update_id=manifest.transfer_id,
        manifest_sha256=manifest.digest,
        outcome="rejected",
        rule=rule,
        detail=detail,
    )
