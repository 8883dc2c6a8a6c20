"""The software bill of materials: every package that this environment holds, as CycloneDX 1.5 JSON on standard output.

Read from the installed packages' own metadata, with nothing from the network, so that it says what runs here and not
what a list says should. `tools/setup.sh` installs the versions in constraints.txt.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from typing import Any

NAMESPACE = uuid.UUID("6d61696c-626f-4174-8000-000000000001")


def components() -> Iterator[dict[str, Any]]:
    """One entry for each installed package, by name."""
    found = {each.metadata["Name"].lower().replace("_", "-"): each for each in distributions() if each.metadata["Name"]}
    for name, each in sorted(found.items()):
        yield {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{each.version}",
            "name": name,
            "version": each.version,
            "purl": f"pkg:pypi/{name}@{each.version}",
            "licenses": [{"license": {"name": licence(each)}}],
        }


def licence(package: Distribution) -> str:
    """What a package says of its licence: its expression or field, else its classifiers."""
    told = package.metadata
    named = [text.rpartition(" :: ")[2] for text in told.get_all("Classifier") or () if text.startswith("License ::")]
    fields = [text.strip() for key in ("License-Expression", "License") for text in told.get_all(key) or () if text]
    if fields and "\n" not in fields[0]:
        return str(fields[0][:100])
    return ", ".join(named) or "not stated"


def document() -> dict[str, Any]:
    """The whole bill; the same packages give the same bytes."""
    listed = list(components())
    serial = uuid.uuid5(NAMESPACE, "\n".join(each["purl"] for each in listed))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "mailboat"}},
        "components": listed,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=1) + "\n")
