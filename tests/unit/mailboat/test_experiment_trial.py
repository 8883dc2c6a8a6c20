from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mailboat.experiment.cells import Settings, Stage
from mailboat.experiment.notes import lay_out, link_notes
from mailboat.experiment.results import Result, is_current
from mailboat.experiment.spec import NotesSection
from mailboat.experiment.trial import Bench
from mailboat.synth import make_notes
from shared.config import ComputeSection, TaskSection
from shared.errors import ConfigError
from tests.unit.edge_client import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")


def settings(model: Path, notes: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """A cell of two sites with two notes each and one version."""
    given = NotesSection.model_validate({"sites": 2, "notes": 2, "heldout": 2, **(notes or {})})
    method = changes.get("method", "federated")
    sites = ("pooled",) if method == "centralized" else ("site-1", "site-2")
    federation = tiny.federation(
        federation={"name": "trial", "versions": 1, "sites": sites},
        model={"base": str(model)},
        aggregation={"quorum": len(sites)},
    )
    return Settings(**{"method": "federated", "seed": 1, "stage": Stage(federation=federation, notes=given), **changes})


def carry_out(folder: Path, given: Settings) -> Result:
    """The cell's result."""
    folder.mkdir(exist_ok=True)
    return Bench(folder, ComputeSection(device="cpu")).carry_out("trial", given, lambda _share, _word: None)


def test_a_cell_has_its_result(tmp_path: Path, model: Path) -> None:
    """Scores of the last version, its settings and sources; what was written on the way is gone but for the notes."""
    given = settings(model)
    result = carry_out(tmp_path / "scratch", given)
    assert result.settings_sha256 == given.digest
    assert is_current(result)
    assert result.scores == result.curve[-1].scores
    assert (result.versions, result.trainings, [*result.metrics]) == (1, 2, ["site-1", "site-2"])
    assert 0 < result.trained_parameters < result.total_parameters
    assert [path.name.partition("-")[0] for path in (tmp_path / "scratch").iterdir()] == ["notes"]


def test_alone_is_each_site_for_itself(tmp_path: Path, model: Path) -> None:
    """Every site has its own score, and the best of them is the cell's."""
    result = carry_out(tmp_path / "scratch", settings(model, method="alone"))
    assert [*result.sites] == ["site-1", "site-2"]
    assert result.scores["strict_f1"] == max(scores["strict_f1"] for scores in result.sites.values())


def test_centralized_has_the_notes_of_all(tmp_path: Path, model: Path) -> None:
    """One training on one site, which has as many examples as all sites together."""
    result = carry_out(tmp_path / "scratch", settings(model, method="centralized"))
    assert (result.trainings, [*result.metrics]) == (1, ["pooled"])
    pooled = next((tmp_path / "scratch").glob("notes-*/pooled"))
    assert len([*pooled.rglob("*.txt")]) == 4


def test_a_starting_point_is_trained_once(tmp_path: Path, model: Path) -> None:
    """The second cell from the same federation finds its state, and scores the same without training."""
    start = settings(model).stage
    given = settings(model, start=start, zero_shot=True)
    first = carry_out(tmp_path / "scratch", given)
    (kept,) = (tmp_path / "scratch").glob("start-*.safetensors")
    before = kept.stat().st_mtime_ns
    again = carry_out(tmp_path / "scratch", given)
    assert kept.stat().st_mtime_ns == before
    assert first.scores == again.scores
    assert again.trainings == 0


def test_real_notes_are_read_where_they_are(tmp_path: Path, model: Path) -> None:
    """A folder of notes gives the same result as the same notes made here; no text of it is copied."""
    made = make_notes(tmp_path / "notes", sites=2, notes=2, alpha=2.0, seed=7, heldout=2).out
    given = settings(model, {"folder": made})
    result = carry_out(tmp_path / "scratch", given)
    assert result.scores == carry_out(tmp_path / "other", settings(model)).scores
    files = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert files
    assert all(path.is_symlink() for path in files)


def test_relations_are_learnt_from_notes_that_are_there(tmp_path: Path) -> None:
    """A task that no notes are made for runs on a folder of them, and is scored by its own measures."""
    model = tiny.save_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    longer = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config | longer))
    given = settings(model, {"folder": tmp_path / "notes"})
    for name in ("site-1", "site-2", "heldout"):
        notes = tuple(replace(note, id=f"{name}-{note.id}") for note in tiny.notes(1, lines=1))
        tiny.write_relations(tmp_path / "notes" / name, notes)
    task = TaskSection(kind="relations", labels=("PIP", "present"), max_length=400)
    federation = given.stage.federation.model_copy(update={"task": task})
    stage = Stage(federation=federation, notes=given.stage.notes)
    result = carry_out(tmp_path / "scratch", given.model_copy(update={"stage": stage}))
    assert result.versions == 1
    assert "strict_f1" in result.scores


