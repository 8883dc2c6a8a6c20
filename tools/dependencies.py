"""What is installed, against what was agreed on; with nothing from the network: `python -m tools.dependencies`.

    version     each package is there in the version that constraints.txt names, and none that it does not name
    content     each file of a package that reads foreign bytes has the SHA-256 that its wheel's RECORD lists
    licence     each package states one, and none that would put a condition on the whole (GPL, AGPL, SSPL)

Whether a version is known to be vulnerable is not known here: `pip-audit -r constraints.txt` asks the network.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from tools.sbom import licence

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
UNPINNED = {"mailboat", "pip", "setuptools"}
"""This project, and what brings packages into an environment."""
READERS = {
    *("aiomqtt", "blake3", "cffi", "cryptography", "msgpack", "numpy", "paho-mqtt", "pydantic", "pydantic-core"),
    *("safetensors", "tokenizers", "zstandard"),
}
"""What messages, files of tensors and certificates go through."""

_PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;+]+)", re.MULTILINE)
_CONDITIONS = re.compile(r"\b(?<!L)A?GPL|SSPL|not stated")


def normal(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Version by name of each line `name==version`."""
    return {normal(name): version for name, version in _PIN.findall(text)}


def problems(installed: Iterable[Distribution], pinned: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the installed packages, by name."""
    for each in sorted(installed, key=lambda each: normal(each.metadata["Name"])):
        name = normal(each.metadata["Name"])
        if name in UNPINNED:
            continue
        version = each.version.partition("+")[0]  # any build of it
        if name not in pinned:
            yield f"{name} {version}: not in constraints.txt"
        elif version != pinned[name]:
            yield f"{name} {version}: constraints.txt names {pinned[name]}"
        if _CONDITIONS.search(stated := licence(each)):
            yield f"{name} {version}: licence {stated}"
        if name in READERS:
            yield from (f"{name} {version}: {path} is not the file that was installed" for path in altered(each))


def altered(package: Distribution) -> Iterator[str]:
    """Yield the files of a package that are gone, or have other content than its RECORD says."""
    for path in package.files or ():
        if path.hash is None or path.hash.mode != "sha256":
            continue
        found = Path(str(package.locate_file(path)))
        digest = hashlib.sha256(found.read_bytes()).digest() if found.exists() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != path.hash.value:
            yield str(path)


def main() -> int:
    """Print all problems; 1 when there are any."""
    found = list(problems(distributions(), pins(CONSTRAINTS.read_text(encoding="utf-8"))))
    for line in found:
        sys.stdout.write(f"[dependencies] {line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
