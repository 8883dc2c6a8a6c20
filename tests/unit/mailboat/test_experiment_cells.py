from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mailboat.experiment.cells import Cell, merged, participants, read_experiment
from mailboat.experiment.digests import model_digest
from mailboat.experiment.spec import NotesSection
from shared.errors import ConfigError

BASE = """
title = "small"
model = "shipped"
[rates]
layers = 0.006
[notes]
sites = 3
notes = 8
[federation.federation]
versions = 5
[federation.training]
batch_size = 2
lr = 0.001
[alone.federation]
versions = 1
[alone.training]
epochs = 4
"""
HEAD = 'title = "t"\nquestion = "q"\nbases = ["small"]\nseeds = [1, 2]\n'


def cells(folder: Path, text: str, base: str = BASE) -> dict[str, Cell]:
    """The first seed's cells of an experiment, by name."""
    (folder / "bases").mkdir(exist_ok=True)
    (folder / "bases" / "small.toml").write_text(base)
    (folder / "trial.toml").write_text(HEAD + text)
    return {cell.name: cell for cell in read_experiment(folder, "trial").cells if cell.seed == 1}


def settings(cell: Cell) -> Any:
    """The cell's settings, which are there."""
    assert cell.problem == ""
    return cell.settings


def test_tables_are_laid_over_each_other() -> None:
    """The later value counts, tables are merged key by key, and what was given stays as it was."""
    below = {"a": {"x": 1, "y": 2}, "b": 1}
    assert merged(below, {"a": {"y": 3}, "c": {"z": 4}}) == {"a": {"x": 1, "y": 3}, "b": 1, "c": {"z": 4}}
    assert below == {"a": {"x": 1, "y": 2}, "b": 1}


def test_a_cell_is_a_patch_over_base_and_experiment(tmp_path: Path) -> None:
    """What the base says, the experiment changes, and the cell changes that; seed, sites and quorum follow."""
    found = cells(
        tmp_path,
        '[federation.training]\nbatch_size = 3\n[[cells]]\nname = "c"\nfederation.layers.plan = "2"\nnotes.alpha = 0.1',
    )
    federation = settings(found["c"]).stage.federation
    assert (federation.training.batch_size, federation.training.lr, federation.layers.plan) == (3, 0.001, "2")
    assert federation.federation.sites == ("site-1", "site-2", "site-3")
    assert (federation.federation.seed, federation.federation.versions, federation.aggregation.quorum) == (1, 5, 3)
    assert settings(found["c"]).stage.notes == NotesSection(sites=3, notes=8, alpha=0.1)


def test_a_family_has_its_rate_unless_the_cell_has_its_own(tmp_path: Path) -> None:
    """The base gives the rate of a family; a cell's own rate goes before; an unknown family is the cell's problem."""
    found = cells(
        tmp_path,
        '[[cells]]\nname = "a"\nfamily = "layers"\n'
        '[[cells]]\nname = "b"\nfamily = "layers"\nfederation.training.lr = 0.5\n'
        '[[cells]]\nname = "c"\nfamily = "lora"\n',
    )
    assert settings(found["a"]).stage.federation.training.lr == 0.006
    assert settings(found["b"]).stage.federation.training.lr == 0.5
    assert "no learning rate for the family lora" in found["c"].problem


def test_a_key_that_is_not_known_here_is_said_of_its_cell(tmp_path: Path) -> None:
    """The cell stays in the table with the nearest right key; the others are as they would be without it."""
    found = cells(tmp_path, '[[cells]]\nname = "a"\n[[cells]]\nname = "b"\nfederation.layers.plam = "2"\n')
    assert settings(found["a"]) is not None
    assert found["b"].settings is None
    assert found["b"].problem == "federation: unknown key layers.plam: did you mean plan?"


def test_settings_of_a_site_that_there_is_not(tmp_path: Path) -> None:
    """A name that takes no part would change nothing, unnoticed: it is the cell's problem."""
    found = cells(tmp_path, '[[cells]]\nname = "a"\nsites = { site-9 = { layers = { at_most = 2 } } }\n')
    assert found["a"].problem == "sites.site-9: no such site takes part"


