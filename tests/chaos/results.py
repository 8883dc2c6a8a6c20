"""The results of chaotic runs: a line for each, a table for all, and JSON for the report."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from shared.faultpoint import BOTH, COORDINATOR, SITE
from tests.chaos.conduct import Outcome


def row(outcome: Outcome) -> str:
    """One line for the terminal."""
    plan = outcome.plan
    verdict = "FAILED" if outcome.problems else "ok"
    return (
        f"{time.strftime('%H:%M:%S')} seed {plan.seed:3d}  {plan.mode:8s} {plan.sites} sites  "
        f"{'sealed' if plan.sealed else 'plain '}  queue {plan.queue_max:4d}  kills {outcome.kills:2d}  "
        f"faults {len(outcome.applied):2d} (+{len(outcome.missed)} missed)  updates {outcome.sealed:3d}  "
        f"{outcome.seconds:5.1f} s  {verdict}"
    )


def machine() -> dict[str, Any]:
    """Where and when something was measured."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All runs as JSON-able values."""
    deaths = [death for outcome in outcomes for death in outcome.deaths]
    applied = Counter(
        f"{each.fault.kind} {_role(each.fault.target)}" for outcome in outcomes for each in outcome.applied
    )
    points = Counter(f"{_role(death.name)} {death.how.rpartition(':')[0]}" for death in deaths if ":" in death.how)
    known = [f"coordinator {point}" for point in (*BOTH, *COORDINATOR)] + [f"site {point}" for point in (*BOTH, *SITE)]
    return {
        "machine": machine(),
        "seeds": [outcome.plan.seed for outcome in outcomes],
        "kills": sum(outcome.kills for outcome in outcomes),
        "kills_at_points": sum(points.values()),
        "points": dict(sorted(points.items())),
        "points_never_reached": [point for point in known if point not in points],
        "faults": dict(sorted(applied.items())),
        "updates": sum(outcome.sealed for outcome in outcomes),
        "versions": sum(outcome.plan.versions for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "notes": [note for outcome in outcomes for note in outcome.notes],
        "failed": {str(outcome.plan.seed): outcome.problems for outcome in outcomes if outcome.problems},
        "runs": [
            {
                "seed": outcome.plan.seed,
                "mode": outcome.plan.mode,
                "sites": outcome.plan.sites,
                "sealed": outcome.plan.sealed,
                "queue_max": outcome.plan.queue_max,
                "versions": outcome.plan.versions,
                "kills": outcome.kills,
                "faults": len(outcome.applied),
                "updates": outcome.sealed,
                "seconds": round(outcome.seconds, 1),
                "bytes_up": outcome.up.total,
                "bytes_up_resent": outcome.up.resent,
                "ok": not outcome.problems,
            }
            for outcome in outcomes
        ],
    }


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of runs of different seeds as those of one."""

    def counted(key: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part[key])
        return dict(sorted(total.items()))

    points = counted("points")
    never = set.intersection(*(set(part["points_never_reached"]) for part in parts))
    return {
        **parts[0],
        **{
            key: sum(part[key] for part in parts)
            for key in ("kills", "kills_at_points", "updates", "versions", "seconds")
        },
        "seeds": sorted(seed for part in parts for seed in part["seeds"]),
        "points": points,
        "points_never_reached": [point for point in parts[0]["points_never_reached"] if point in never],
        "faults": counted("faults"),
        "failed": {seed: problems for part in parts for seed, problems in part["failed"].items()},
        "runs": sorted((run for part in parts for run in part["runs"]), key=lambda run: int(run["seed"])),
    }


def table(found: dict[str, Any]) -> str:
    """The sums for the terminal."""
    sums = (
        f"{len(found['seeds'])} seeds, {found['kills']} kills ({found['kills_at_points']} at commit points), "
        f"{found['updates']} updates, {found['versions']} versions, {found['seconds']:.0f} s, "
        f"{len(found['failed'])} failed"
    )
    lines = [
        sums,
        *_counted("faults", found["faults"]),
        *_counted("commit points", found["points"]),
    ]
    if found["points_never_reached"]:
        lines.append("never reached: " + ", ".join(found["points_never_reached"]))
    return "\n".join(lines) + "\n"


def _counted(title: str, counts: dict[str, int]) -> Iterable[str]:
    yield f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items())


def _role(name: str) -> str:
    return "site" if name.startswith("site-") else name
