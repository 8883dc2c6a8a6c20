"""What commands do with a model: write a version out, and score one. PyTorch is loaded in here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.masters import TensorFile, master_path
from mailboat.about import base_name, provenance, write_about
from mailboat.console import measure_title
from mailboat.subject import Subject
from shared.config import AdapterSection, ComputeSection, FederationConfig
from shared.configfile import parse_config
from shared.digest import file_digest
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.states import check_state_digest, open_state
from shared.store import FrameStore

if TYPE_CHECKING:
    from edge_client.model import LoadedModel, State
    from edge_client.tasks import Scores

_PROCESSOR = ComputeSection(device="cpu")
"""For what is written out as it is, and never computed with."""


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


def export_state(subject: Subject, out: Path, *, merged: bool = False, full_precision: bool = False) -> tuple[str, ...]:
    """Write the base model with the tensors of a state, and where it comes from, to `out`, in Hugging Face's layout.

    A federation that trains adapters writes these, as peft reads them; with `merged` the model with them folded in.
    With `full_precision` they are those of the coordinator's float32 master, which no site was sent: ConfigError when
    that is no longer here, CorruptError when it is not what the journal recorded. Return the names of the tensors that
    stay at their sites: those in `out` are the site's own, or, when the subject is a coordinator's, as everybody begins
    with them.
    """
    loaded = _with_state(subject, full_precision=full_precision)
    from edge_client.adapter_folder import write_adapters
    from edge_client.model import export, seal

    adapters = subject.federation.adapter.used and not merged
    if adapters:
        write_adapters(loaded, subject.federation.model, out)
    else:
        export(loaded, out)
    found = provenance(subject, seal(loaded, subject.federation), subject.run, full_precision=full_precision)
    write_about(out, subject.federation, found, adapters=adapters)
    return tuple(loaded.personal)


def score_state(subject: Subject, notes: Path, *, compute: ComputeSection, skip_bad: bool) -> Measured:
    """Score a state on the notes under `notes`."""
    return _score(_with_state(subject, compute=compute), subject.federation, notes, skip_bad=skip_bad)


def score_model(
    folder: Path, federation: FederationConfig, notes: Path, *, compute: ComputeSection, skip_bad: bool
) -> Measured:
    """Score the model in `folder`, or the base model with the adapters in it, on the notes under `notes`."""
    return _score(load_folder(folder, federation, compute), federation, notes, skip_bad=skip_bad)


def on_device(device: str) -> ComputeSection:
    """Return what `--device` asks for; ConfigError when it names none."""
    return parse_config({"device": device}, ComputeSection, "the command line")


def _load(source: str | Path, federation: FederationConfig, compute: ComputeSection) -> LoadedModel:
    try:
        from edge_client.device import find_device
        from edge_client.model import load_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed here", hint="pip install 'mailboat[edge]'"
        ) from None
    return load_model(source, federation, device=find_device(compute))


def load_folder(folder: Path, federation: FederationConfig, compute: ComputeSection) -> LoadedModel:
    """Load what `export_state` wrote, in either form; errors as `find_device`, `load_model` and `read_adapters`.

    ConfigError when adapters' base model is not where the federation says.
    """
    if not federation.adapter.used:
        return _load(folder, federation, compute)
    if not (folder / "adapter_config.json").exists():
        # The adapters are in the weights, which are thus not those that everybody started from.
        whole = {"adapter": AdapterSection(), "model": federation.model.model_copy(update={"frozen_sha256": None})}
        return _load(folder, federation.model_copy(update=whole), compute)
    base = federation.model.base
    if base_name(base) != base and not Path(base).expanduser().is_dir():
        raise ConfigError(
            f"{folder} holds adapters, and their base model is not at {base}",
            hint="name its folder here: predict --base, or [model] base in federation.toml",
        )
    loaded = _load(base, federation, compute)
    from edge_client.adapter_folder import read_adapters

    read_adapters(loaded, folder)
    return loaded


def _with_state(subject: Subject, *, full_precision: bool = False, compute: ComputeSection = _PROCESSOR) -> LoadedModel:
    loaded = _load(subject.source, subject.federation, compute)
    from edge_client.model import apply_state, read_personal, seal
    from edge_client.outbox import newest_own
    from edge_client.statefile import read_own

    own = newest_own(subject.storage) if subject.site else None
    personal = read_personal(loaded) if own is None else read_own(own, seal(loaded, subject.federation).fingerprint)
    apply_state(loaded, {**(_master(subject) if full_precision else _state(subject)), **personal})
    return loaded


def _state(subject: Subject) -> State:
    store = FrameStore(subject.storage / "states")
    check_state_digest(store, subject.parts)  # a site that has finished has never unpacked its last one
    return dict(open_state(store, subject.parts))


def _master(subject: Subject) -> State:
    version = subject.state.version
    path = master_path(subject.storage / "masters", version)
    with suppress(FileNotFoundError, RefusedError, ValueError):
        with TensorFile(path) as file:
            tensors = dict(file)
        # Compared afterwards: while a coordinator runs, a later version may be written over it meanwhile.
        if file_digest(path) == subject.master_digest:
            return tensors
    if not path.exists():
        raise ConfigError(
            f"the master of version {version} is not here any more",
            hint="those of the newest two versions and of version 0 are; leave --full-precision out, or --version",
        )
    raise CorruptError(f"{path} is not what the journal says was written", hint="see: mailboat coordinator fsck")


def _score(loaded: LoadedModel, federation: FederationConfig, notes: Path, *, skip_bad: bool) -> Measured:
    from edge_client.data.load import load_notes
    from edge_client.trainer import EVALUATION_BATCH, evaluate, make_dataset

    found = load_notes(notes, loaded.task, skip_bad=skip_bad)
    dataset = make_dataset(loaded, found.notes, batch_size=EVALUATION_BATCH, seed=federation.federation.seed)
    return Measured(len(found.notes), found.skipped, evaluate(loaded, dataset))
