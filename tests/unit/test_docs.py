"""What the documents say to type exists: every `mailboat ...` in them names a command and options that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mailboat import cli
from mailboat.commands.demo import demo

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
_TYPED = re.compile(r"(?:^    |`|[$#] )(mailboat (?!update id)[a-z][^`\n]*)", re.MULTILINE)
"""`mailboat update id ...` is what a digest is taken over."""
_END = re.compile(r"\s(?:#|&&|\||>|;)\s")


def lines(page: Path) -> list[str]:
    """What stands there as code and begins with `mailboat` and a command."""
    return [_END.split(line)[0] for line in _TYPED.findall(page.read_text(encoding="utf-8"))]


def unknown(line: str) -> Iterator[str]:
    """Words of a line that no command or option is called by; `init|list` names both."""
    command: Any = typer.main.get_command(cli.app)
    words = line.split()[1:]
    while (group := getattr(command, "commands", None)) and words:
        names = words.pop(0).rstrip(",.:;").split("|")
        if missing := [name for name in names if name not in group]:
            yield from (f"{line}: {name}" for name in missing)
            return
        command = group[names[0]]
    if command.name == "demo":  # which hands its words over
        inner = typer.Typer()
        inner.command()(demo)
        command = typer.main.get_command(inner)
    known = {each for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--verbose", "--quiet"}
    yield from (
        f"{line}: {word}" for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_exist(page: Path) -> None:
    """With each option that is named beside them."""
    assert [each for line in lines(page) for each in unknown(line)] == []


def test_something_is_looked_at() -> None:
    """The page for operators is full of commands, and a wrong one would be found."""
    assert len(lines(ROOT / "docs" / "operating.md")) > 30
    assert list(unknown("mailboat provision rotates ca")) == ["mailboat provision rotates ca: rotates"]
    assert list(unknown("mailboat provision rotate ca --end")) == ["mailboat provision rotate ca --end: --end"]
    assert list(unknown("mailboat provision init|revoke|list")) == []
