"""Tasks by name: the entry points `mailboat.tasks` of whatever is installed, Mailboat's own among them.

An entry point names a function that takes the federation's `[task]` section and returns a task. Code of a package runs
only when a federation file names its task, or when the package is imported by something else.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edge_client.tasks import Task
from shared.config import TaskSection
from shared.errors import ConfigError

GROUP = "mailboat.tasks"


def known_tasks() -> tuple[str, ...]:
    """Return the names of all tasks that are installed here, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def load_task(section: TaskSection) -> Task[Any]:
    """Return the task that `section` names, for its labels.

    Raises ConfigError when no installed package has it (the known ones are listed, nearest first), when two have it,
    and when what a package gives cannot be imported or is not a task.
    """
    entry = _find(section.kind)
    try:
        make = entry.load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task {section.kind!r} of {_package(entry)} needs the module {error.name}, which is not installed here",
            hint="install it; what Mailboat's own tasks need comes with: pip install 'mailboat[edge]'",
        ) from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task {section.kind!r} of {_package(entry)} cannot be loaded from {entry.value}: {error}",
            hint=f"mend the entry point in the group {GROUP} of that package",
        ) from error
    task = make(section)
    if not isinstance(task, Task):
        raise ConfigError(
            f"task {section.kind!r} of {_package(entry)} lacks some of what a task must have",
            hint="edge_client.tasks.Task lists it, docs/tasks.md explains it",
        )
    return task


def _find(name: str) -> EntryPoint:
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if len(found) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in found.values()))
        raise ConfigError(f"two packages have a task {name!r}: {packages}", hint="remove one, or rename its task")
    if not found:
        near = sorted(known_tasks(), key=lambda known: (-SequenceMatcher(None, name, known).ratio(), known))
        raise ConfigError(
            f"task.kind = {name!r}: no such task is installed here; known: {', '.join(near) or 'none'}",
            hint="check the spelling, or install the package that brings it"
            if near
            else "not even Mailboat's own are known: install it again",
        )
    (entry,) = found.values()
    return entry


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist else "an unnamed package"
