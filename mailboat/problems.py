"""How `fsck` tells what it found, and which exit status that gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mailboat import console
from shared.errors import CorruptError
from shared.problems import Problem

_LABELS = {("leftover", True): "deleted", ("leftover", False): "leftover", ("damage", True): "repaired"}


def tell_problems(
    storage: Path, problems: Sequence[Problem], said: Sequence[str], *, as_json: dict[str, Any] | None = None
) -> None:
    """Print the lines `said` and the problems, or `as_json` instead; CorruptError when damage is left."""
    left = [each for each in problems if each.kind == "damage" and not each.repaired]
    if as_json is not None:
        console.print_json({**as_json, "damage_left": len(left)})
    else:
        for line in said:
            console.result().print(line, markup=False)
        for each in problems:
            _tell(each)
        if not problems:
            console.result().print("nothing is wrong", markup=False, style="bold green")
    if left:
        first = left[0]
        raise CorruptError(
            f"{storage}: {len(left)} damaged, first {first.where}: {first.what} [{first.rule}]", hint=first.advice
        )


def _tell(each: Problem) -> None:
    label = _LABELS.get((each.kind, each.repaired), "damaged")
    advice = f"; {each.advice}" if each.advice else ""
    style = "bold red" if label == "damaged" else ""
    console.result().print(f"{label:<9s} {each.where}: {each.what} [{each.rule}]{advice}", markup=False, style=style)
