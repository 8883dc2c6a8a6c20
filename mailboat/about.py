"""What an exported model says of itself: `mailboat.json` for programs, README.md for people.

Everything stands in the journal, in the sealed plan or in federation.toml; an update's own words (what its trainings
have cost) count only if its manifest is the one that the journal recorded. How good the model is stands nowhere:
whoever uses it measures that on notes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from coordinator.views import RunView, UpdateLife
from mailboat.files import making
from shared.config import FederationConfig
from shared.errors import ConfigError, CorruptError
from shared.manifest import describe_invalid
from shared.store import FrameStore

if TYPE_CHECKING:
    from mailboat.subject import Subject
    from shared.plan import SealedPlan

FACTS = "mailboat.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Part:
    """What one site had in a version and those before it."""

    site: str
    updates: int
    """Updates merged."""
    examples: int | None
    """Of its largest update; None where the journal has summed it up."""
    epsilon: float | None
    """What its trainings had cost each record by its costliest update here, at `delta`; None where it told of none."""
    delta: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """One merge."""

    version: int
    at: float
    """Unix seconds."""
    updates: int
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an exported model comes from."""

    federation: str
    fingerprint: str
    base: str
    frozen_sha256: str
    architecture: str
    version: int
    file: str
    """What was exported: the published state, or the float32 master."""
    file_digest: str
    trained_parameters: int
    total_parameters: int
    layers: tuple[int, ...]
    personal: tuple[str, ...]
    site: str | None
    """Whose own the personal tensors are; None where they are as everybody began with them."""
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    software: str


def provenance(subject: Subject, plan: SealedPlan, run: RunView | None, *, full_precision: bool) -> Provenance:
    """Put together what is known of a version; a site, which has no journal (`run`), knows of no other's part."""
    state = subject.state
    number, federation = state.version, subject.federation
    merged = [life for life in run.updates.values() if _counts(life, number)] if run else []
    return Provenance(
        federation=federation.federation.name,
        fingerprint=plan.fingerprint,
        base=base_name(federation.model.base),
        frozen_sha256=plan.frozen_sha256,
        architecture=plan.architecture,
        version=number,
        file="float32 master" if full_precision else "published state",
        file_digest=(subject.master_digest or "") if full_precision else state.leads_to,
        trained_parameters=plan.trained_parameters,
        total_parameters=plan.total_parameters,
        layers=plan.layers,
        personal=tuple(plan.personal),
        site=subject.site,
        parts=tuple(_parts(subject.storage, merged)),
        steps=tuple(_steps(run, number)) if run else (),
        software=f"mailboat {version_of('mailboat')}",
    )


def base_name(base: str) -> str:
    """Return the name of a base model: an id of the hub, or the last part of a folder's path."""
    return Path(base).name if Path(base).is_absolute() or base.startswith((".", "~")) else base


