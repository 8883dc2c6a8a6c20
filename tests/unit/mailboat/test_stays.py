"""Synthetic stays, and notes of one place divided among sites: the commands `mailboat data make`, `labels`, `split`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edge_client.data import load_notes
from edge_client.tasks.classification import ClassificationTask
from edge_client.tasks.multilabel import MultiLabelTask
from edge_client.tasks.registry import load_task
from mailboat import cli, console
from mailboat.demo.tasks import TASKS, find_task
from mailboat.portion import HELDOUT, place_of
from mailboat.synth import SYNTHETIC, find_synthetic, load_codes, make_stays, pool_stays
from mailboat.synth.lexicon import load_concepts
from shared.config import TaskSection
from shared.errors import ConfigError

ALL = MultiLabelTask(tuple(load_codes()))
SPARE = "[federation]\nname = 'x'\n[model]\nbase = 'x'\n"


def told(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command prints on standard output, or on standard error when it fails."""
    capsys.readouterr()
    assert console.run(lambda: cli.app(list(words))) == status
    said = capsys.readouterr()
    return said.err if status else said.out


def test_every_code_stands_for_concepts_of_the_lexicon() -> None:
    """No code names a concept that no note can hold."""
    known = {concept.preferred for concept in load_concepts()["problem"]}
    assert {form for forms in load_codes().values() for form in forms} <= known
    assert len(load_codes()) == 12


def test_the_same_seed_writes_the_same_stays(tmp_path: Path) -> None:
    """Bytes follow from the arguments; more stays leave the first ones as they are."""
    for name, notes, seed in (("a", 4, 0), ("b", 4, 0), ("more", 6, 0), ("other", 4, 1)):
        make_stays(tmp_path / name, sites=2, notes=notes, alpha=1.0, seed=seed, heldout=2)
    a, b, more, other = [
        (tmp_path / name / "site-1" / "NOTEEVENTS.csv").read_bytes() for name in ("a", "b", "more", "other")
    ]
    assert a == b
    assert more.startswith(a)
    assert a != other


def test_the_reader_finds_what_was_written(tmp_path: Path) -> None:
    """Stays, codes and their counts are those of the report; the primary diagnosis comes first."""
    report = make_stays(tmp_path, sites=2, notes=20, alpha=1.0, seed=0, heldout=4)
    assert set(report.folders) == {"site-1", "site-2", "heldout"}
    for name, folder in report.folders.items():
        stays = load_notes(tmp_path / name, ALL).notes
        counted = Counter(code for stay in stays for code in stay.labels)
        assert len(stays) == folder.notes
        assert {code: counted[code] for code in load_codes()} == folder.labels
        assert all(1 <= len(stay.labels) <= 4 for stay in stays)
        primary = load_notes(tmp_path / name, ClassificationTask(tuple(load_codes()))).notes
        assert [stay.labels[0] for stay in primary] == [stay.labels[0] for stay in stays]


def test_a_stay_names_what_it_is_coded_with_and_nothing_else_that_has_a_code(tmp_path: Path) -> None:
    """The diagnoses at the end are as many as the codes; another code's name in full is nowhere in the text."""
    make_stays(tmp_path, sites=1, notes=60, alpha=100.0, seed=0, heldout=1)
    for stay in load_notes(tmp_path / "site-1", ALL).notes:
        body, _, diagnoses = stay.text.partition("\nDischarge Diagnosis :\n")
        assert len(diagnoses.splitlines()) == len(stay.labels)
        named = {code for code, forms in load_codes().items() for form in forms if f" {form} " in f" {body.lower()} "}
        assert named <= set(stay.labels)


def test_pooled_stays_are_all_there(tmp_path: Path) -> None:
    """Several folders become one in which no stay is missing or doubled."""
    make_stays(tmp_path, sites=3, notes=5, alpha=1.0, seed=0, heldout=1)
    folders = [tmp_path / f"site-{number}" for number in (1, 2, 3)]
    pool_stays(folders, tmp_path / "pooled")
    apart = [stay for folder in folders for stay in load_notes(folder, ALL).notes]
    assert load_notes(tmp_path / "pooled", ALL).notes == tuple(apart)


def test_further_stays_are_drawn_as_those_held_out(tmp_path: Path) -> None:
    """Those for validation are of all sites in turn, in a folder of their own; the held-out ones stay as they are."""
    made = [
        make_stays(tmp_path / name, sites=2, notes=1, alpha=1.0, seed=0, heldout=heldout, validation=more).out
        for name, heldout, more in (("few", 3, 0), ("more", 3, 4), ("all", 7, 0))
    ]
    few, more, whole = ([stay.text for stay in load_notes(out / "heldout", ALL).notes] for out in made)
    own = [stay.text for stay in load_notes(tmp_path / "more" / "validation", ALL).notes]
    assert few == more
    assert whole == more + own
    assert not (tmp_path / "few" / "validation").exists()
    pool_stays([tmp_path / "more" / name for name in ("heldout", "validation")], tmp_path / "pooled")
    assert len(load_notes(tmp_path / "pooled", ALL).notes) == 7, "no id is used twice"


