"""From the files of an experiment to its cells: each one a training whose settings are complete.

What a cell's file cannot mean here (a key that this release does not know, a rate that the base does not give) is not
dropped: the cell is there, with the problem in words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from mailboat.experiment.digests import model_digest, model_source, tree_digest
from mailboat.experiment.spec import (
    PLACE,
    BaseSection,
    CellSection,
    ClockSection,
    ExperimentSection,
    Method,
    NotesSection,
    Patch,
    SplitSection,
    load_base,
    load_experiment,
)
from shared.config import FederationConfig, Section
from shared.configfile import parse_config
from shared.errors import ConfigError

SCHEMA_VERSION = 1
"""Of the settings that a digest is made of: raised when the same settings come to mean something else."""

POOLED = "pooled"
"""The one site of a centralized training."""


class Stage(Section):
    """One federation and its notes; `federation.model.base` is a folder or hub id."""

    federation: FederationConfig
    notes: NotesSection


class Settings(Section):
    """All that the outcome of a cell depends on, besides the code and the model's weights."""

    method: Method
    seed: int
    stage: Stage
    site: Patch = Field(default_factory=dict)
    """Keys of site.toml, for every site."""
    sites: dict[str, Patch] = Field(default_factory=dict)
    """The same for one site, by its name."""
    clock: ClockSection | None = None
    start: Stage | None = None
    """A federation that is trained first; the cell starts from its last version."""
    split: SplitSection = SplitSection()
    zero_shot: bool = False
    score_every: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of what is not left at its default, of the model its weights' digest.

        Keys that a later release adds leave it as it is, as long as they keep their defaults.
        """
        said = self.model_dump(mode="json", exclude_defaults=True, exclude={"split"})
        if self.method == "splitnn":
            said["split"] = self.split.model_dump(mode="json")
        said["model"] = model_digest(self.stage.federation.model.base)
        for stage in (said[each] for each in ("stage", "start") if each in said):
            stage["federation"]["model"].pop("base", None)
            if (folder := stage.get("notes", {}).get("folder")) is not None:
                stage["notes"]["folder"] = tree_digest(Path(folder))
        canonical = json.dumps({"schema": SCHEMA_VERSION, **said}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table for one seed; `settings` is None where `problem` says why there are none."""

    base: str
    name: str
    seed: int
    section: CellSection
    settings: Settings | None
    problem: str = ""

    @property
    def row(self) -> tuple[str, str]:
        """What the cells of one row have in common: base and name."""
        return self.base, self.name

    @property
    def title(self) -> str:
        """The cell in a line."""
        return f"{self.base}: {self.name}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment with all its cells, in the order of the table."""

    name: str
    section: ExperimentSection
    bases: Mapping[str, BaseSection]
    cells: tuple[Cell, ...]


def read_experiment(folder: Path, name: str) -> Experiment:
    """Read experiment `name` of `folder` and the bases it names; ConfigError names what is wrong with the files."""
    section = load_experiment(folder, name)
    bases = {base: load_base(folder, base) for base in section.bases}
    found = tuple(_cells(section, bases))
    doubled = {cell.row for cell in found if sum(cell.row == other.row for other in found) > len(section.seeds)}
    if doubled:
        raise ConfigError(f"{folder / name}.toml: two cells are named {min(doubled)[1]!r}", hint="give each its name")
    return Experiment(name, section, bases, found)


def _cells(section: ExperimentSection, bases: Mapping[str, BaseSection]) -> Iterator[Cell]:
    for base_name, base in bases.items():
        for template in section.cells:
            if template.bases and base_name not in template.bases:
                continue
            for said in _varied(template):
                for seed in section.seeds:
                    yield _cell(section, base_name, base, said, seed)


def _varied(template: CellSection) -> Iterator[CellSection]:
    """The cell itself, or with `vary` one for each value, put where {x} stands."""
    if not template.vary:
        yield template
        return
    fields = template.model_dump(exclude_defaults=True, exclude={"vary"})
    for value in template.vary:
        x = fields.get("x", value if isinstance(value, int | float) else None)
        yield CellSection.model_validate(_filled({**fields, "x": x}, value))


