"""From the name of a base model to a local folder that holds it, with an error that says what is missing.

Weights are read from safetensors files only: the older `pytorch_model.bin` is a pickle, which runs what it contains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shared.errors import ConfigError, UnavailableError

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")


def local_folder(source: str | Path, revision: str) -> Path:
    """Return the folder of the model `source`, a local path or a hub id, downloading it when needed.

    Raises ConfigError when there is no such folder, model or revision, when access is gated, or when config.json or the
    weights are missing; UnavailableError when the hub cannot be reached and no copy is in its cache.
    """
    text = str(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{text} is a file, a model is a folder", hint="name the folder that holds config.json")
        if isinstance(source, Path) or _looks_like_path(text):
            raise ConfigError(f"{text}: no such folder", hint="name a model's folder, or a hub id such as owner/model")
        folder = _download(text, revision)
    _check_complete(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the model's config.json; ConfigError when it is no JSON object with a model_type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigError(f"{path} is not JSON", hint="copy the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path} names no model_type", hint="this is not the config.json of a transformers model")
    return config


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or not text


def _download(name: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except HFValidationError:
        raise ConfigError(
            f"{name!r} is neither a folder nor a hub id", hint="name a model's folder, or a hub id such as owner/model"
        ) from None
    except GatedRepoError:
        raise ConfigError(
            f"the hub asks for a licence or a login before it hands out {name}",
            hint="accept the licence on its page, then run: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{name} has no revision {revision!r} on the hub", hint="mend model.revision") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise _unreachable(name) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{name} is neither a folder here nor a model on the hub",
            hint="check the spelling; a private model needs: hf auth login",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UnavailableError(f"the hub answered {status} for {name}", hint="try again later") from None


def _unreachable(name: str) -> UnavailableError:
    return UnavailableError(
        f"{name} is no folder here, the Hugging Face hub cannot be reached, and this machine's cache does not have it",
        hint="mend model.base if a folder is meant; otherwise connect once, or copy the model here and name its folder",
    )


def _check_complete(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json", hint="a model's folder comes from save_pretrained or the hub")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise ConfigError(
            f"{folder} holds its weights as pickles (*.bin), which are not loaded",
            hint="convert them: save_pretrained writes safetensors",
        )
    raise ConfigError(f"{folder} has no weights: no *.safetensors file", hint="copy the whole model, weights included")