def test_notes_are_made_for_a_task_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data make --task` writes what that task reads; an unknown name lists the known ones."""
    words = ("data", "make", "--sites", "1", "--notes", "3", "--heldout", "1", "--out")
    told(capsys, *words, str(tmp_path / "n"), "--task", "multilabel")
    assert len(load_notes(tmp_path / "n" / "site-1", ALL).notes) == 3
    said = told(capsys, *words, str(tmp_path / "m"), "--task", "nerr", status=2)
    assert "take one of ner, extraction, classification, multilabel" in said
    for name in TASKS:
        assert find_task(name).section.kind == name
    with pytest.raises(ConfigError, match="the demonstration has no task sums"):
        find_task("sums")


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_a_task_reads_the_notes_that_are_made_for_it(tmp_path: Path, kind: str) -> None:
    """For each task that there are synthetic notes for, all of them, with their labels."""
    notes = find_synthetic(kind)
    notes.make(tmp_path, sites=1, notes=3, alpha=1.0, seed=0, heldout=2)
    task = load_task(TaskSection(kind=kind, labels=notes.labels))
    found = load_notes(tmp_path / "site-1", task)
    assert (len(found.notes), found.skipped) == (3, 0)
    assert task.examples(found.notes) >= 3


def test_the_most_frequent_codes_are_printed_as_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line can be copied into federation.toml; --json has the counts."""
    report = make_stays(tmp_path, sites=1, notes=30, alpha=1.0, seed=0, heldout=1)
    counts = report.folders["site-1"].labels
    best = sorted(counts, key=lambda code: (-counts[code], code))[:3]
    folder = str(tmp_path / "site-1")
    assert told(capsys, "data", "labels", folder, "--top", "3") == f"labels = {json.dumps(best)}\n"
    assert json.loads(told(capsys, "data", "labels", folder, "--top", "3", "--json")) == {c: counts[c] for c in best}


@pytest.mark.parametrize("kind", ["multilabel", "classification"])
def test_a_place_s_notes_are_divided_by_patient(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Each stay is in one folder as it was, all of a patient's in the same, and nobody else may read them."""
    make_stays(tmp_path / "all", sites=1, notes=80, alpha=1.0, seed=0, heldout=1)
    federation = tmp_path / "federation.toml"
    federation.write_text(f"{SPARE}[task]\nkind = '{kind}'\nlabels = {json.dumps(list(load_codes()))}\n")
    words = ("--federation", str(federation), "--sites", "2", "--heldout", "0.25", "--out", str(tmp_path / "parts"))
    told(capsys, "data", "split", str(tmp_path / "all" / "site-1"), *words)
    task = ALL if kind == "multilabel" else ClassificationTask(ALL.classes)
    parts = {name: load_notes(tmp_path / "parts" / name, task).notes for name in ("site-1", "site-2", HELDOUT)}
    whole = load_notes(tmp_path / "all" / "site-1", task).notes
    assert sorted(stay.id for part in parts.values() for stay in part) == sorted(stay.id for stay in whole)
    assert {stay for part in parts.values() for stay in part} == set(whole)
    for name, part in parts.items():
        assert part
        assert all(place_of(stay.patient, sites=2, heldout=0.25, seed=0) == name for stay in part)
        assert (tmp_path / "parts" / name / f"{name}.jsonl").stat().st_mode & 0o077 == 0
    said = told(capsys, "data", "split", str(tmp_path / "all" / "site-1"), *words, status=2)
    assert "is not empty" in said


def test_marked_notes_are_not_divided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task whose notes have no labels as a whole is refused by its name."""
    federation = tmp_path / "federation.toml"
    federation.write_text(SPARE)
    words = ("--federation", str(federation), "--out", str(tmp_path / "parts"))
    assert "notes for the task ner cannot be divided" in told(capsys, "data", "split", str(tmp_path), *words, status=2)


def test_patients_are_spread_evenly() -> None:
    """Of many patients about the asked share is held out, and sites get equal parts of the rest."""
    places = Counter(place_of(str(patient), sites=4, heldout=0.2, seed=1) for patient in range(10_000))
    assert places[HELDOUT] == pytest.approx(2000, abs=150)
    assert all(places[f"site-{number}"] == pytest.approx(2000, abs=150) for number in (1, 2, 3, 4))
