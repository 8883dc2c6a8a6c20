"""The docker set-up, read as docker would read it: every path, command, port, name and password in it exists."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
SITES = ["site-1", "site-2", "site-3"]
OURS = [name for name in SERVICES if name != "broker"]
CONFIG_FOLDER = "/etc/mailboat"


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Where in the container each mount lies: target -> (source, read-only)."""
    found = {}
    for text in SERVICES[service].get("volumes", []):
        source, target, *mode = text.split(":")
        found[target] = (source, mode == ["ro"])
    return found


def command_of(service: str) -> list[str]:
    """The words after `mailboat` that the container runs, also where a shell starts it."""
    command = SERVICES[service]["command"]
    if "entrypoint" not in SERVICES[service]:
        return list(command)
    words = shlex.split(command[0])
    return words[words.index("mailboat") + 1 :]


def config_of(service: str) -> Path:
    """The configuration file of a service, in this repository."""
    words = command_of(service)
    inside = Path(words[words.index("--config") + 1])
    assert mounts(service)[CONFIG_FOLDER] == ("./docker", True)
    return ROOT / "docker" / inside.relative_to(CONFIG_FOLDER)


def loaded(service: str) -> CoordinatorConfig | SiteConfig:
    """A service's configuration, validated."""
    path = config_of(service)
    return load_config(path, CoordinatorConfig) if service == "coordinator" else load_config(path, SiteConfig)


def test_the_parts_are_there() -> None:
    """A broker, a coordinator and three sites, and the two preparations that they wait for."""
    assert set(SERVICES) == {"broker", "coordinator", "notes", "seal", *SITES}
    assert set(SERVICES["coordinator"]["depends_on"]) == {"seal", "broker"}
    for site in SITES:
        assert set(SERVICES[site]["depends_on"]) == {"notes", "broker"}


@pytest.mark.parametrize("service", SERVICES)
def test_mounted_paths_exist(service: str) -> None:
    """A mount comes from a file or folder of the repository, or from a named volume that is declared."""
    for source, read_only in mounts(service).values():
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert read_only, source
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", OURS)
def test_commands_exist(service: str) -> None:
    """Each command line is one that the command line parser accepts, option by option."""
    import typer

    from mailboat.cli import app

    command, words = typer.main.get_command(app), command_of(service)
    name = "mailboat"
    while isinstance(command, typer.core.TyperGroup):
        name, *words = words
        with command.make_context("mailboat", [name], resilient_parsing=True) as context:
            found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        command = found
    with command.make_context(name, list(words)) as context:
        assert context.params


@pytest.mark.parametrize("service", SERVICES)
def test_no_container_has_more_rights_than_it_needs(service: str) -> None:
    """Read-only, without capabilities, not root, and published to this machine only."""
    settings = SERVICES[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in settings.get("ports", []))
    assert settings.get("user", "1883:1883") == "1883:1883"
    assert "\nUSER mailboat\n" in DOCKERFILE


def test_the_broker_reads_the_hardened_file() -> None:
    """The container runs the repository's mosquitto.conf, and the files that it names are mounted where it looks."""
    settings, mounted = SERVICES["broker"], mounts("broker")
    folder = settings["working_dir"]
    assert settings["command"] == ["mosquitto", "-c", "mosquitto.conf"]
    assert mounted[f"{folder}/mosquitto.conf"] == ("./mosquitto.conf", True)
    conf = (ROOT / "mosquitto.conf").read_text()
    for key in ("password_file", "acl_file"):
        (named,) = re.findall(rf"^{key} (\S+)$", conf, flags=re.MULTILINE)
        assert mounted[f"{folder}/{Path(named).parent}"] == (f"./{Path(named).parent}", True)
        assert (ROOT / named).is_file()


def test_the_ports_agree() -> None:
    """Listener, published port and the URL in every configuration name one port."""
    (port,) = re.findall(r"^listener (\d+)$", (ROOT / "mosquitto.conf").read_text(), flags=re.MULTILINE)
    assert SERVICES["broker"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert {loaded(service).broker.url for service in ["coordinator", *SITES]} == {f"mqtt://broker:{port}"}


@pytest.mark.parametrize("service", ["coordinator", *SITES])
def test_configurations_load_and_their_names_and_passwords_fit(service: str) -> None:
    """Each file is valid; its user is in the broker's password file with this password; a site is admitted by name."""
    config = loaded(service)
    federation = load_config(config.federation, FederationConfig)
    assert config.broker.username == service
    assert config.broker.password_file is not None
    password = config.broker.password_file.read_text().strip()
    assert is_password(service, password)
    assert not is_password(service, password + "x")
    if isinstance(config, SiteConfig):
        assert config.name == service
        assert config.name in federation.federation.sites


def is_password(user: str, password: str) -> bool:
    """Whether the broker's password file ($7$: PBKDF2 of SHA-512) admits this user with this password."""
    entries = dict(line.split(":", 1) for line in (ROOT / "docker/broker/passwords").read_text().split())
    _, kind, iterations, salt, digest = entries[user].split("$")
    assert kind == "7"
    computed = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), int(iterations))
    return computed == base64.b64decode(digest)


@pytest.mark.parametrize("service", ["coordinator", *SITES])
def test_what_is_kept_lies_on_a_volume(service: str) -> None:
    """Storage is on the service's own writable volume; a site's notes come from the notes volume, read-only."""
    config = loaded(service)
    mounted = mounts(service)
    assert mounted["/var/lib/mailboat"] == (service, False)
    assert config.storage.is_relative_to("/var/lib/mailboat")
    if isinstance(config, SiteConfig):
        assert mounted["/data"] == ("notes", True)
        words = command_of("notes")
        out = Path(words[words.index("--out") + 1])
        assert config.data.notes == out / service
        assert int(words[words.index("--sites") + 1]) == len(SITES)


def test_the_plan_is_sealed_where_the_coordinator_looks() -> None:
    """The sealing container has the coordinator's configuration and volume, and the image with the trainer."""
    assert config_of("seal") == config_of("coordinator")
    assert mounts("seal")["/var/lib/mailboat"] == mounts("coordinator")["/var/lib/mailboat"]
    assert SERVICES["seal"]["build"]["target"] == "site"


@pytest.mark.parametrize("service", OURS)
def test_images_come_from_stages_of_the_dockerfile(service: str) -> None:
    """Each build target is a stage of the Dockerfile."""
    assert SERVICES[service]["build"]["target"] in re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)


def test_copied_files_exist_and_are_sent_to_the_builder() -> None:
    """Each COPY names files that the repository has and .dockerignore lets through."""
    ignored = set((ROOT / ".dockerignore").read_text().split())
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "coordinator", "edge_client"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not {source, Path(source).parts[0]} & ignored, source


def test_the_base_model_lies_where_the_federation_says() -> None:
    """The Dockerfile puts the shipped model where docker/federation.toml looks for it."""
    base = load_config(ROOT / "docker/federation.toml", FederationConfig).model.base
    assert re.search(rf"^COPY mailboat/assets/\S+ {re.escape(base)}$", DOCKERFILE, flags=re.MULTILINE)
