"""`python -m tests.chaos --seeds 0-19 --json FILE`: chaotic runs, one seed each; status 1 when anything was wrong.

The folder of a failed run is kept, with its plan and all logs; `--seeds N` runs that plan again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.conduct import Outcome, conduct
from tests.chaos.disks import may_mount
from tests.chaos.plan import Plan, absent_plan, make_plan
from tests.chaos.results import merged, row, summary, table


def main() -> int:
    """Run the seeds and say what came of each."""
    options = _options()
    if options.merge:
        found = merged([json.loads(path.read_text()) for path in options.merge])
        _write(options.json, found)
        sys.stdout.write(table(found))
        return 1 if found["failed"] else 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that disks are unmounted and processes ended
    first, _, last = options.seeds.partition("-")
    outcomes: list[Outcome] = []
    seeds = range(int(first), int(last or first) + 1)
    plans = (make_plan(seed, kills=options.kills, root=may_mount()) for seed in seeds)
    for plan in plans if options.absent is None else [absent_plan(options.absent)]:
        outcome = _one(plan, options.keep)
        outcomes.append(outcome)
        sys.stdout.write(row(outcome) + "\n")
        sys.stdout.flush()
        _write(options.json, summary(outcomes))
    sys.stdout.write(table(summary(outcomes)))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", default="0-2", help="one seed, or first-last")
    parser.add_argument("--kills", type=int, default=4, help="random kills a run, beside those at commit points")
    parser.add_argument("--absent", type=int, help="instead of seeds: a site comes back after so many versions")
    parser.add_argument("--merge", type=Path, nargs="+", help="instead of running: sum up what these files say")
    parser.add_argument("--json", type=Path, help="write what came of all runs to this file")
    parser.add_argument("--keep", type=Path, help="keep the folders of all runs below this one")
    return parser.parse_args()


def _one(plan: Plan, keep: Path | None) -> Outcome:
    root = Path(tempfile.mkdtemp(prefix=f"chaos-{plan.seed}-", dir=keep))
    (root / "plan.json").write_text(json.dumps(plan.plain(), indent=1))
    outcome = asyncio.run(conduct(root, plan))
    if outcome.problems:
        (root / "problems.txt").write_text("\n".join(outcome.problems) + "\n")
        time_ = time.strftime("%H:%M:%S")
        sys.stdout.write(
            f"{time_} seed {plan.seed} FAILED, folder kept: {root}\n"
            + "".join(f"    {problem}\n" for problem in outcome.problems)
            + f"    again: {sys.executable} -m tests.chaos {' '.join(sys.argv[1:])}, or --seeds {plan.seed} alone\n"
        )
    elif keep is None:
        shutil.rmtree(root)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
