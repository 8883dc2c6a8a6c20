"""What every section of a configuration file is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FOLDER_OR_ID = "folder or id"
"""Marks a text that names a folder or, where there is none, something of that id elsewhere."""


class Section(BaseModel):
    """Frozen; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
