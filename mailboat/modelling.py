"""What commands do with a model: write a version out, and score one. PyTorch is loaded in here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.masters import TensorFile, file_sha256, master_path
from coordinator.views import VersionView
from mailboat.console import measure_title
from shared.config import AdapterSection, FederationConfig
from shared.errors import ConfigError, CorruptError
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


def export_version(
    storage: Path, federation: FederationConfig, version: VersionView, out: Path, *, merged: bool = False
) -> None:
    """Write the base model with the published tensors of a version to the folder `out`, in Hugging Face's layout.

    A federation that trains adapters writes these, as peft reads them; with `merged` the model with them folded in.
    """
    _write(_with_state(storage, federation, version), federation, out, merged=merged)


def export_master(
    storage: Path, federation: FederationConfig, version: VersionView, out: Path, *, merged: bool = False
) -> None:
    """Write what `export_version` does, with the coordinator's float32 master of a version, which no site was sent.

    ConfigError when its master is no longer here, CorruptError when it is not what the journal recorded.
    """
    path = master_path(storage / "masters", version.version)
    if not path.exists():
        raise ConfigError(
            f"the master of version {version.version} is not here any more",
            hint="those of the newest two versions and of version 0 are; leave --full-precision out, or --version",
        )
    if file_sha256(path) != version.master_sha256:
        raise CorruptError(f"{path} is not what the journal says was written", hint="see: mailboat coordinator fsck")
    loaded = _load(federation.model.base, federation)
    from edge_client.model import apply_state

    with TensorFile(path) as tensors:
        apply_state(loaded, dict(tensors))
    _write(loaded, federation, out, merged=merged)


def _write(loaded: LoadedModel, federation: FederationConfig, out: Path, *, merged: bool) -> None:
    from edge_client.adapter_folder import write_adapters
    from edge_client.model import export

    if federation.adapter.used and not merged:
        write_adapters(loaded, federation.model, out)
    else:
        export(loaded, out)


def score_version(
    storage: Path, federation: FederationConfig, version: VersionView, notes: Path, *, skip_bad: bool
) -> Measured:
    """Score a published version on the notes under `notes`."""
    return _score(_with_state(storage, federation, version), federation, notes, skip_bad=skip_bad)


def score_model(folder: Path, federation: FederationConfig, notes: Path, *, skip_bad: bool) -> Measured:
    """Score the model in `folder`, or the base model with the adapters in it, on the notes under `notes`."""
    return _score(_load_folder(folder, federation), federation, notes, skip_bad=skip_bad)


def _load(source: str | Path, federation: FederationConfig) -> LoadedModel:
    try:
        from edge_client.model import load_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed here", hint="pip install 'mailboat[edge]'"
        ) from None
    return load_model(source, federation)


def _load_folder(folder: Path, federation: FederationConfig) -> LoadedModel:
    """What `export_version` wrote, in either form."""
    if not federation.adapter.used:
        return _load(folder, federation)
    if not (folder / "adapter_config.json").exists():
        # The adapters are in the weights, which are thus not those that everybody started from.
        whole = {"adapter": AdapterSection(), "model": federation.model.model_copy(update={"frozen_sha256": None})}
        return _load(folder, federation.model_copy(update=whole))
    loaded = _load(federation.model.base, federation)
    from edge_client.adapter_folder import read_adapters

    read_adapters(loaded, folder)
    return loaded


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
