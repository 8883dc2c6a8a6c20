"""Rules of style that no linter knows, as tests; the message names file and line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bench", "broker", "coordinator", "edge_client", "mailboat", "shared", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

SOURCE_LINES_MAX = 400  # what one can hold in the head at a sitting
TEST_LINES_MAX = 500  # a table of cases is easy reading
FUNCTION_LINES_MAX = 60  # one screen

# Put together so that this file does not name what it looks for.
BANNED_WORDS = re.compile("|".join(rf"\b{a}{b}\b" for a, b in [("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("HA", "CK")]))
# `except Exception` is allowed at the outermost edge of a process, with its reason on the same line.
SIGNED = re.compile(r"# noqa: BLE001 - \w+")
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "compile", "__import__"}


def name_of(path: Path) -> str:
    """The path below the repository, as test id and in messages."""
    return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
    """`torch.load` for that expression; empty for what is not a plain dotted name."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            return f"{dotted(value)}.{attribute}"
    return ""


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1."""
    return enumerate(text.splitlines(), start=1)


def broad_excepts(text: str) -> list[int]:
    """Lines of handlers that catch everything and keep it, without a signed reason."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(kind is None or dotted(kind) in {"Exception", "BaseException"} for kind in kinds)
        passed_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if broad and not passed_on and not SIGNED.search(lines[node.lineno - 1]):
            found.append(node.lineno)
    return found


def unsafe_uses(text: str) -> list[int]:
    """Lines that import an unpickler or call something that runs what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                unsafe = any(alias.name.split(".")[0] in FORBIDDEN_IMPORTS for alias in names)
            case ast.ImportFrom(module=str(module)):
                unsafe = module.split(".")[0] in FORBIDDEN_IMPORTS
            case ast.Call(func=function):
                unsafe = dotted(function) in FORBIDDEN_CALLS
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                unsafe = True
            case _:
                continue
        if unsafe:
            found.append(node.lineno)
    return found


def long_functions(text: str) -> list[str]:
    """Functions longer than a screen, their docstrings counted."""
    return [
        f"{node.lineno} {node.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]


def test_every_package_has_sources() -> None:
    """The rules below look at real files, not at an empty list."""
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= set(PACKAGES) - {"tools"}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_files_are_short(path: Path) -> None:
    """No source file is longer than about 400 lines, no test file longer than 500."""
    limit = TEST_LINES_MAX if path in TESTS else SOURCE_LINES_MAX
    assert len(path.read_text().splitlines()) <= limit, name_of(path)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_functions_fit_on_a_screen(path: Path) -> None:
    """No function is longer than about 60 lines."""
    assert long_functions(path.read_text()) == [], name_of(path)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    """No line carries a note to finish it some other day."""
    assert [number for number, line in lines_of(path.read_text()) if BANNED_WORDS.search(line)] == [], name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_errors_are_not_swallowed(path: Path) -> None:
    """Nothing catches every exception, unless the reason is signed on its line."""
    assert broad_excepts(path.read_text()) == [], name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No source unpickles, evaluates, or loads a checkpoint that could carry code."""
    assert unsafe_uses(path.read_text()) == [], name_of(path)


@pytest.mark.parametrize(
    ("find", "bad", "good"),
    [
        (broad_excepts, "try: f()\nexcept Exception: pass", "try: f()\nexcept ValueError: pass"),
        (
            broad_excepts,
            "try: f()\nexcept: pass",
            "try: f()\nexcept Exception:  # noqa: BLE001 - the last door\n  pass",
        ),
        (
            broad_excepts,
            "try: f()\nexcept Exception: raise ValueError",
            "try: f()\nexcept BaseException:\n  g()\n  raise",
        ),
        (broad_excepts, "try: f()\nexcept (OSError, Exception): pass", "try: f()\nexcept (OSError, KeyError): pass"),
        (unsafe_uses, "import pickle", "import json"),
        (unsafe_uses, "from joblib import load", "from json import load"),
        (unsafe_uses, "import torch\ntorch.load('x')", "import torch\ntorch.save('x')"),
        (unsafe_uses, "np.load('x', allow_pickle=True)", "np.load('x', allow_pickle=False)"),
        (long_functions, "def f():\n" + "    x = 1\n" * 60, "def f():\n" + "    x = 1\n" * 59),
    ],
)
def test_the_rules_find_what_they_look_for(find: object, bad: str, good: str) -> None:
    """Each rule reports its bad sample and passes its good one."""
    assert callable(find)
    assert find(bad)
    assert not find(good)
