"""The tree of errors: what the shell's exit code says, and what a person reads."""

from __future__ import annotations

import pytest

from shared.errors import ConfigError, CorruptError, MailboatError, RefusedError, UnavailableError
from shared.link import LinkDownError
from shared.messages import UnknownMessageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MailboatError("x"), 1),
        (ConfigError("x"), 2),
        (RefusedError("x", rule="r"), 3),
        (UnknownMessageError("x", rule="r"), 3),
        (CorruptError("x"), 3),
        (UnavailableError("x"), 4),
        (LinkDownError("x"), 4),
    ],
)
def test_each_family_has_its_exit_code(error: MailboatError, code: int) -> None:
    """Scripts tell by it whether to mend, to give up or to try again."""
    assert error.exit_code == code


def test_the_hint_stands_behind_the_message() -> None:
    """One line for people; without a hint the message alone."""
    assert str(ConfigError("a.toml: no such file", hint="write it")) == "a.toml: no such file (write it)"
    assert str(ConfigError("a.toml: no such file")) == "a.toml: no such file"


def test_a_refusal_carries_the_name_of_its_rule() -> None:
    """Apart from the words, so that receipts and tests need not read them."""
    error = RefusedError("tensor w holds NaN", rule="non-finite", hint="lower the rate")
    assert (error.rule, error.message, error.hint) == ("non-finite", "tensor w holds NaN", "lower the rate")
