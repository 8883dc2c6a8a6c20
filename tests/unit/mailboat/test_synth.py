"""The synthetic notes: the same for one seed, readable as i2b2, and different from site to site."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from edge_client.data import Note, load_notes
from edge_client.tasks.ner import NerTask
from mailboat.synth import make_notes
from mailboat.synth.lexicon import LABELS, SECTIONS, STYLES, load_concepts, load_lines
from mailboat.synth.notes import draw_note
from mailboat.synth.profiles import SiteProfile, make_profiles
from mailboat.synth.prose import draw_prose
from mailboat.synth.write import write_i2b2
from shared.errors import ConfigError


def digest(folder: Path) -> str:
    """One hash over the names and bytes of all files below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() for path in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def draw(profile: SiteProfile, count: int) -> list[Note]:
    """Some notes of a site."""
    return [draw_note(f"n{index}", profile, random.Random(f"test/{index}")) for index in range(count)]


def surfaces(notes: list[Note]) -> set[str]:
    """Every way in which an entity is written, in lower case."""
    return {
        " ".join(sentence.tokens[entity.start : entity.end]).lower()
        for note in notes
        for sentence in note.sentences
        for entity in sentence.entities
    }


def labels_of(notes: list[Note]) -> list[str]:
    """The label of each entity."""
    return [entity.label for note in notes for sentence in note.sentences for entity in sentence.entities]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """One seed writes the same files each time; another seed writes others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_notes(tmp_path / name, sites=2, notes=3, alpha=1.0, seed=seed, heldout=3)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_more_notes_keep_the_first_ones(tmp_path: Path) -> None:
    """A note depends on the seed and its own name, so that asking for more notes changes none of the others."""
    make_notes(tmp_path / "few", sites=2, notes=2, alpha=1.0, seed=1, heldout=2)
    make_notes(tmp_path / "many", sites=2, notes=4, alpha=1.0, seed=1, heldout=2)
    for path in (tmp_path / "few").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "many" / path.relative_to(tmp_path / "few")).read_bytes()


def test_written_notes_are_read_back(tmp_path: Path) -> None:
    """What the writer writes, the i2b2 reader reads as the same tokens and entities."""
    notes = [note for profile in make_profiles(sites=4, alpha=1.0, seed=3) for note in draw(profile, 10)]
    named = [Note(f"{index:02d}", note.sentences) for index, note in enumerate(notes)]
    write_i2b2(tmp_path, named)
    assert load_notes(tmp_path, NerTask(LABELS)).notes == tuple(named)


def test_folders_and_report(tmp_path: Path) -> None:
    """Each site has its folder, the held-out notes theirs, and the report counts what is in them."""
    report = make_notes(tmp_path / "out", sites=3, notes=4, alpha=1.0, seed=0, heldout=5)
    assert sorted(path.name for path in report.out.iterdir()) == ["heldout", "site-1", "site-2", "site-3"]
    for name, folder in report.folders.items():
        notes = load_notes(report.out / name, NerTask(LABELS)).notes
        found = labels_of(list(notes))
        assert len(notes) == folder.notes == (5 if name == "heldout" else 4)
        assert {label: found.count(label) for label in LABELS} == folder.labels
        assert sum(len(sentence.tokens) for note in notes for sentence in note.sentences) == folder.tokens


def test_heldout_notes_are_new(tmp_path: Path) -> None:
    """No held-out note is a note of a site."""
    out = make_notes(tmp_path / "out", sites=4, notes=20, alpha=1.0, seed=0, heldout=20).out
    seen = {path.read_text() for path in out.glob("site-*/txt/*")}
    assert not seen & {path.read_text() for path in out.glob("heldout/txt/*")}


def test_heldout_mixes_all_sites(tmp_path: Path) -> None:
    """The held-out notes come from each site's distribution in equal number: every style's headers are among them."""
    out = make_notes(tmp_path / "out", sites=4, notes=1, alpha=1.0, seed=0, heldout=8).out
    headers = [path.read_text().splitlines()[0] for path in sorted(out.glob("heldout/txt/*"))]
    expected = [next(iter((out / f"site-{n}" / "txt").iterdir())).read_text().splitlines()[0] for n in (1, 2, 3, 4)]
    assert headers == expected * 2


def test_heldout_notes_of_some_sites_alone(tmp_path: Path) -> None:
    """Asked for sites 2 and 4, the held-out notes are theirs in turn, the same notes that these sites would write."""
    out = make_notes(tmp_path / "out", sites=4, notes=1, alpha=1.0, seed=0, heldout=4, tested=(2, 4)).out
    headers = [path.read_text().splitlines()[0] for path in sorted(out.glob("heldout/txt/*"))]
    expected = [next(iter((out / f"site-{n}" / "txt").iterdir())).read_text().splitlines()[0] for n in (2, 4)]
    assert headers == expected * 2


def test_notes_of_fewer_sections(tmp_path: Path) -> None:
    """Sites write notes of two sections, each under its header, not always the same two; held-out notes are whole."""
    out = make_notes(tmp_path / "out", sites=1, notes=12, alpha=1.0, seed=0, heldout=1, sections=2).out
    headers = {" ".join(header.split()) for header in make_profiles(sites=1, alpha=1.0, seed=0)[0].habits.headers}

    def headed(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if line in headers]

    written = [headed(path) for path in sorted(out.glob("site-1/txt/*"))]
    assert {len(found) for found in written} == {2}
    assert len({tuple(found) for found in written}) > 2
    assert [set(headed(path)) for path in out.glob("heldout/txt/*")] == [headers]


def test_each_site_may_have_a_number_of_its_own(tmp_path: Path) -> None:
    """Counts 3, 0 and 1 make so many notes, and those are the first of what more would be."""
    some = make_notes(tmp_path / "some", sites=3, notes=(3, 0, 1), alpha=1.0, seed=0, heldout=1)
    more = make_notes(tmp_path / "more", sites=3, notes=4, alpha=1.0, seed=0, heldout=1).out
    assert [some.folders[f"site-{number}"].notes for number in (1, 2, 3)] == [3, 0, 1]
    for path in some.out.glob("site-*/*/*"):
        assert path.read_bytes() == (more / path.relative_to(some.out)).read_bytes()


def test_sites_share_as_many_terms_as_asked_for() -> None:
    """With foreign terms as usual as own ones two sites have more in common than by default; with none, less."""

    def common(**given: float) -> int:
        first, second = (surfaces(draw(each, 60)) for each in make_profiles(sites=2, alpha=1.0, seed=0, **given))
        return len(first & second)

    assert common(foreign=0.0) < common() == common(foreign=0.1) < common(foreign=1.0)


def test_small_alpha_skews_the_label_mix() -> None:
    """The label shares of the written entities differ more between sites for a small alpha than for a large one."""

    def spread(alpha: float) -> float:
        found = [labels_of(draw(profile, 10)) for profile in make_profiles(sites=4, alpha=alpha, seed=0)]
        return fmean(pstdev(labels.count(label) / len(labels) for labels in found) for label in LABELS)

    assert spread(0.2) > 2 * spread(50.0)


def test_sites_have_words_of_their_own_and_words_in_common() -> None:
    """Two sites share some of the ways to write an entity, and each has most for itself."""
    first, second = (surfaces(draw(profile, 60)) for profile in make_profiles(sites=2, alpha=1.0, seed=0))
    common = len(first & second)
    assert 0 < common < 0.5 * min(len(first), len(second))


def test_one_form_can_have_two_labels() -> None:
    """Some ways to write an entity stand for different labels, so that only the words around them tell."""
    forms = {
        label: {form for concept in concepts for form in (concept.preferred, *concept.others, *concept.short)}
        for label, concepts in load_concepts().items()
    }
    assert len(forms["problem"] & forms["test"]) >= 3
    assert len(forms["problem"] & forms["treatment"]) >= 3
    assert len(forms["treatment"] & forms["test"]) >= 3


@pytest.mark.parametrize("style", [*STYLES, "common"])
def test_each_style_has_lines_for_each_section(style: str) -> None:
    """A style can write all sections of a note."""
    assert tuple(load_lines(f"style-{style}")) == SECTIONS


def test_prose_is_of_another_style() -> None:
    """No line of a site's style is a line of the prose on which the base model was pre-trained."""
    prose = {line for lines in load_lines("prose").values() for line in lines}
    notes = {line for style in (*STYLES, "common") for lines in load_lines(f"style-{style}").values() for line in lines}
    assert not prose & notes


