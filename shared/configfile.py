"""Reading configuration files: TOML into the sections of `shared.config`, with errors that name file and key."""

from __future__ import annotations

import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from shared.config import FOLDER_OR_ID, Section
from shared.errors import ConfigError

_C = TypeVar("_C", bound=Section)


def load_config(path: Path, model: type[_C]) -> _C:
    """Read a TOML file into `model`; relative paths inside are taken from the file's folder.

    What may be a folder or a hub id is a folder where there is one.

    Raises ConfigError that names the file, the key and, for an unknown key, the nearest right one.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file", hint="`mailboat init DIR` writes commented examples") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, a TOML file was expected", hint="name the file itself") from None
    except PermissionError:
        raise ConfigError(f"{path} may not be read by this user", hint="check the file's owner and mode") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", hint="save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}", hint="mend the line it names") from None
    return _anchored(parse_config(data, model, str(path)), path.resolve().parent)


def parse_config(data: dict[str, Any], model: type[_C], where: str) -> _C:
    """Validate a decoded table; ConfigError names `where` and each wrong key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_problem(model, item["loc"], item["type"], item["msg"]) for item in error.errors()]
        hint = "mend the key" if len(problems) == 1 else "mend these keys"
        raise ConfigError(f"{where}: " + "; ".join(problems), hint=hint) from None


def _problem(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, text: str) -> str:
    key = ".".join(str(part) for part in loc)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        known = _keys_beside(model, loc)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.4)
        instead = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {instead}"
    what = text.removeprefix("Value error, ")
    return f"{key}: {what}" if key else what


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    here: Any = model
    for part in loc[:-1]:
        annotation = here.model_fields[part].annotation
        here = next((arm for arm in (annotation, *typing.get_args(annotation)) if hasattr(arm, "model_fields")), None)
        if here is None:
            return []
    return sorted(here.model_fields)


def _anchored(config: _C, folder: Path) -> _C:
    changed: dict[str, Any] = {}
    for name, value in config:
        if isinstance(value, Path):
            changed[name] = folder / value.expanduser()
        elif isinstance(value, Section):
            changed[name] = _anchored(value, folder)
        elif FOLDER_OR_ID in type(config).model_fields[name].metadata and (folder / value).is_dir():
            changed[name] = str(folder / value)
    return config.model_copy(update=changed)
