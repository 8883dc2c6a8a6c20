"""The words of the synthetic notes, read from the text files in `words/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

LABELS = ("problem", "treatment", "test")
SECTIONS = ("complaint", "history", "course", "data", "plan")
STYLES = ("narrative", "terse", "dictated", "checklist")


@dataclass(frozen=True, slots=True)
class Concept:
    """One clinical idea and the ways to write it; `others` and `short` may be empty."""

    preferred: str
    others: tuple[str, ...]
    short: tuple[str, ...]


@cache
def load_concepts() -> Mapping[str, tuple[Concept, ...]]:
    """Return the concepts of each label."""
    return MappingProxyType({label: tuple(_parse_concept(line) for line in _lines(label)) for label in LABELS})


@cache
def load_lists(name: str) -> Mapping[str, tuple[str, ...]]:
    """Return the named lists of a file of `key: word ; word` lines."""
    pairs = (line.split(":", 1) for line in _lines(name))
    return MappingProxyType({key: _split(words) for key, words in pairs})


@cache
def load_lines(name: str) -> Mapping[str, tuple[str, ...]]:
    """Return the lines of a file of `key: line` lines, by their key."""
    lines: dict[str, list[str]] = {}
    for row in _lines(name):
        key, text = row.split(":", 1)
        lines.setdefault(key, []).append(text.strip())
    return MappingProxyType({key: tuple(texts) for key, texts in lines.items()})


def _parse_concept(line: str) -> Concept:
    preferred, others, short = line.split("|")
    return Concept(preferred.strip(), _split(others), _split(short))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())


def _lines(name: str) -> Iterator[str]:
    text = files("mailboat.synth").joinpath("words", f"{name}.txt").read_text(encoding="utf-8")
    return (line for line in text.splitlines() if line and not line.startswith("#"))