def test_vary_makes_a_cell_of_each_value(tmp_path: Path) -> None:
    """{x} alone becomes the value itself, {x} in a text its text; x of the plot is the value."""
    found = cells(
        tmp_path,
        '[[cells]]\nname = "top {x}"\nvary = [1, 4]\nfederation.layers.plan = "top:{x}"\nnotes.notes = "{x}"\n',
    )
    assert [*found] == ["top 1", "top 4"]
    four = settings(found["top 4"])
    assert (four.stage.federation.layers.plan, four.stage.notes.notes, found["top 4"].section.x) == ("top:4", 4, 4)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            'zero_shot = true\nfederation.layers.personal = ["score.*"]',
            "zero_shot scores one model for all, and of this one tensors stay at each site",
        ),
        (
            'method = "splitnn"\nfederation.adapter.kind = "fedsa-lora"',
            "split learning trains one model for all, and of this one tensors stay at each site",
        ),
    ],
)
def test_what_would_mean_something_else_in_a_cell_is_its_problem(tmp_path: Path, said: str, problem: str) -> None:
    """A score of what nobody trains, one model where each site has its own: no number is made of them."""
    cell = cells(tmp_path, f'[[cells]]\nname = "a"\n{said}\n')["a"]
    assert cell.settings is None
    assert cell.problem.startswith(problem)


def test_other_limits_of_a_site_are_no_problem(tmp_path: Path) -> None:
    """Blocks and bytes are the same in one process as in several."""
    found = cells(tmp_path, '[[cells]]\nname = "a"\nsite.layers = { at_most = 2, upload_mib = 3 }\n')
    assert settings(found["a"]).site == {"layers": {"at_most": 2, "upload_mib": 3}}


def test_two_cells_of_one_name_are_refused(tmp_path: Path) -> None:
    """A table with two rows of one name could not be read."""
    with pytest.raises(ConfigError, match="two cells are named 'a'"):
        cells(tmp_path, '[[cells]]\nname = "a"\n[[cells]]\nname = "a"\nfederation.layers.plan = "2"\n')


def test_baselines_are_one_training(tmp_path: Path) -> None:
    """Centralized and alone have the base's `alone` patch; centralized has one site, which has all notes."""
    found = cells(tmp_path, '[[cells]]\nname = "a"\nmethod = "centralized"\n[[cells]]\nname = "b"\nmethod = "alone"\n')
    central, alone = (settings(found[name]).stage.federation for name in "ab")
    assert (central.federation.sites, central.federation.versions, central.training.epochs) == (("pooled",), 1, 4)
    assert (len(alone.federation.sites), alone.federation.versions, alone.training.epochs) == (3, 1, 4)


def test_only_sites_with_notes_take_part() -> None:
    """A site with a count of 0 is a stranger to the federation."""
    assert participants(NotesSection(sites=3, notes=(4, 0, 1))) == ("site-1", "site-3")


def test_the_digest_is_of_what_the_outcome_depends_on(tmp_path: Path) -> None:
    """Name, plot and place of the model leave it; each setting changes it; a key at its default does not."""
    text = '[[cells]]\nname = "{name}"\nfederation.layers.plan = "2"\n'
    found = cells(
        tmp_path,
        text.format(name="a")
        + text.format(name="b")
        + 'series = "s"\nx = 3\n'
        + text.format(name="default")
        + "federation.training.weight_decay = 0.01\n"
        + text.format(name="notes")
        + "notes.alpha = 7\n"
        + text.format(name="federation")
        + "federation.training.epochs = 2\n"
        + text.format(name="method")
        + 'method = "alone"\n'
        + text.format(name="start")
        + "start = { notes = { notes = 4 } }\n"
        + text.format(name="site")
        + "site = { data = { holdout = 0.2 } }\n",
    )
    digests = {name: settings(cell).digest for name, cell in found.items()}
    assert digests["a"] == digests["b"] == digests["default"]
    assert len(set(digests.values())) == 6
    other_seed = next(cell for cell in read_experiment(tmp_path, "trial").cells if cell.seed == 2)
    assert settings(other_seed).digest != digests["a"]


def test_a_models_digest_follows_its_files(tmp_path: Path) -> None:
    """Two folders with equal weights are one model; other weights are another; a hub id is what it is."""
    for name, weights in (("one", b"w"), ("two", b"w"), ("three", b"v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one, two, three = (model_digest(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three
    assert model_digest("org/name") == "org/name"


def test_real_notes_are_part_of_the_digest(tmp_path: Path) -> None:
    """The same words in another place are the same notes; one other word makes another cell."""
    for name, word in (("one", "fever"), ("two", "fever"), ("three", "cough")):
        (tmp_path / name / "site-1").mkdir(parents=True)
        (tmp_path / name / "site-1" / "note.txt").write_text(word)
    text = "".join(
        f'[[cells]]\nname = "{name}"\nnotes = {{ folder = "{tmp_path / name}", sites = 1 }}\n'
        for name in ("one", "two", "three")
    )
    one, two, three = (settings(cell).digest for cell in cells(tmp_path, text).values())
    assert one == two != three


def test_an_experiment_that_there_is_not(tmp_path: Path) -> None:
    """The error names those that there are."""
    (tmp_path / "main.toml").write_text("")
    with pytest.raises(ConfigError) as caught:
        read_experiment(tmp_path, "mian")
    assert caught.value.hint == "there are: main"
