"""Generated examples are the same each time, in whatever order the tests come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, sys
from hypothesis import given, strategies as st
import tests.conftest

@given(st.integers(), st.text(), st.binary())
def told(number, text, data):
    print(ascii((number, text, data)))

for name in sys.argv[1:]:
    importlib.import_module(name)
told()
"""


def drawn(*imported: str) -> list[str]:
    """The examples that a process draws which has imported these modules before."""
    environment = {name: value for name, value in os.environ.items() if name != "MAILBOAT_EXAMPLES"}
    command = [sys.executable, "-c", PROGRAM, *imported]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_examples_do_not_depend_on_the_tests_before() -> None:
    """A process that has imported much draws what one draws that has imported nothing."""
    alone = drawn()
    assert len(alone) >= 100
    assert drawn("mailboat.cli", "coordinator.core", "edge_client.session") == alone
