"""What is installed is what was agreed on; what differs is named."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import Distribution, PathDistribution, distributions
from pathlib import Path

import pytest

from tools.dependencies import CONSTRAINTS, READERS, normal, pins, problems

GOOD = "License-Expression: MIT\n"


def made(root: Path, name: str, version: str = "1.0", told: str = GOOD, content: bytes = b"x = 1\n") -> Distribution:
    """A package of one file, installed below `root`."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).rstrip(b"=").decode()
    info = root / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (root / f"{name}.py").write_bytes(content)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{told}")
    (info / "RECORD").write_text(f"{name}.py,sha256={digest},6\n{info.name}/METADATA,,\n")
    return PathDistribution(info)


def test_what_runs_here_is_pinned_unaltered_and_freely_licensed() -> None:
    """Every package of this environment, and there are some that read foreign bytes among them."""
    installed = list(distributions())
    assert list(problems(installed, pins(CONSTRAINTS.read_text()))) == []
    assert {normal(each.metadata["Name"]) for each in installed} >= {"cryptography", "msgpack", "paho-mqtt"} & READERS


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("msgpack", {}, []),
        ("Other_Thing", {"version": "2.0+cpu"}, []),
        ("stranger", {}, ["stranger 1.0: not in constraints.txt"]),
        ("msgpack", {"version": "1.1"}, ["msgpack 1.1: constraints.txt names 1.0"]),
        ("msgpack", {"content": b"x = 2\n"}, ["msgpack 1.0: msgpack.py is not the file that was installed"]),
        ("msgpack", {"told": "License: GPLv3\n"}, ["msgpack 1.0: licence GPLv3"]),
        ("msgpack", {"told": "License-Expression: AGPL-3.0-only\n"}, ["msgpack 1.0: licence AGPL-3.0-only"]),
        ("msgpack", {"told": "License: LGPL-2.1\n"}, []),
        ("msgpack", {"told": ""}, ["msgpack 1.0: licence not stated"]),
    ],
)
def test_what_differs_is_named(tmp_path: Path, name: str, how: dict[str, str], said: list[str]) -> None:
    """A stranger, another version, an altered file, a licence with conditions on the whole, or none."""
    package = made(tmp_path, name, **how)  # type: ignore[arg-type]
    assert list(problems([package], pins("# a comment\nmsgpack==1.0\nother.thing==2.0\n"))) == said


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    """As one that was altered."""
    package = made(tmp_path, "msgpack")
    (tmp_path / "msgpack.py").unlink()
    assert list(problems([package], {"msgpack": "1.0"})) == [
        "msgpack 1.0: msgpack.py is not the file that was installed"
    ]