def test_prose_is_the_same_for_one_seed() -> None:
    """The pre-training text is a function of its seed."""
    assert list(draw_prose(20, 1)) == list(draw_prose(20, 1)) != list(draw_prose(20, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": 0}, "the number of sites is 0"),
        ({"notes": -1}, "the number of notes is -1"),
        ({"heldout": 0}, "the number of held-out notes is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"notes": (1, 2)}, "notes are counted for 2 of 1 sites"),
        ({"notes": (0,)}, "the number of notes is 0"),
        ({"sites": 2, "notes": (3, -1)}, "the number of notes is -1"),
        ({"tested": (2,)}, "a site that there is not: 2"),
        ({"sections": 0}, "a note of 0 sections"),
        ({"sections": 6}, "a note of 6 sections"),
    ],
)
def test_values_out_of_range(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """A value that makes no notes is a usage error that names it, and nothing is written."""
    values = {"sites": 1, "notes": 1, "alpha": 1.0, "seed": 0, "heldout": 1} | changes
    with pytest.raises(ConfigError, match=message):
        make_notes(tmp_path / "out", **values)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_folder_in_use(tmp_path: Path) -> None:
    """A folder that holds something is left as it is."""
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty"):
        make_notes(tmp_path, sites=1, notes=1, alpha=1.0, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
