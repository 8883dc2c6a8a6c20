"""What a demonstration shows: facts in, a plain `Screen` or lines of text out. How it looks is decided in `live`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coordinator.records import Contribution
from coordinator.status import SiteStatus
from mailboat.console import measure_title
from mailboat.demo.facts import Facts, Score

NEWS_LINES = 8
Tone = str
"""A colour for rich: says at a glance whether a site works, waits, or is in trouble."""

_TONES: dict[str, Tone] = {
    "training": "green",
    "uploading": "cyan",
    "pulling": "cyan",
    "done": "bold green",
    "no link": "red",
    "killed": "bold red",
    "never started": "dim",
}
_WITH_PROGRESS = {"training"}


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One site's line; texts as they are shown."""

    name: str
    state: str
    tone: Tone
    version: str
    last_update: str
    up: str
    down: str
    reconnects: str
    score: str
    """On notes of its own that the site holds back."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Everything that is on the screen at one moment."""

    headline: str
    version: int
    target: int
    elapsed: str
    rows: tuple[SiteRow, ...]
    scores: tuple[tuple[int, Score], ...]
    """By version, ascending."""
    news: tuple[str, ...]


def build(facts: Facts, *, headline: str, target: int, news: tuple[str, ...], elapsed_s: float) -> Screen:
    """Return the screen for these facts; `headline` says which part of the demonstration goes on."""
    return Screen(
        headline=headline,
        version=facts.version,
        target=target,
        elapsed=clock(elapsed_s),
        rows=tuple(_row(facts, name) for name in facts.processes),
        scores=tuple(sorted(facts.scores.items())),
        news=news[-NEWS_LINES:],
    )


def _row(facts: Facts, name: str) -> SiteRow:
    status = facts.site(name)
    state = site_state(facts, name)
    traffic = facts.traffic.get(name)
    last = _last_contribution(facts, name)
    return SiteRow(
        name=name,
        state=_shown(facts, name),
        tone=_TONES.get(state, "yellow"),
        version=_dash(status.version if status else None),
        last_update=_lateness(*last) if last else "-",
        up=size(traffic.up.total) if traffic else "-",
        down=size(traffic.down.total) if traffic else "-",
        reconnects=_dash(status.reconnects if status else None),
        score=_local(facts, status),
    )


def site_state(facts: Facts, name: str) -> str:
    """Return in a word or two what a site is doing."""
    process, status = facts.processes[name], facts.site(name)
    if process == "absent":
        return "never started"
    if process == "killed":
        return "killed"
    if process == "ended":
        return "done"
    if status is None or status.phase is None:
        return "starting"
    return status.phase if status.present or status.phase == "done" else "no link"


def describe_sites(facts: Facts, names: Iterable[str]) -> str:
    """Return one line that says what each of these sites is doing."""
    return ", ".join(f"{name} ({_shown(facts, name)})" for name in names)


def summary(facts: Facts) -> str:
    """Return one line that says what goes on, for when nothing happens."""
    if facts.finished and all(state in {"ended", "absent"} for state in facts.processes.values()):
        return f"{len(facts.scores)} of {len(facts.versions) + 1} versions are scored"
    return describe_sites(facts, facts.processes)


def _shown(facts: Facts, name: str) -> str:
    state, status = site_state(facts, name), facts.site(name)
    return f"{state} {status.progress:.0%}" if status and state in _WITH_PROGRESS else state


def _last_contribution(facts: Facts, name: str) -> tuple[int, Contribution] | None:
    """The newest version that this site had a part in, and that part."""
    for version in reversed(facts.versions):
        for part in version.contributions:
            if part.site == name:
                return version.version, part
    return None


def _lateness(version: int, part: Contribution) -> str:
    return f"v{version}, {_late(part.staleness)}"


def _late(staleness: int) -> str:
    return "fresh" if staleness == 0 else f"{staleness} late"


def _dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _local(facts: Facts, status: SiteStatus | None) -> str:
    """The site's own measure of the name that versions are compared by, which is known once one is scored."""
    names = {score.name for score in facts.scores.values()}
    value = next((value for name, value in status.metrics.items() if name in names), None) if status else None
    return "-" if value is None else points(value)


# -- words for numbers ---


def clock(seconds: float) -> str:
    """2:05 for 125 seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes for people, decimal units: 1.25 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def points(f1: float) -> str:
    """An F1 as it is usually given: 61.2 for 0.612."""
    return f"{100 * f1:.1f}"


def told(score: Score) -> str:
    """All measures of a score in words, the main one by its full name: strict F1 61.2, lenient 70.3."""
    first, *others = ((measure_title(name), points(value)) for name, value in score.measures.items())
    return ", ".join([" ".join(first), *(f"{title.removesuffix(' F1')} {value}" for title, value in others)])


# -- one line per event ---


def narrate(before: Facts, after: Facts) -> tuple[str, ...]:
    """Return a line for each thing that happened between two moments, in the order in which it matters."""
    return (
        *_site_lines(before, after),
        *_update_lines(before, after),
        *_version_lines(before, after),
        *_score_lines(before, after),
    )


def _site_lines(before: Facts, after: Facts) -> Iterator[str]:
    for name, process in after.processes.items():
        if process == "absent":
            continue
        was, now = before.site(name), after.site(name)
        present_before, present_now = bool(was and was.present), bool(now and now.present)
        if present_now and not present_before:
            yield f"{name}: connected again" if was and was.phase is not None else f"{name}: connected"
        elif present_before and not present_now and not after.finished:
            yield f"{name}: lost its link"


def _update_lines(before: Facts, after: Facts) -> Iterator[str]:
    for update in after.accepted[len(before.accepted) :]:
        yield f"{update.site}: update on version {update.base_version} is durable ({update.examples} examples)"
    for refused in after.rejected[len(before.rejected) :]:
        yield f"{refused.site}: update refused, rule {refused.rule}"


def _version_lines(before: Facts, after: Facts) -> Iterator[str]:
    for version in after.versions[len(before.versions) :]:
        parts = ", ".join(
            part.site if part.staleness == 0 else f"{part.site} ({_late(part.staleness)})"
            for part in version.contributions
        )
        yield f"version {version.version} published: {parts}"
    if after.finished and not before.finished:
        yield f"the run is complete at version {after.version}"


def _score_lines(before: Facts, after: Facts) -> Iterator[str]:
    for version in sorted(after.scores.keys() - before.scores.keys()):
        name = "base model" if version == 0 else f"version {version}"
        yield f"{name}: {told(after.scores[version])} on the held-out notes"
