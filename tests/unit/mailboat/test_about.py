"""What an exported model says of itself, from a journal with known contents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.records import Accepted, Record, VersionCommitted
from coordinator.views import RunView, read_run
from mailboat.about import CARD, FACTS, base_name, federation_of, provenance, write_about
from mailboat.subject import Subject
from shared.config import FederationConfig
from shared.errors import ConfigError
from tests.small_run import SmallRun


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    """A run at version 0."""
    return SmallRun(tmp_path / "run", {"w": [0.0, 0.0]})


@pytest.fixture
def run(small: SmallRun) -> RunView:
    """Two versions: from north and south, whose updates tell of epsilon, then from north alone."""
    costs = {"epsilon": 1.25, "delta": 1e-5}
    first = [
        small.accept(small.seal(site, {"w": [1.0, 1.0]}, examples=examples, metrics=costs))
        for site, examples in (("north", 30), ("south", 2000))
    ]
    records: list[Record] = [small.opened, *first, merged(small, 1, first)]
    second = small.accept(small.seal("north", {"w": [1.0, 1.0]}, base=1, examples=31, metrics={"epsilon": 2.5}))
    return read_run([*records, second, merged(small, 2, [second])], small.folder)


def merged(small: SmallRun, version: int, updates: list[Accepted]) -> VersionCommitted:
    """Make the next version, a day after the one before it."""
    parts = small.planned(updates).recorded()
    result = small.merge(*updates)
    state, master = result.state.to_bytes(), result.master_digest
    return VersionCommitted(version, parts, state, master, result.optimizer_digest, version * 86_400.0)


def subject(small: SmallRun, run: RunView, version: int = 2) -> Subject:
    """A version of the run, at its coordinator."""
    found = run.versions[version]
    return Subject(small.folder, small.federation, found.state, found.parts, "base", found.master_digest, run)


def written(small: SmallRun, chosen: Subject, out: Path, *, full_precision: bool = False) -> str:
    """The card of a version."""
    out.mkdir()
    found = provenance(chosen, small.plan, chosen.run, full_precision=full_precision)
    write_about(out, chosen.federation, found, adapters=False)
    return (out / CARD).read_text()


def test_a_card_holds_what_the_journal_says(small: SmallRun, run: RunView, tmp_path: Path) -> None:
    """Digests, sites with their counts, versions with their day, and no word on how good the model is."""
    card = written(small, subject(small, run), tmp_path / "out")
    assert card.startswith('---\nbase_model: "base"\nlibrary_name: transformers\n')
    assert "# north, version 2\n" in card
    assert f"BLAKE3 `{run.current.state.file_digest}`" in card
    assert f"fingerprint `{small.plan.fingerprint}`" in card
    assert "| north | 2 | 31 |" in card
    assert "| south | 1 | 2,000 |" in card
    assert "| 1 | 1970-01-02 00:00 | 2 | north, south |" in card
    assert "| 2 | 1970-01-03 00:00 | 1 | north |" in card
    assert "2 of 20 parameters" in card
    assert "Trained without differential privacy" in card
    assert "AutoModelForTokenClassification.from_pretrained" in card
    assert "mailboat predict" in card


def test_an_earlier_version_knows_nothing_of_later_ones(small: SmallRun, run: RunView, tmp_path: Path) -> None:
    """Version 1 is what two updates made; version 0 is nobody's; the master has a digest of its own."""
    card = written(small, subject(small, run, 1), tmp_path / "one", full_precision=True)
    assert "| north | 1 | 30 |" in card
    assert "| 2 | 1970" not in card
    assert f"float32 master of version 1 | BLAKE3 `{run.versions[1].master_digest}`" in card
    assert "Nobody yet" in written(small, subject(small, run, 0), tmp_path / "zero")


def test_what_privacy_has_cost_is_told_by_site(small: SmallRun, run: RunView, tmp_path: Path) -> None:
    """As each site's costliest update says, if its manifest is the one in the journal, and not otherwise."""
    told = small.federation.model_dump() | {"privacy": {"delta": 1e-5, "noise_multiplier": 1.0}}
    private = FederationConfig.model_validate(told)
    found = run.versions[1]
    chosen = Subject(small.folder, private, found.state, found.parts, "base", found.master_digest, run)
    card = written(small, chosen, tmp_path / "out")
    assert "- north: epsilon 1.25 at delta 1e-05" in card
    assert "- south: epsilon 1.25 at delta 1e-05" in card
    (south,) = (update_id for update_id, life in run.updates.items() if life.site == "south")
    small.updates.delete(south)
    assert "- south: told of no cost" in written(small, chosen, tmp_path / "again")


def test_an_update_out_of_quarantine_does_not_lower_the_cost(small: SmallRun, tmp_path: Path) -> None:
    """Merged last, it tells of less than one that was trained after it: what a version cost is the most of all."""
    records: list[Record] = [small.opened]
    for version, epsilon in ((1, 2.5), (2, 1.25)):
        metrics = {"epsilon": epsilon, "delta": 1e-5}
        update = small.accept(small.seal("north", {"w": [1.0, 1.0]}, base=version - 1, metrics=metrics))
        records += [update, merged(small, version, [update])]
    chosen = subject(small, read_run(records, small.folder))
    (part,) = provenance(chosen, small.plan, chosen.run, full_precision=False).parts
    assert (part.epsilon, part.delta, part.updates) == (2.5, 1e-5, 2)


def test_a_site_s_export_says_whose_it_is(small: SmallRun, run: RunView, tmp_path: Path) -> None:
    """A site has no journal: its card names no other site, and says that the personal tensors are its own."""
    plan = small.plan.model_copy(update={"personal": {"score.weight": (2,)}})
    chosen = Subject(small.folder, small.federation, run.current.state, run.current.parts, "base", site="south")
    (tmp_path / "out").mkdir()
    write_about(
        tmp_path / "out", small.federation, provenance(chosen, plan, None, full_precision=False), adapters=False
    )
    card = (tmp_path / "out" / CARD).read_text()
    assert "Exported at south" in card
    assert "personal tensors | 1, of south" in card
    assert "north |" not in card


def test_what_a_model_does_is_read_back(small: SmallRun, run: RunView, tmp_path: Path) -> None:
    """Task, layers and adapters come out as they went in; no path of the coordinator's machine is in the files."""
    assert small.federation.model.base == "/models/base"
    card = written(small, subject(small, run), tmp_path / "out")
    again = federation_of(tmp_path / "out")
    assert (again.task, again.layers, again.adapter) == (
        small.federation.task,
        small.federation.layers,
        small.federation.adapter,
    )
    assert "/models" not in card + (tmp_path / "out" / FACTS).read_text()
    for text in ("{", "[]", "{}", json.dumps({"provenance": {"federation": "x"}, "seed": 0})):
        (tmp_path / "out" / FACTS).write_text(text)
        with pytest.raises(ConfigError, match="is not what"):
            federation_of(tmp_path / "out")


def test_the_name_of_a_base_model() -> None:
    """An id of the hub as it is; of a folder the last part."""
    assert base_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert base_name("/srv/models/llama") == "llama"
    assert base_name("./llama") == "llama"
