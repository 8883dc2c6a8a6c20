"""Configuration models written as TOML, so that a person can read and reuse what a demonstration ran with."""

from __future__ import annotations

import json
from typing import Any

from shared.config import Section


def to_toml(config: Section) -> str:
    """Return the TOML text that `load_config` reads back as `config`; keys that are None are left out."""
    return _table(config.model_dump(mode="json", exclude_none=True), ()).lstrip("\n")


def _table(values: dict[str, Any], path: tuple[str, ...]) -> str:
    """Plain keys before sub-tables, as TOML asks."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    head = f"\n[{'.'.join(path)}]\n" if path and plain else ""
    lines = "".join(f"{key} = {_value(value)}\n" for key, value in plain.items())
    tables = (_table(value, (*path, key)) for key, value in values.items() if isinstance(value, dict))
    return head + lines + "".join(tables)


def _value(value: object) -> str:
    """A JSON string is a TOML basic string; numbers and booleans are written alike in both."""
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value, allow_nan=False)
