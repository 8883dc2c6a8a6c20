"""Which sources of this project an outcome may depend on, and their digest: results of other code are told apart.

Counted is every module that the module which carries out a cell imports, itself or through others, however deep, and
those that are found by name (tasks). Comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("coordinator", "edge_client", "mailboat", "shared")
FIRST = "mailboat.experiment.trial"
FOUND_BY_NAME = ("edge_client/tasks/*.py", "mailboat/synth/words/*.txt")


@cache
def code_digest() -> str:
    """Return the SHA-256 of the sources that count, in hex."""
    digest = hashlib.sha256()
    for path in counted_files():
        text = path.read_text(encoding="utf-8")
        told = _bare(text) if path.suffix == ".py" else text
        digest.update(f"{path.relative_to(ROOT)}\n{hashlib.sha256(told.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def counted_files() -> list[Path]:
    """Return the files that count, sorted."""
    found: set[Path] = set()
    waiting = [path for path in [_file_of(FIRST)] if path is not None]
    waiting += [path for pattern in FOUND_BY_NAME for path in ROOT.glob(pattern)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            if path.suffix == ".py":
                waiting += _imported(path)
    return sorted(found)


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                named = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                named = [module, *(f"{module}.{alias.name}" for alias in names)]
            case _:
                continue
        yield from (found for name in named if (found := _file_of(name)) is not None)


def _file_of(module: str) -> Path | None:
    """The file of a module of this project; None for others', and for what is no module."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _bare(source: str) -> str:
    """The module without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    """A docstring, also one below an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
