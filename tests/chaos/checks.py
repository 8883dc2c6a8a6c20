"""What must hold after a chaotic run, looked at from outside: files, exit statuses, processes, sockets.

The journal is read by the product's own reader and by `mailboat audit`; each other check stands on its own feet: the
receipts as files, the final tensors from the noise that the workers add, the litter from the names in the folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from coordinator.journal import Journal
from coordinator.records import Accepted, Dropped, Finished, Record, Rejected, VersionCommitted
from tests.chaos.plan import COORDINATOR_NAME, Plan
from tests.chaos.processes import ROOT, with_token
from tests.chaos.worker import noise, step
from tests.toys import INITIAL

AUDIT_S = 300.0


def records(root: Path) -> list[Record]:
    """The journal, from its first record, with the hash chain checked."""
    with Journal.open_read(root / COORDINATOR_NAME / "journal.sqlite") as journal:
        return list(journal.replay())


def published(root: Path) -> int:
    """The newest version, by the audit trail; 0 when there is none yet."""
    trail = root / COORDINATOR_NAME / "audit.jsonl"
    lines = trail.read_bytes().splitlines() if trail.exists() else []
    return sum(b'"committed"' in line for line in lines)


def sealed_now(root: Path, site: str) -> set[str]:
    """The updates that lie sealed in a site's outbox."""
    return {path.name.removesuffix(".manifest") for path in (root / site / "outbox").glob("*.manifest")}


def receipts(root: Path, site: str) -> dict[str, dict[str, Any]]:
    """What a site was told about each of its updates, in the end."""
    return {path.stem: json.loads(path.read_bytes()) for path in (root / site / "receipts").glob("*.json")}


def check(root: Path, plan: Plan, sealed: Mapping[str, set[str]], token: str) -> list[str]:
    """All that is wrong; `sealed` are the updates of each site that were ever seen in its outbox."""
    return [
        *_journal(root, plan),
        *_fates(root, plan, sealed),
        *_arithmetic(root, plan),
        *_audit(root),
        *_litter(root, plan),
        *_words(root, plan),
        *(f"process {pid} is still there" for pid in with_token(token)),
    ]


def _journal(root: Path, plan: Plan) -> Iterator[str]:
    """Versions without gaps up to the last; nothing accepted twice, counted twice, or without an end."""
    facts = records(root)
    committed = [fact for fact in facts if isinstance(fact, VersionCommitted)]
    versions = [fact.version for fact in committed]
    if versions != list(range(1, plan.versions + 1)):
        yield f"versions are {versions}, not 1 to {plan.versions}"
    if sum(isinstance(fact, Finished) for fact in facts) != 1:
        yield "the journal does not say once that the run is finished"
    accepted = Counter(fact.update_id for fact in facts if isinstance(fact, Accepted))
    counted = Counter(part.update_id for fact in committed for part in fact.contributions)
    settled = Counter(fact.update_id for fact in facts if isinstance(fact, Rejected | Dropped))
    for update_id, times in accepted.items():
        ends = counted[update_id] + settled[update_id]
        if times != 1 or ends != 1:
            yield f"update {update_id} was accepted {times} times and came to {ends} ends"
    for update_id, times in counted.items():
        if times > 1 or not accepted[update_id]:
            yield f"update {update_id} was counted {times} times, accepted {accepted[update_id]} times"


def _fates(root: Path, plan: Plan, sealed: Mapping[str, set[str]]) -> Iterator[str]:
    """Every sealed update has a receipt, the outbox is empty, and each receipt says what the journal says."""
    outcome: dict[str, str] = {}
    for fact in records(root):
        match fact:
            case Accepted() | Rejected() | Dropped():
                outcome[fact.update_id] = fact.kind
            case VersionCommitted():
                outcome |= dict.fromkeys((part.update_id for part in fact.contributions), "merged")
    for site in plan.names[1:]:
        told = receipts(root, site)
        for update_id in sealed[site] - told.keys():
            yield f"{site} sealed update {update_id} and has no receipt: lost"
        for update_id in sealed_now(root, site):
            yield f"{site} still has update {update_id} in its outbox"
        for update_id, receipt in told.items():
            said, known = receipt["outcome"], outcome.get(update_id)
            # The later word that an accepted update was merged or dropped is sent once, and may be lost.
            if known is None or not (said == known or (said == "accepted" and known in {"merged", "dropped"})):
                yield f"{site} was told that update {update_id} was {said}, the journal says {known}"


def _arithmetic(root: Path, plan: Plan) -> Iterator[str]:
    """The last master is version 0 and each counted update once, with the weight that the journal tells."""
    if plan.mode == "fedasync":
        return  # mixing is not a sum; the audit recomputes it
    factor = sum(
        part.weight * step(part.site)
        for fact in records(root)
        if isinstance(fact, VersionCommitted)
        for part in fact.contributions
    )
    master = load_file(root / COORDINATOR_NAME / "masters" / f"v{plan.versions:08d}.safetensors")
    for name, values in master.items():
        expected = INITIAL + factor * noise(name, values.shape)
        if not np.allclose(values, expected, rtol=1e-4, atol=1e-4):
            yield f"tensor {name} of the last version is not the sum of the counted updates"


def _audit(root: Path) -> Iterator[str]:
    """`mailboat audit verify` and `replay`, as their users call them."""
    for words in (("verify",), ("replay",)):
        command = [sys.executable, "-m", "mailboat", "audit", *words, "--config", str(root / "coordinator.toml")]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=AUDIT_S)
        if done.returncode != 0:
            yield f"audit {words[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}"


def _litter(root: Path, plan: Plan) -> Iterator[str]:
    """No half file, no spool of what will never arrive, no scratch of the worker."""
    kept = {fact.update_id for fact in records(root) if isinstance(fact, Accepted)}
    for name in plan.names:
        for path in (root / name).rglob("*"):
            place = path.relative_to(root)
            if path.name.startswith(".tmp-") or path.name.endswith(".part.manifest"):
                yield f"{place} was left behind"
            elif path.parent.name == "work":
                yield f"{place} is scratch"
            elif path.parent.name == "updates" and path.name.split(".")[0] not in kept:
                yield f"{place} belongs to no accepted update"


def _words(root: Path, plan: Plan) -> Iterator[str]:
    """No traceback in any log."""
    for name in plan.names:
        if "Traceback (most recent call last)" in (root / f"{name}.log").read_text():
            yield f"{name}.log has a traceback"
