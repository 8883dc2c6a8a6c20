"""The bill of materials: all that is installed, once each, with version and licence."""

from __future__ import annotations

from importlib.metadata import version

from tools.sbom import document


def test_the_bill_names_what_is_installed() -> None:
    """The packages that handle foreign bytes are in it, with the versions that run here, and the bytes repeat."""
    bill = document()
    listed = {each["name"]: each for each in bill["components"]}
    assert len(listed) == len(bill["components"])
    for name in ("cryptography", "msgpack", "pydantic", "zstandard"):
        assert listed[name]["version"] == version(name)
        assert listed[name]["licenses"][0]["license"]["name"] != "not stated"
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert document() == bill
