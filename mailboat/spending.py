"""What privacy costs, for people: a site's ledger added up anew, and runs that have not begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from edge_client.privacy.ledger import LEDGER, Charge, Row, charges_of, read_ledger
from edge_client.privacy.metered import limits_of
from shared.config import FederationConfig, PrivacySection, SiteConfig, TrainingSection
from shared.configfile import parse_config
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Left:
    """A bound on what may be spent, and how much of it is left."""

    name: str
    epsilon: float
    left: float
    trainings: int | None
    """How many more of the last one's kind stay within it; None before the first."""


@dataclass(frozen=True, slots=True)
class Report:
    """A site's ledger; `epsilon` is that of all rows together, at `delta`."""

    site: str
    rows: tuple[Row, ...]
    epsilon: float
    delta: float | None
    """None when nothing was spent and nothing is private."""
    limits: tuple[Left, ...]

    @property
    def steps(self) -> int:
        """Steps of all trainings."""
        return sum(row.spent.charge.steps for row in self.rows)

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "site": self.site,
            "trainings": len(self.rows),
            "steps": self.steps,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "limits": [asdict(limit) for limit in self.limits],
            "rows": [row.model_dump(mode="json") for row in self.rows],
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a run that could be; None for what is not said. One of `epsilon` and `noise` is to be."""

    batch: int | None = None
    epochs: int | None = None
    versions: int | None = None
    delta: float | None = None
    epsilon: float | None = None
    noise: float | None = None

    def completed(self, federation: FederationConfig) -> Question:
        """The same with what is not said taken from a federation."""
        privacy, training = federation.privacy, federation.training
        free = self.epsilon is None and self.noise is None
        return Question(
            batch=self.batch or training.batch_size,
            epochs=self.epochs or training.epochs,
            versions=self.versions or federation.federation.versions,
            delta=self.delta or (privacy.delta if privacy else None),
            epsilon=privacy.target_epsilon if privacy and free else self.epsilon,
            noise=privacy.noise_multiplier if privacy and free else self.noise,
        )


@dataclass(frozen=True, slots=True)
class Scheme:
    """The answer: what each update costs, and what is spent after some of the versions."""

    records: int
    versions: int
    delta: float
    charge: Charge
    epsilons: Mapping[int, float]
    """By versions trained: one, half of them, all."""

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "records": self.records,
            "versions": self.versions,
            "delta": self.delta,
            **self.charge.model_dump(),
            "epsilon": self.epsilons[self.versions],
            "epsilons": {str(version): epsilon for version, epsilon in self.epsilons.items()},
        }


def read_report(site: SiteConfig, federation: FederationConfig) -> Report:
    """Read the ledger in a site's storage folder, and add it up at the federation's delta, or else at its own last.

    CorruptError when it is not what was written.
    """
    rows, _ = read_ledger(site.storage / LEDGER)
    last = rows[-1].spent if rows else None
    section = federation.privacy
    delta = section.delta if section is not None else last.delta if last is not None else None
    limits = limits_of(rows, site, federation)
    if last is None or delta is None:
        whole = tuple(Left(limit.name, limit.epsilon, limit.epsilon, None) for limit in limits)
        return Report(site.name, rows, 0.0, delta, whole)
    accounting = _accounting()
    left = tuple(
        Left(
            limit.name,
            limit.epsilon,
            max(0.0, limit.epsilon - accounting.epsilon_of(limit.charges, delta)),
            accounting.trainings_left(last.charge, limit, delta),
        )
        for limit in limits
    )
    return Report(site.name, rows, accounting.epsilon_of(charges_of(rows), delta), delta, left)


def make_scheme(asked: Question, records: int) -> Scheme:
    """Return what a run costs a site of so many records; ConfigError names what is not said or makes no sense."""
    batch, epochs, versions, delta = asked.batch, asked.epochs, asked.versions, asked.delta
    if batch is None or epochs is None or versions is None or delta is None:
        said = {"--batch": batch, "--epochs": epochs, "--versions": versions, "--delta": delta}
        missing = ", ".join(name for name, value in said.items() if value is None)
        raise ConfigError(f"{missing} not given", hint="give it, or --federation with a file that has it")
    if (asked.epsilon is None) == (asked.noise is None):
        raise ConfigError("one of --epsilon and --noise is needed", hint="the other one is worked out from it")
    section = {"delta": delta, "target_epsilon": asked.epsilon, "noise_multiplier": asked.noise}
    accounting = _accounting()
    charge = accounting.charge_of(
        parse_config(section, PrivacySection, "privacy"),
        parse_config({"batch_size": batch, "epochs": epochs}, TrainingSection, "training"),
        records=records,
        versions=versions,
    )
    after = sorted({1, -(-versions // 2), versions})
    epsilons = {version: accounting.epsilon_of([charge.times(version)], delta) for version in after}
    return Scheme(records, versions, delta, charge, epsilons)


def _accounting() -> ModuleType:
    """The accountant, which PyTorch comes with."""
    try:
        from edge_client.privacy import accounting
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed here", hint="pip install 'mailboat[edge]'"
        ) from None
    return accounting
