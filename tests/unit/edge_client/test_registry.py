from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.tasks import Scores
from edge_client.tasks.ner import NerTask
from edge_client.tasks.registry import GROUP, known_tasks, load_task
from shared.config import TaskSection
from shared.errors import ConfigError


def install(folder: Path, package: str, entries: str, code: str = "") -> None:
    """Write an installed package as pip leaves it: a module and the folder that describes it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
    (folder / f"{package}.py").write_text(code)


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which packages are imported, forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_mailboat_s_own_tasks_are_entry_points() -> None:
    """The tasks that come with Mailboat are found as any other package's are, and get the federation's labels."""
    assert "ner" in known_tasks()
    task = load_task(TaskSection(kind="ner", labels=("a", "b")))
    assert isinstance(task, NerTask)
    assert task.labels == ("a", "b")


def test_an_unknown_name_lists_the_known_ones_nearest_first(site_packages: Path) -> None:
    """What was asked for is named, and the task that it may have meant stands first."""
    install(site_packages, "elsewhere", "smoking = elsewhere:make")
    for asked, nearest in (("nerr", "ner"), ("smokin", "smoking")):
        with pytest.raises(ConfigError, match=f"task.kind = '{asked}'") as caught:
            load_task(TaskSection(kind=asked))
        known = caught.value.message.partition("known: ")[2].split(", ")
        assert known[0] == nearest
        assert set(known) == set(known_tasks()) >= {"ner", "smoking"}


@pytest.mark.parametrize(
    ("entries", "code", "says"),
    [
        ("own = own:make", "import there_is_no_such_module", "needs the module there_is_no_such_module"),
        ("own = own:mak", "def make(section): ...", "cannot be loaded from own:mak"),
        ("own = own:make", "from json import nothing", "cannot be loaded from own:make"),
        ("own = own:make", "def make(section): return object()", "lacks some of what a task must have"),
    ],
    ids=["missing module", "missing name", "broken import", "no task"],
)
def test_a_package_that_gives_no_task_is_named(site_packages: Path, entries: str, code: str, says: str) -> None:
    """An entry point that leads nowhere is an error of configuration that names task and package."""
    install(site_packages, "own", entries, code)
    with pytest.raises(ConfigError, match=says) as caught:
        load_task(TaskSection(kind="own"))
    assert "task 'own' of package own" in caught.value.message


def test_two_packages_with_one_name_are_refused(site_packages: Path) -> None:
    """Nobody's task is taken for another's, not even Mailboat's own."""
    install(site_packages, "rival", "ner = rival:make")
    with pytest.raises(ConfigError, match="two packages have a task 'ner': package mailboat and package rival"):
        load_task(TaskSection(kind="ner"))


def test_a_package_s_code_runs_only_when_its_task_is_asked_for(site_packages: Path) -> None:
    """Looking tasks up imports nothing."""
    install(site_packages, "loud", "loud = loud:make", "raise AssertionError('imported')")
    assert "loud" in known_tasks()
    load_task(TaskSection(kind="ner"))
    assert "loud" not in sys.modules


@pytest.mark.parametrize("overall", [{"Strict F1": 0.5}, {"f1": float("nan")}, {"": 0.5}], ids=str)
def test_a_measure_that_could_not_travel_is_refused_at_once(overall: dict[str, float]) -> None:
    """A measure's name and value are checked where the task makes them, not when an update is sealed."""
    with pytest.raises(ValueError, match="a measure needs"):
        Scores(overall, {})
    assert Scores({"f1": 0.5, "recall": 0.25}, {}).main == 0.5
