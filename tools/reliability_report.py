"""Writes docs/reliability.md from the measurements in docs/results/*.json: `make reliability-report`.

Every number in it comes from a file there, with its machine and its date; a section without a file says how to measure.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
STARVED_MAX = 0.1
"""Share of the time for which a machine may have been busy with something else, for a time to be reported."""

HEAD = """# Reliability

What was measured of the promises in [architecture.md](architecture.md#promises): nothing receipted is lost, nothing is
counted twice, whatever is killed or cut off. This file is written by `make reliability-report` from the JSON files in
[results](results); it holds measured numbers only, and each section says on which machine and when.

- [Real processes under faults](#real-processes-under-faults) · [Recovery](#recovery) ·
  [Progress after an outage](#progress-after-an-outage) · [Memory](#memory) · [Simulated worlds](#simulated-worlds) ·
  [Goodput](#goodput) · [Beside other frameworks](#beside-other-frameworks)
"""


def main() -> None:
    """Write the file."""
    lines = [*HEAD.splitlines(), *chaos(), *recovery(), *reconnect(), *memory(), *worlds(), *others(), *peers()]
    (ROOT / "docs" / "reliability.md").write_text("\n".join(lines).rstrip() + "\n")
    sys.stdout.write("docs/reliability.md is written\n")


def load(name: str) -> dict[str, Any] | None:
    """The measurements of that name, or None when there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def section(title: str, command: str, found: dict[str, Any] | None) -> Iterator[str]:
    """The heading, and where the numbers come from."""
    yield from ("", f"## {title}", "")
    if found is None:
        yield f"Not measured yet: `{command}`."
        return
    where = found.get("machine", {})
    told = ", ".join(f"{key} {value}" for key, value in where.items())
    yield f"`{command}`{'; ' + told if told else ''}."
    yield ""


def rows(header: list[str], body: list[list[Any]]) -> Iterator[str]:
    """A table; an empty body makes none."""
    if body:
        yield "| " + " | ".join(header) + " |"
        yield "|" + "---|" * len(header)
        for line in body:
            yield "| " + " | ".join(map(str, line)) + " |"
        yield ""


def chaos() -> Iterator[str]:
    """Kills, faults and what came of them."""
    found = load("chaos")
    yield from section("Real processes under faults", "make chaos", found)
    if found is None:
        return
    failed = sorted(found["failed"])
    verdict = f"seeds that failed: {failed}" if failed else "none lost, none counted twice, no run that hung"
    yield (
        f"{len(found['seeds'])} runs from seeds, each with a real Mosquitto, coordinator, sites and disks: "
        f"**{found['kills']} kills** by SIGKILL, {found['kills_at_points']} of them at a named commit point; "
        f"{found['updates']} updates, {found['versions']} versions: **{verdict}**."
    )
    yield ""
    yield (
        "After each run, from outside: each update that ever lay sealed in an outbox has a receipt, and the receipt "
        "agrees with the journal; no update is part of two versions; versions have no gaps; `mailboat audit verify` "
        "and `audit replay` pass; the last tensors are the sum of the counted updates (not for fedasync, whose mixing "
        "is no sum); all processes ended by themselves; no half file, spool or process is left."
    )
    yield ""
    for note in found.get("notes", []):
        yield from (f"- {note}", "")
    yield from rows(["fault", "times"], [[name, count] for name, count in found["faults"].items()])
    yield from rows(["killed at", "times"], [[name, count] for name, count in found["points"].items()])
    if found["points_never_reached"]:
        yield "Never reached in these runs: " + ", ".join(found["points_never_reached"]) + "."
        yield ""
    columns = ["seed", "mode", "sites", "sealed", "queue_max", "versions", "kills", "faults", "updates", "ok"]
    yield from rows(columns, [[run[column] for column in columns] for run in found["runs"]])
    yield from absent()


def absent() -> Iterator[str]:
    """A site that missed many versions."""
    found = load("absent")
    if found is None:
        return
    failed = [problem for problems in found["failed"].values() for problem in problems]
    verdict = f"wrong: {'; '.join(failed)}" if failed else "nothing lost, nothing counted twice, the same checks passed"
    yield (
        f"A site away for long (`python -m tests.chaos --absent 1000`): {found['versions']:,} versions, "
        f"{found['updates']:,} updates, {found['seconds']:.0f} s; **{verdict}**. {' '.join(found['notes'])}"
    )
    yield ""


def recovery() -> Iterator[str]:
    """One fault in mid-upload, default settings."""
    found = load("recovery")
    yield from section("Recovery", "python -m tests.chaos.recovery --json docs/results/recovery.json", found)
    if found is None:
        return
    settings = found["settings"]
    credit = settings["window"] * settings["slice_kib"] * 1024
    yield (
        f"Default settings, one update of {settings['update_bytes'] / 1e6:g} MB over {settings['mbit_s']} Mbit/s, "
        "struck when half of it had passed the broker. *Recovery* is the time from the end of the fault (restarted "
        "process started, link back) until the coordinator says that it holds a chunk first sent after that, a "
        "process's start included. *Resent* are "
        f"bytes that the broker saw twice; one credit window is {credit / 1e6:.1f} MB. Medians, and the worst."
    )
    yield ""
    body = []
    left_out = 0
    for name, measured in found["faults"].items():
        calm = [one for one in measured if one["starved"] <= STARVED_MAX]
        left_out += len(measured) - len(calm)
        times = [one["recovery_s"] for one in calm if one["recovery_s"] is not None]
        resent = [one["resent_bytes"] / 1e6 for one in measured]
        seen = [f"{statistics.median(times):.2f}", f"{max(times):.2f}"] if times else ["-", "-"]
        sent = [f"{statistics.median(resent):.2f}", f"{max(resent):.2f}"] if resent else ["-", "-"]
        body.append([name, f"{len(times)} of {len(measured)}", *seen, *sent])
    yield from rows(["fault", "timed", "recovery s", "worst s", "resent MB", "worst MB"], body)
    for note in found.get("notes", []):
        yield from (f"- {note}", "")
    if left_out:
        yield f"{left_out} times are left out: over {STARVED_MAX:.0%} of them the machine was busy with something else."
        yield ""


def memory() -> Iterator[str]:
    """The coordinator's peak over concurrent uploads."""
    found = load("memory")
    yield from section("Memory", "make bench-memory", found)
    if found is None:
        return
    body = [
        [run["uploads"], *(f"{run[key] / 1e6:.0f}" for key in ("wire_bytes_each", "idle_bytes", "peak_bytes"))]
        for run in found["runs"]
    ]
    yield from rows(["uploads at once", "MB on the wire, each", "idle MB", "peak MB"], body)
    yield (
        f"Updates of {found['mb']:g} MB. Peak memory of the coordinator's "
        f"process, last against first: {found['ratio']:.2f}."
    )
    yield ""
    if "note" in found:
        yield from (found["note"], "")


def reconnect() -> Iterator[str]:
    """Outages of the site's link in mid-transfer."""
    found = load("reconnect")
    yield from section("Progress after an outage", "make bench-reconnect", found)
    if found is None:
        return
    settings = found["settings"]
    yield (
        f"Real processes at the default settings, transfers of {settings['update_bytes'] / 1e6:g} MB over "
        f"{settings['mbit_s']:g} Mbit/s; the site's link fails in the midst of an upload or a pull: silent (`hole`) or "
        f"reset and refused (`down`). Seconds from the link's return until {settings['progress_bytes'] // 1024} KiB "
        "have crossed in the transfer's direction, more than is said around a transfer. Median, and the worst, of the "
        f"measurements during which this machine was late by at most {settings['starved_max']:.0%}; *resent* are bytes "
        f"of chunks that the broker had before (one window is {settings['window_bytes'] / 1e6:.1f} MB)."
    )
    yield ""
    columns = [*found["table"][0]] if found["table"] else []
    yield from rows(columns, [[line[column] for column in columns] for line in found["table"]])
    if "note" in found:
        yield from (found["note"], "")


def worlds() -> Iterator[str]:
    """Seeded worlds, and the deliberate bugs that they find."""
    found = load("sim")
    yield from section("Simulated worlds", "make sim SEEDS=100000", found)
    if found is None:
        return
    count, failures = sum(found["worlds"].values()), found["failures"]
    seeds = ", ".join(f"{first} to {last}" for first, last in found["ranges"])
    broke = [failure["seed"] for failure in failures]
    failed = f"broke a promise in seeds {broke}" if broke else "none broke a promise"
    yield (
        f"**{count:,} worlds**, each from its seed ({seeds}), at commit `{found['commit'][:12]}`: **{failed}**. They "
        f"lived through {found['virtual_s'] / 3600:,.0f} hours of their own and took {found['cpu_s']:,.0f} s of "
        f"processor time, {1000 * found['cpu_s'] / count:.0f} ms each; {found['versions']:,} versions."
    )
    yield ""
    yield (
        "In a world run the real decisions of coordinator and sites, the real journal, stores, outbox and messages, in "
        "sealed ones the real signatures and ciphers too; time, broker and disks are false and do their worst. "
        "Checkers with books of their own look at every step. `python -m tests.sim --seed N --trace` tells one world."
    )
    yield ""
    for note in found.get("notes", []):
        yield from (f"- {note}", "")
    for title, name in (("closing rule", "worlds"), ("what befell", "faults"), ("what became of updates", "updates")):
        yield from rows([title, "times"], [[key, f"{value:,}"] for key, value in found[name].items()])
    bugs = load("sim-bugs")
    if bugs is not None:
        yield (
            f"What the checkers are worth: deliberate bugs in the code at commit `{bugs['commit'][:12]}`, and the "
            "first seed whose world notices. Seeds of sealed worlds begin at 10,000,000, those of versions "
            "as steps at 20,000,000."
        )
        yield ""
        body = [[name, "not found" if seed is None else f"{seed:,}"] for name, seed in bugs["found at seed"].items()]
        yield from rows(["bug", "found by seed"], body)


def others() -> Iterator[str]:
    """What other measurements left, as they name it."""
    for title, name, command in (("Goodput", "goodput", "python -m bench.goodput"),):
        found = load(name)
        yield from section(title, command, found)
        yield from _plain(found or {})


def _plain(found: dict[str, Any]) -> Iterator[str]:
    scalars = [[key, value] for key, value in found.items() if isinstance(value, str | int | float | bool)]
    yield from rows(["", ""], scalars)
    for key, value in found.items():
        if key == "machine":
            continue
        if isinstance(value, dict):
            yield from rows([key, ""], [[name, count] for name, count in value.items()])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            columns = [*value[0]]
            yield from rows(columns, [[line.get(column, "") for column in columns] for line in value])


PEERS_HEADER = [
    "fault",
    "framework",
    "run",
    "after s",
    "trained",
    "counted",
    "MB up, down",
    "bytes s",
    "round s",
    "site 1 s",
    "load",
]


def peers() -> Iterator[str]:
    """The same faults given to others."""
    found = load("peers")
    yield from section("Beside other frameworks", "make reliability-peers", found)
    if found is None:
        return
    settings = found["settings"]
    yield (
        f"{settings['sites']} sites, a model of {settings['mb']:g} MB as float32, {settings['rounds']} rounds; "
        f"training adds known noise and is made to take {settings['training']:g} s. All processes are real, all "
        "settings the frameworks' defaults, as `bench/peers/frameworks.py` starts them; Mailboat sends float32, as the "
        "others do. "
        f"Site 1 has a link of {settings['mbit']:g} Mbit/s through a TCP proxy. The fault strikes when two fifths of "
        f"its second update have passed: *link down*, its connections are reset and new ones refused for "
        f"{settings['outage']:g} s; *server killed* and *site killed*, all its processes get SIGKILL at once and "
        f"are started again {settings['restart_s']:g} s later with the same command. A run that shows no progress "
        f"for a quarter of an hour is watched no longer."
    )
    yield ""
    yield from rows(PEERS_HEADER, _peers_rows(found["runs"]))
    yield (
        "*run*: how the framework says it ended. *trained*: finished trainings of each site; *counted*: how many of "
        "its updates are in the last global model, read from the model itself. *MB*: over the link of site 1. "
        "*bytes s*, *round s*, *site 1 s*: from the end of the fault (link back, process started) to the first "
        "bytes of site 1, to a newer model at any site, to a newer model at site 1; negative where rounds went on "
        "during the fault. *load*: how many processes wanted one of the machine's cores when the fault struck."
    )
    yield ""
    for remark in found.get("remarks", []):
        yield from (f"- {remark}", "")
    for again in found.get("again", []):
        yield from (again["words"], "")
        yield from rows(PEERS_HEADER, _peers_rows(again["runs"]))
        for remark in again["remarks"]:
            yield from (f"- {remark}", "")


def _peers_rows(runs: list[dict[str, Any]]) -> list[list[Any]]:
    return [
        [
            run["fault"],
            f"{run['framework']} {run['version']}".replace(" this tree", ""),
            run["verdict"],
            f"{run['took_s']:.0f}",
            " ".join(map(str, run["trained"])),
            " ".join(map(str, run["counted"])),
            f"{run['up_mb']:.0f}, {run['down_mb']:.0f}",
            *(_seconds(run[key]) for key in ("moving_s", "round_s", "site_1_s")),
            run["load"] or "-",
        ]
        for run in runs
    ]


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()
