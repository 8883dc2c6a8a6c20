from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from mailboat.commands.init import TEMPLATES, init
from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import ConfigError

KINDS: dict[str, type[BaseModel]] = {
    "federation.toml": FederationConfig,
    "coordinator.toml": CoordinatorConfig,
    "site.toml": SiteConfig,
}
SETTING = re.compile(r"^(?:# )?([a-z0-9_]+ = .+)$")
SECTION = re.compile(r"^(?:# )?(\[[a-z.]+\])$")


def begin(folder: Path, **options: Any) -> Path:
    """Call `mailboat init` with the options' default values where none are given."""
    defaults = {"name": "demo", "model": None, "broker": "mqtt://127.0.0.1:1883", "sites": 1, "sealed": False}
    init(folder, **{**defaults, **options})
    return folder


def settings_of(text: str) -> dict[str, Any]:
    """All settings of a template, those in comments too, by section and key."""
    lines = []
    for line in text.splitlines():
        found = SETTING.match(line) or SECTION.match(line)
        if found:
            lines.append(found[1])
    return tomllib.loads(re.sub(r"@[A-Z]+@", '"x"', "\n".join(lines)))


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration, dotted, with its default."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        kinds = (info.annotation, *get_args(info.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is not None:
            found |= leaves(section, f"{prefix}{name}.")
        else:
            found[prefix + name] = info.get_default()
    return found


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A TOML table with dotted keys."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_is_explained(name: str) -> None:
    """A template holds each key that its configuration knows, and no other, in its section."""
    written = settings_of((TEMPLATES / name).read_text())
    assert set(flat(written)) == set(leaves(KINDS[name]))


@pytest.mark.parametrize("name", KINDS)
def test_commented_values_are_the_defaults(name: str) -> None:
    """What a comment shows as a default is the default, wherever there is one."""
    text = (TEMPLATES / name).read_text()
    shown = flat(settings_of(text))
    active = flat(tomllib.loads(re.sub(r"@[A-Z]+@", '"x"', text)))
    for key, default in leaves(KINDS[name]).items():
        if key in active or default is None or "PydanticUndefined" in repr(default):
            continue
        assert shown[key] == (list(default) if isinstance(default, tuple) else default), key


def test_init_writes_files_that_load(tmp_path: Path) -> None:
    """The three files load as they are, and name each other."""
    folder = begin(tmp_path / "new")
    coordinator = load_config(folder / "coordinator.toml", CoordinatorConfig)
    site = load_config(folder / "site.toml", SiteConfig)
    assert coordinator.federation == site.federation == folder.resolve() / "federation.toml"
    federation = load_config(coordinator.federation, FederationConfig)
    assert federation.model.base == str(TEMPLATES.parent / "assets" / "base-llama-16")


def test_several_sites_get_files_of_their_own(tmp_path: Path) -> None:
    """Sites of one machine differ in name, storage and notes."""
    folder = begin(tmp_path, sites=3)
    sites = [load_config(folder / f"site-{number}.toml", SiteConfig) for number in (1, 2, 3)]
    for values in zip(*((site.name, site.storage, site.data.notes) for site in sites), strict=True):
        assert len(set(values)) == 3


@pytest.mark.parametrize(
    ("options", "file", "threads"),
    [
        ({"sites": 2}, "site-2.toml", 1),
        ({"sites": 1}, "site.toml", 0),
        ({"sites": 2, "sealed": True, "broker": "mqtts://broker.example:8883"}, "site-2.toml", 0),
    ],
    ids=["on one machine", "one site", "sealed"],
)
def test_sites_that_share_a_machine_take_a_core_each(
    tmp_path: Path, options: dict[str, Any], file: str, threads: int
) -> None:
    """Several open sites are for a try on one machine; one alone, and those of a sealed federation, have it all."""
    assert load_config(begin(tmp_path, **options) / file, SiteConfig).threads == threads


@pytest.mark.parametrize(("sites", "file"), [(1, "site.toml"), (2, "site-1.toml")])
def test_sealed_files_name_kits_and_certificates(tmp_path: Path, sites: int, file: str) -> None:
    """The federation is sealed, and each machine's kit and certificate are those that the next commands make."""
    folder = begin(tmp_path, sites=sites, broker="mqtts://broker.example:8883", sealed=True)
    assert load_config(folder / "federation.toml", FederationConfig).trust.mode == "sealed"
    machines = (
        ("coordinator", load_config(folder / "coordinator.toml", CoordinatorConfig)),
        ("site-1", load_config(folder / file, SiteConfig)),
    )
    for who, config in machines:
        kit = folder.resolve() / f"{who}-kit"
        assert config.trust.kit == kit
        files = config.broker.ca_file, config.broker.cert_file, config.broker.key_file
        assert files == (kit / "ca.crt", kit / "tls.crt", kit / "tls.key")


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """A folder that holds one of the files is refused, and none of the others is written."""
    (tmp_path / "site.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds site.toml"):
        begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]
    assert (tmp_path / "site.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "My Federation"}, "federation.name"),
        ({"broker": "http://broker"}, "broker.url: must start with mqtt://"),
        ({"model": "./nowhere"}, "./nowhere: no such folder"),
        ({"sealed": True}, "mqtt://127.0.0.1:1883 has no TLS"),
    ],
)
def test_init_refuses_values_that_would_not_load(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """A wrong value from the command line is refused by name before anything is written."""
    with pytest.raises(ConfigError, match=message) as refused:
        begin(tmp_path / "new", **options)
    assert "mend" not in (refused.value.hint or "")
    assert not (tmp_path / "new").exists()


def test_a_model_may_be_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    """A folder is written as its absolute path, whatever is in its name; a hub id as it is."""
    base = tmp_path / 'a "quoted" model'
    base.mkdir()
    local = load_config(begin(tmp_path / "1", model=str(base)) / "federation.toml", FederationConfig)
    hub = load_config(begin(tmp_path / "2", model="owner/model") / "federation.toml", FederationConfig)
    assert (local.model.base, hub.model.base) == (str(base), "owner/model")
