"""Walking a page of the documentation: the lines behind its prompts, run as their roles would run them.

Each role has a folder of its own in the place of its machine, and keeps the folder that it went to last. `scp` copies
between those folders; `install` does what it says, but for the owner, who has no account here. Everything else is real.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.commands import Running

_TYPED = re.compile(r"^    (?P<role>[a-z0-9-]+)[$#] (?P<words>.+)$")
_SHIMS = {
    # HOST:PATH is PATH below the role's folder; `-r` and `-p` as cp knows them.
    "scp": '#!/bin/bash\nset -e\nargs=()\nfor word; do\n  case "$word" in\n'
    '    *:*) args+=("$WALK/${word%%:*}/${word#*:}") ;;\n    *) args+=("$word") ;;\n  esac\ndone\n'
    'exec cp "${args[@]}"\n',
    "install": '#!/bin/bash\nset -e\nargs=()\nwhile (($#)); do\n  case "$1" in\n    -o|-g) shift 2 ;;\n'
    '    *) args+=("$1"); shift ;;\n  esac\ndone\nexec /usr/bin/install "${args[@]}"\n',
    "mailboat": f'#!/bin/bash\nexec {sys.executable} -m mailboat "$@"\n',
}


@dataclass(frozen=True, slots=True)
class Typed:
    """One line that somebody types."""

    role: str
    words: str


def typed(page: str, heading: str) -> list[Typed]:
    """The lines behind prompts in the section of a page that begins with this heading, in order."""
    level = heading.split(" ", maxsplit=1)[0]
    section = page[page.index(f"\n{heading}\n") + 1 :].partition("\n")[2]
    section = re.split(rf"^#{{1,{len(level)}}} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    found = (_TYPED.match(line) for line in section.splitlines())
    return [Typed(match["role"], match["words"]) for match in found if match]


class Walk:
    """The machines of all roles, below `root`; leaving ends what runs there."""

    def __init__(self, root: Path, roles: Iterable[str], changed: Mapping[str, str]) -> None:
        """`changed` says which words of the page are others here: the broker's host, port and folder."""
        self.root = root
        self._changed = changed
        self._folders = {role: root / role for role in roles}
        for folder in self._folders.values():
            folder.mkdir()
        self._stack = ExitStack()
        shims = root / "shims"
        shims.mkdir()
        for name, text in _SHIMS.items():
            (shims / name).write_text(text)
            (shims / name).chmod(0o755)
        here = str(Path(__file__).resolve().parents[1])
        paths = f"{shims}:/usr/local/sbin:/usr/sbin:{os.environ['PATH']}"
        self.env = {"PATH": paths, "WALK": str(root), "PYTHONPATH": here, "COLUMNS": "200"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def folder(self, role: str) -> Path:
        """Where a role is now."""
        return self._folders[role]

    def run(self, line: Typed, *, answer: str = "") -> str:
        """Type a line, and `answer` to what it asks; returns what it printed. AssertionError when it fails."""
        where = self.root / "where"
        command = f"set -e; {self._here(line.words)}; pwd > {where}"
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=self.folder(line.role),
            env={**os.environ, **self.env},
            input=answer,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{line.role}$ {line.words}\n{done.stdout}{done.stderr}"
        self._folders[line.role] = Path(where.read_text().strip())
        return done.stdout + done.stderr

    def start(self, line: Typed) -> Running:
        """Type a line whose command stays in the foreground; it is ended with the walk."""
        log = self.root / f"{line.role}.out"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/bash", "-c", f"exec {self._here(line.words)}"],
                cwd=self.folder(line.role),
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(_end, process)
        return Running(process, log)

    def _here(self, words: str) -> str:
        for there, here in self._changed.items():
            words = words.replace(there, here)
        return words


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
