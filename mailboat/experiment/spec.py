"""What the files of an experiment say: `experiments/NAME.toml`, and the bases that it names.

A cell is one training with one outcome. It is said as a patch of federation.toml over a base, so that whatever a
federation file can say can be compared, without a line of code here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mailboat.synth.lexicon import SECTIONS
from shared.config import Positive, Section
from shared.configfile import load_config
from shared.errors import ConfigError

Patch = dict[str, Any]
"""Tables of federation.toml, laid over those of the base key by key."""

Method = Literal["federated", "centralized", "alone", "splitnn"]
PlotKind = Literal["bars", "bytes", "line", "rounds", "clock"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]

PLACE = "{x}"
"""Stands for the value of `vary` in any text of a cell."""


class NotesSection(Section):
    """The notes: synthetic ones, who has how many and how much sites differ; or a folder of real ones."""

    folder: Path | None = None
    """Notes that are there, in folders `site-1`, `site-2`, ... and `heldout`, and in `validation` those of the
    coordinator; of what follows only `sites` counts then. They are read where they are: no text is copied."""
    sites: int = Field(default=4, ge=1, le=64)
    notes: int | tuple[int, ...] = 48
    """Training notes of each site; a list gives each its own number, 0 for none."""
    alpha: Positive = 2.0
    """Dirichlet concentration of the label mix over the sites: smaller is more skewed."""
    foreign: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often a site writes a term that is another's, against one of its own."""
    heldout: int = Field(default=100, ge=1)
    """Notes that everything is scored on; nobody trains on them."""
    validation: int = Field(default=0, ge=0)
    """Further notes, drawn as the held-out ones, that the coordinator has for itself ([aggregation] quality)."""
    sections: int | None = Field(default=None, ge=1, le=len(SECTIONS))
    """Sections of each training note, any of its five; unset: all. Short notes, such as a patient's one report."""
    tested: tuple[int, ...] = ()
    """Numbers of the sites that the held-out notes are drawn from; empty: all in turn."""


class MachineSection(Section):
    """One site's machine and link, in the virtual time of a cell with a clock."""

    speed: Positive = 1.0
    """A local training takes train_s divided by this."""
    up_mbit: Positive | None = None
    down_mbit: Positive | None = None
    hours: tuple[float, float] | None = None
    """The link is there from the first to the second hour of each day; over midnight when the first is the later."""
    off_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the time for which the machine is off; what it was training is lost then."""
    off_s: Positive = 3600.0
    """Mean length of one time off; times on and off are drawn from exponential distributions."""


class ClockSection(Section):
    """Virtual time: what a local training and the links take, and who is away when."""

    train_s: Positive = 270.0
    """Seconds of one local training on a machine of speed 1."""
    up_mbit: Positive = 30.0
    down_mbit: Positive = 30.0
    model_scale: Positive = 1.0
    """Each byte takes as long as this many: the links of a model so many times as large."""
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 9.0
    days: Positive = 14.0
    """The run is given up after so long."""
    sites: dict[str, MachineSection] = Field(default_factory=dict)


class StartSection(Section):
    """Where a cell starts instead of at the base model: at what another federation left."""

    family: str = ""
    federation: Patch = Field(default_factory=dict)
    notes: Patch = Field(default_factory=dict)


class SplitSection(Section):
    """Split learning."""

    cut: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the blocks, from the bottom, that the client holds, with the embeddings."""


class CellSection(Section):
    """One row of the table, or with `vary` several; texts may hold {x}."""

    name: str
    method: Method = "federated"
    family: str = ""
    """Whose learning rate it takes: a key of the base's `rates`."""
    series: str = ""
    """The line of the plot that it belongs to."""
    x: float | str | None = None
    """Where it stands on the plot; what `vary` gives when there is no other."""
    vary: tuple[str | int | float, ...] = ()
    reference: bool = False
    """Savings are counted against this one."""
    federation: Patch = Field(default_factory=dict)
    site: Patch = Field(default_factory=dict)
    """Keys of site.toml, for every site."""
    sites: dict[str, Patch] = Field(default_factory=dict)
    """The same for one site, by its name."""
    notes: Patch = Field(default_factory=dict)
    clock: ClockSection | None = None
    start: StartSection | None = None
    split: SplitSection = SplitSection()
    zero_shot: bool = False
    """Train nothing: score what the cell starts from."""
    score_every: int = Field(default=1, ge=1)
    """Versions that are scored: each so-manieth, and the last."""
    paper: str = ""
    """What the paper says at this place."""
    bases: tuple[Name, ...] = ()
    """Only over these of the experiment's bases; empty: over all."""


class PlotSection(Section):
    """One picture."""

    kind: PlotKind
    title: str = ""
    x_label: str = ""
    x_log: bool = False
    series: tuple[str, ...] = ()
    """Only these; empty: all."""


class ExperimentSection(Section):
    """`experiments/NAME.toml`."""

    title: str
    question: str
    """What is asked, in a sentence or two; stands above the table."""
    bases: tuple[Name, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = (1, 2, 3)
    notes: Patch = Field(default_factory=dict)
    federation: Patch = Field(default_factory=dict)
    clock: ClockSection | None = None
    cells: tuple[CellSection, ...] = Field(min_length=1)
    plots: tuple[PlotSection, ...] = ()


class BaseSection(Section):
    """`experiments/bases/NAME.toml`: a model, its task, and the rates that suit each family of methods."""

    title: str
    model: str
    """`shipped`, `minilm`, a folder, or a hub id."""
    rates: dict[str, Positive] = Field(default_factory=dict)
    """Learning rate by family; found by a pilot on seeds that are not reported."""
    notes: Patch = Field(default_factory=dict)
    federation: Patch = Field(default_factory=dict)
    alone: Patch = Field(default_factory=dict)
    """Patch for one training from end to end: the methods centralized and alone."""


def load_experiment(folder: Path, name: str) -> ExperimentSection:
    """Read an experiment of `folder`, which holds NAME.toml; ConfigError lists those that there are."""
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(experiment_names(folder)) or "none"
        raise ConfigError(f"{folder} has no experiment {name}", hint=f"there are: {known}")
    return load_config(path, ExperimentSection)


def experiment_names(folder: Path) -> list[str]:
    """Return the names of the experiments in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_base(folder: Path, name: str) -> BaseSection:
    """Read a base from `folder`/bases; ConfigError when there is none of that name."""
    return load_config(folder / "bases" / f"{name}.toml", BaseSection)