def write_about(out: Path, federation: FederationConfig, found: Provenance, *, adapters: bool) -> None:
    """Write both files to the folder of an exported model; UnavailableError when it takes none."""
    facts = {
        "provenance": asdict(found),
        "seed": federation.federation.seed,
        "task": federation.task.model_dump(mode="json"),
        "layers": federation.layers.model_dump(mode="json"),
        "adapter": federation.adapter.model_dump(mode="json") if adapters else {},
        # Adapters are nothing without it; a whole model needs no path of another machine.
        "model": {"base": federation.model.base if adapters else found.base, "revision": federation.model.revision},
    }
    with making(out):
        (out / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (out / CARD).write_text("\n".join(card(federation, found, adapters=adapters)) + "\n", encoding="utf-8")


def federation_of(folder: Path) -> FederationConfig:
    """Return what `write_about` said of task, layers and adapters; ConfigError when it is not there or not sound.

    Whoever puts the adapters of a folder onto another base model than theirs is refused: its hash is agreed on.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder", hint="`mailboat export` writes one")
    path = folder / FACTS
    try:
        said: Any = json.loads(path.read_bytes())
        wanted = {key: said[key] for key in ("task", "layers", "adapter", "model")}
        name, seed = said["provenance"]["federation"], said["seed"]
        if wanted["adapter"]:
            wanted["model"] = {**wanted["model"], "frozen_sha256": said["provenance"]["frozen_sha256"]}
        return FederationConfig.model_validate({"federation": {"name": name, "seed": seed}, **wanted})
    except FileNotFoundError:
        hint = "name the federation file whose task the model learnt: --federation"
        raise ConfigError(f"{folder} has no {FACTS}, which `mailboat export` writes", hint=hint) from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_invalid(FACTS, error)}", hint="export the model again") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not what `mailboat export` writes", hint="export the model again") from None


def card(federation: FederationConfig, found: Provenance, *, adapters: bool) -> Iterator[str]:
    """Yield the lines of README.md."""
    task = federation.task
    yield from ("---", f"base_model: {json.dumps(found.base)}")
    yield from (
        f"library_name: {'peft' if adapters else 'transformers'}",
        "tags: [mailboat, federated-learning]",
        "---",
    )
    yield from ("", f"# {found.federation}, version {found.version}", "")
    kind, labels = "Adapters" if adapters else "A model", ", ".join(f"`{label}`" for label in task.labels)
    yield (
        f"{kind} for the task `{task.kind}` with the labels {labels}, fine-tuned from {found.base} by a federation. "
        f"The notes stayed with those who have them; what travelled were changes of {found.trained_parameters:,} of "
        f"{found.total_parameters:,} parameters."
    )
    yield from ("", "## Where it comes from", "", "| | |", "|---|---|")
    for name, value in _facts(found):
        yield f"| {name} | {value} |"
    yield from _sites(found)
    yield from _privacy(federation, found)
    yield from ("", "## How to use it", "", *_usage(federation, adapters=adapters))
    yield from ("", "## Limits", "", *(f"- {limit}" for limit in _limits(found)))


def _facts(found: Provenance) -> Iterator[tuple[str, str]]:
    yield "base model", f"{found.base}, frozen weights SHA-256 `{found.frozen_sha256}`"
    yield "class", f"`{found.architecture}`"
    yield "trained blocks", f"{', '.join(map(str, found.layers))}, counted from 0 at the bottom"
    yield "federation", f"{found.federation}, fingerprint `{found.fingerprint}`"
    yield f"{found.file} of version {found.version}", f"BLAKE3 `{found.file_digest}`"
    if found.personal:
        whose = f"of {found.site}" if found.site else "as every site began with them, since each keeps its own"
        yield "personal tensors", f"{len(found.personal)}, {whose}"
    yield "written by", found.software


def _sites(found: Provenance) -> Iterator[str]:
    if found.site is not None:
        yield from ("", f"Exported at {found.site}, which knows of no other site's part.")
        return
    yield from ("", "## Who took part", "")
    if not found.parts:
        yield "Nobody yet: this is version 0, the base model with a new head."
        return
    yield from ("| site | updates merged | examples of its largest |", "|---|---|---|")
    for part in found.parts:
        yield f"| {part.site} | {part.updates} | {'not kept' if part.examples is None else f'{part.examples:,}'} |"
    if found.steps:
        yield from ("", "| version | merged (UTC) | updates | sites |", "|---|---|---|---|")
    for step in found.steps:
        at = datetime.fromtimestamp(step.at, tz=UTC).strftime("%Y-%m-%d %H:%M")
        yield f"| {step.version} | {at} | {step.updates} | {', '.join(step.sites)} |"


def _privacy(federation: FederationConfig, found: Provenance) -> Iterator[str]:
    yield from ("", "## Privacy", "")
    if federation.privacy is None:
        yield "Trained without differential privacy: what single notes have left in the weights is not bounded."
        return
    yield "Trained under record-level differential privacy at each site, by each site's own ledger:"
    yield ""
    for part in found.parts:
        told = "told of no cost" if part.epsilon is None else f"epsilon {part.epsilon:.4g} at delta {part.delta:g}"
        yield f"- {part.site}: {told}"
    if not found.parts:
        yield "- what it cost is in the ledgers of the sites"


def _usage(federation: FederationConfig, *, adapters: bool) -> Iterator[str]:
    base = " --base BASE" if adapters else ""
    yield from ("```", f"mailboat predict --model .{base} --notes NOTES --out FOUND.jsonl", "```", "")
    if adapters:
        yield "where BASE is the folder of the base model; another one than that above is refused."
    name, each, besides = _CLASSES.get(federation.task.kind, ("", 0, 0))
    if not name:
        yield f"It needs the package that brings the task `{federation.task.kind}`."
        return
    yield from ("Or, without Mailboat:", "", "```python")
    yield f"from transformers import {name}, AutoTokenizer"
    if adapters:
        wanted = f", num_labels={each * len(federation.task.labels) + besides}" if each else ""
        yield from ("from peft import PeftModel", "", f"base = {name}.from_pretrained(BASE{wanted})")
        yield 'model, tokenizer = PeftModel.from_pretrained(base, "."), AutoTokenizer.from_pretrained(".")'
    else:
        yield from ("", f'model, tokenizer = {name}.from_pretrained("."), AutoTokenizer.from_pretrained(".")')
    yield "```"


_CLASSES: Mapping[str, tuple[str, int, int]] = MappingProxyType(
    {
        "ner": ("AutoModelForTokenClassification", 2, 1),
        "classification": ("AutoModelForSequenceClassification", 1, 0),
        "multilabel": ("AutoModelForSequenceClassification", 1, 0),
        "extraction": ("AutoModelForCausalLM", 0, 0),
        "relations": ("AutoModelForCausalLM", 0, 0),
    }
)
"""Of each task the class of transformers that has its head, and how many classes each label makes, and how many more
there are: peft does not say it to the base model."""


def _limits(found: Provenance) -> Iterator[str]:
    yield "How good it is stands nowhere here. Measure it on annotated notes of your own: `mailboat evaluate`."
    yield "It has seen the notes of the sites above and of nobody else; other hospitals write differently."
    yield "It is not a medical device. What it finds has to be checked by people before it matters to a patient."
    if found.personal and found.site is None:
        yield "The personal tensors are untrained: for use at a site, export it there with `--site`."


def _counts(life: UpdateLife, version: int) -> bool:
    return life.fate == "merged" and life.version is not None and life.version <= version


def _parts(storage: Path, merged: list[UpdateLife]) -> Iterator[Part]:
    for site in sorted({life.site for life in merged}):
        lives = [life for life in merged if life.site == site]
        sizes = [life.examples for life in lives]
        # Not the last merged: one that comes out of quarantine tells of a time before others that were merged.
        told = max((_metrics(storage, life) for life in lives), key=lambda said: said.get("epsilon", 0.0))
        known = [size for size in sizes if size is not None]
        examples = max(known) if len(known) == len(sizes) else None
        yield Part(site, len(lives), examples, told.get("epsilon"), told.get("delta"))


def _metrics(storage: Path, life: UpdateLife) -> dict[str, float]:
    """What an update said of itself; nothing when its manifest is not here, or not what the journal recorded."""
    if not (storage / "updates").is_dir():
        return {}
    try:
        stored = FrameStore(storage / "updates").get(life.update_id)
    except CorruptError:
        return {}
    if stored is None or stored.manifest.digest != life.manifest_sha256:
        return {}
    return stored.manifest.update.metrics


def _steps(run: RunView, version: int) -> Iterator[Step]:
    for each in run.versions[1 : version + 1]:
        if each.contributions:
            sites = tuple(sorted({part.site for part in each.contributions}))
            yield Step(each.version, each.at, len(each.contributions), sites)
