"""The bench of start-up knows every command."""

from __future__ import annotations

from bench.startup import commands, help_once


def test_every_command_is_asked() -> None:
    """The program itself, groups, and the commands in them."""
    assert commands()[0] == ()
    assert {("site",), ("site", "run"), ("coordinator", "seal"), ("demo",)} < set(commands())


def test_help_is_timed() -> None:
    """One command's help takes some time and the memory of an interpreter."""
    seconds, worked, peak = help_once(("site", "run"))
    assert seconds > 0
    assert worked > 0
    assert 8e6 < peak < 500e6