def test_the_coordinators_own_notes_are_set_apart(tmp_path: Path, model: Path) -> None:
    """None of them is scored on; those that are scored on are the same as without them, and all sites are there."""
    few, more = settings(model), settings(model, {"validation": 4})
    lay_out(few.stage, tmp_path / "few")
    lay_out(more.stage, tmp_path / "more")
    without, scored, own = (
        {path.name: path.read_text() for path in (tmp_path / place).rglob("*.txt")}
        for place in ("few/heldout", "more/heldout", "more/validation")
    )
    assert without == scored
    assert len(own) == 4
    assert not set(own.values()) & set(scored.values())
    first_lines = {text.splitlines()[0] for text in own.values()}
    assert len(first_lines) == 2, "two sites, two styles"
    assert {path.stem for path in (tmp_path / "more" / "validation").rglob("*.con")} == {
        Path(name).stem for name in own
    }


def test_short_notes_are_made_for_the_task_that_has_them(tmp_path: Path, model: Path) -> None:
    """notes.sections shortens the sites' notes, not those held out; a task whose notes are whole refuses it by name."""
    whole, short = settings(model), settings(model, {"sections": 1})
    lay_out(whole.stage, tmp_path / "whole")
    lay_out(short.stage, tmp_path / "short")

    def lengths(place: str) -> list[int]:
        return [len(path.read_text().splitlines()) for path in sorted((tmp_path / place).rglob("*.txt"))]

    assert max(lengths("short/site-1")) < min(lengths("whole/site-1"))
    assert lengths("short/heldout") == lengths("whole/heldout")
    stays = short.stage.federation.model_copy(update={"task": TaskSection(kind="multilabel", labels=("I10",))})
    with pytest.raises(ConfigError, match=r"notes\.sections, and synthetic notes for a task multilabel are whole"):
        lay_out(Stage(federation=stays, notes=short.stage.notes), tmp_path / "stays")


def test_whoever_writes_reads_the_same_notes(tmp_path: Path, model: Path) -> None:
    """A cell of the task extraction has the notes of ner: same sites, same words, same marks."""
    plain = settings(model).stage
    writing = plain.federation.model_copy(update={"task": TaskSection(kind="extraction")})
    lay_out(plain, tmp_path / "ner")
    lay_out(Stage(federation=writing, notes=plain.notes), tmp_path / "extraction")
    first, second = (
        {path.relative_to(tmp_path / place): path.read_bytes() for path in (tmp_path / place).rglob("*.*")}
        for place in ("ner", "extraction")
    )
    assert first == second


def test_a_task_without_synthetic_notes_needs_a_folder_of_them(tmp_path: Path, model: Path) -> None:
    """One that is installed is told where to name notes; one that is not, which there are."""
    plain = settings(model).stage

    def refused(kind: str) -> ConfigError:
        asking = plain.federation.model_copy(update={"task": TaskSection(kind=kind)})
        with pytest.raises(ConfigError) as caught:
            lay_out(Stage(federation=asking, notes=plain.notes), tmp_path / kind)
        return caught.value

    known = refused("relations")
    assert known.message == "there are no synthetic notes for a task relations"
    assert known.hint.startswith("name notes that are there in notes.folder")
    unknown = refused("extractoin")
    assert "no such task is installed here; known: extraction, " in unknown.message
    assert "relations" in unknown.message


def test_updates_are_weighed_by_their_loss(tmp_path: Path, model: Path) -> None:
    """With quality the coordinator measures each update on its own notes: another model; without notes an error."""
    plain = settings(model, {"validation": 4})
    section = plain.stage.federation
    weighed = section.model_copy(
        update={"aggregation": section.aggregation.model_copy(update={"quality": "size-exp-loss", "temperature": 0.01})}
    )
    by_loss = plain.model_copy(update={"stage": Stage(federation=weighed, notes=plain.stage.notes)})
    assert carry_out(tmp_path / "a", by_loss).scores != carry_out(tmp_path / "b", plain).scores
    without = by_loss.model_copy(update={"stage": Stage(federation=weighed, notes=settings(model).stage.notes)})
    with pytest.raises(ConfigError, match="weighs by a loss on notes of the coordinator") as caught:
        carry_out(tmp_path / "c", without)
    assert "notes.validation" in caught.value.hint


def test_folders_of_notes_that_do_not_fit(tmp_path: Path) -> None:
    """A missing folder is named, and so is a file name that two sites use: pooled, one would hide the other."""
    for name in ("site-1", "site-2", "heldout"):
        (tmp_path / "notes" / name).mkdir(parents=True)
        (tmp_path / "notes" / name / "a.conll").write_text("")
    with pytest.raises(ConfigError, match="another site has a file of this name"):
        link_notes(tmp_path / "notes", ("site-1", "site-2"), tmp_path / "out")
    with pytest.raises(ConfigError, match="site-3: no such folder"):
        link_notes(tmp_path / "notes", ("site-3",), tmp_path / "out")
