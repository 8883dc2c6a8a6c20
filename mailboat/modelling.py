"""What commands do with a model: write a version out, and score one. PyTorch is loaded in here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mailboat.console import measure_title
from shared.config import FederationConfig
from shared.errors import ConfigError
from shared.states import open_state
from shared.store import FrameStore

if TYPE_CHECKING:
    from coordinator.views import VersionView
    from edge_client.model import LoadedModel
    from edge_client.tasks import Scores


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores of one model on one set of notes."""

    notes: int
    skipped: int
    scores: Scores

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        labels = {name: dict(measures) for name, measures in self.scores.labels.items()}
        return {"notes": self.notes, "skipped": self.skipped, **self.scores.overall, "labels": labels}

    def lines(self, subject: str) -> Iterator[str]:
        """Lines for people, in percent."""
        skipped = f", {self.skipped} left out as unreadable" if self.skipped else ""
        yield f"{subject} on {self.notes} notes{skipped}"
        overall, labels = {"all labels": self.scores.overall}, self.scores.labels
        if any(measures.keys() != self.scores.overall.keys() for measures in labels.values()):
            yield from (*_table(overall), *_table(labels))
        else:
            yield from _table({**overall, **labels})


def _table(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A line of titles and one for each row, all of which have the same measures."""
    first = next(iter(rows.values()))
    wide = max(12, *(len(name) for name in rows))
    titles = [measure_title(name) for name in first]
    yield f"{'':{wide}s} " + "  ".join(titles)
    for row, measures in rows.items():
        values = zip(titles, measures.values(), strict=True)
        yield f"{row:{wide}s} " + "  ".join(f"{100 * value:{max(6, len(title))}.2f}" for title, value in values)


def export_version(storage: Path, federation: FederationConfig, version: VersionView, out: Path) -> None:
    """Write the base model with the published tensors of a version to the folder `out`, in Hugging Face's layout."""
    from edge_client.model import export

    export(_with_state(storage, federation, version), out)


def score_version(
    storage: Path, federation: FederationConfig, version: VersionView, notes: Path, *, skip_bad: bool
) -> Measured:
    """Score a published version on the notes under `notes`."""
    return _score(_with_state(storage, federation, version), federation, notes, skip_bad=skip_bad)


def score_model(folder: Path, federation: FederationConfig, notes: Path, *, skip_bad: bool) -> Measured:
    """Score the model in `folder` on the notes under `notes`."""
    return _score(_load(folder, federation), federation, notes, skip_bad=skip_bad)


def _load(source: str | Path, federation: FederationConfig) -> LoadedModel:
    try:
        from edge_client.model import load_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed here", hint="pip install 'mailboat[edge]'"
        ) from None
    return load_model(source, federation)


def _with_state(storage: Path, federation: FederationConfig, version: VersionView) -> LoadedModel:
    loaded = _load(federation.model.base, federation)
    from edge_client.model import apply_state

    apply_state(loaded, dict(open_state(FrameStore(storage / "states"), version.parts)))
    return loaded


def _score(loaded: LoadedModel, federation: FederationConfig, notes: Path, *, skip_bad: bool) -> Measured:
    from edge_client.data.load import load_notes
    from edge_client.trainer import EVALUATION_BATCH, evaluate, make_dataset

    found = load_notes(notes, loaded.task, skip_bad=skip_bad)
    dataset = make_dataset(loaded, found.notes, batch_size=EVALUATION_BATCH, seed=federation.federation.seed)
    return Measured(len(found.notes), found.skipped, evaluate(loaded, dataset))