def _filled(said: Any, value: str | float) -> Any:
    """`said` with the value in the place of {x}; where a text is nothing else, the value as it is."""
    match said:
        case dict():
            return {key: _filled(each, value) for key, each in said.items()}
        case list() | tuple():
            return [_filled(each, value) for each in said]
        case str() if said == PLACE:
            return value
        case str():
            return said.replace(PLACE, str(value))
        case _:
            return said


def _cell(section: ExperimentSection, base_name: str, base: BaseSection, said: CellSection, seed: int) -> Cell:
    try:
        settings = _settings(section, base, said, seed)
    except ConfigError as error:
        return Cell(base_name, said.name, seed, said, None, error.message)
    return Cell(base_name, said.name, seed, said, settings)


def _settings(section: ExperimentSection, base: BaseSection, said: CellSection, seed: int) -> Settings:
    alone = base.alone if said.method in {"centralized", "alone"} else {}
    stage = _stage(
        base,
        [base.federation, section.federation, alone, _rate(base, said.family), said.federation],
        [base.notes, section.notes, said.notes],
        seed,
        pooled=said.method == "centralized",
    )
    _check_fits(said, stage.federation)
    strangers = sorted(said.sites.keys() - set(stage.federation.federation.sites))
    if strangers:
        raise ConfigError(f"sites.{strangers[0]}: no such site takes part")
    start = None
    if said.start is not None:
        start = _stage(
            base,
            [base.federation, section.federation, _rate(base, said.start.family), said.start.federation],
            [base.notes, section.notes, said.start.notes],
            seed,
        )
    return Settings(
        method=said.method,
        seed=seed,
        stage=stage,
        site=said.site,
        sites=said.sites,
        clock=said.clock or section.clock if said.method == "federated" else None,
        start=start,
        split=said.split,
        zero_shot=said.zero_shot,
        score_every=said.score_every,
    )


def _check_fits(said: CellSection, federation: FederationConfig) -> None:
    """Raise ConfigError for what has a meaning in a real run, and in a cell none or another one."""
    if federation.keeps_at_sites and (said.zero_shot or said.method == "splitnn"):
        what = "zero_shot scores" if said.zero_shot else "split learning trains"
        raise ConfigError(f"{what} one model for all, and of this one tensors stay at each site")


def _rate(base: BaseSection, family: str) -> Patch:
    if not family:
        return {}
    if family not in base.rates:
        raise ConfigError(f"the base {base.title} has no learning rate for the family {family}")
    return {"training": {"lr": base.rates[family]}}


def _stage(base: BaseSection, patches: list[Patch], notes: list[Patch], seed: int, *, pooled: bool = False) -> Stage:
    found = parse_config(merged(*notes), NotesSection, "notes")
    names = (POOLED,) if pooled else participants(found)
    said = merged(*patches)
    given = said.get("federation", {})
    fixed: Patch = {
        "federation": {"name": "experiment", "seed": seed, "sites": list(names), **given},
        "model": {"base": model_source(base.model)},
    }
    section = said.get("aggregation", {})
    if section.get("mode", "sync") == "sync" and "quorum" not in section:
        fixed["aggregation"] = {"quorum": len(names)}
    return Stage(federation=parse_config(merged(said, fixed), FederationConfig, "federation"), notes=found)


def participants(notes: NotesSection) -> tuple[str, ...]:
    """Return the names of the sites that have notes."""
    if notes.folder is not None:
        return tuple(f"site-{number}" for number in range(1, notes.sites + 1))
    counts = (notes.notes,) * notes.sites if isinstance(notes.notes, int) else notes.notes
    return tuple(f"site-{number}" for number, count in enumerate(counts, start=1) if count)


def merged(*patches: Patch) -> Patch:
    """Return the tables laid over each other: of two values under one key the later counts, tables are merged."""
    result: Patch = {}
    for patch in patches:
        for key, value in patch.items():
            before = result.get(key)
            result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result
