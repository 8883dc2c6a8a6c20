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


@dataclass(frozen=True, slots=True)
class Template:
    """A line with slots in braces, and the section of the note in which it may stand."""

    section: str
    text: str


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
def load_templates(style: str) -> tuple[Template, ...]:
    """Return the lines of a style, one of `STYLES` or `common`."""
    pairs = (line.split(":", 1) for line in _lines(f"style-{style}"))
    return tuple(Template(section, text.strip()) for section, text in pairs)


def _parse_concept(line: str) -> Concept:
    preferred, others, short = line.split("|")
    return Concept(preferred.strip(), _split(others), _split(short))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())


def _lines(name: str) -> Iterator[str]:
    text = files("mailboat.synth").joinpath("words", f"{name}.txt").read_text(encoding="utf-8")
    return (line for line in text.splitlines() if line and not line.startswith("#"))
