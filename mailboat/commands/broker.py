"""`mailboat broker`: a broker for trying things on one machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError

if TYPE_CHECKING:
    from mailboat.doctor.network import Party
    from shared.config import BrokerSection

app = typer.Typer(
    help="A broker for trying things on this machine; access rules; whether a broker keeps them.", no_args_is_help=True
)


class Kind(StrEnum):
    """Which broker."""

    AUTO = "auto"
    MOSQUITTO = "mosquitto"
    AMQTT = "amqtt"


@app.command("run")
def run_command(
    *,
    kind: Annotated[
        Kind, typer.Option(help="mosquitto, or the embedded amqtt; auto takes mosquitto where it is installed.")
    ] = Kind.AUTO,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port on 127.0.0.1.")] = 1883,
    workdir: Annotated[Path, typer.Option(help="Folder for the broker's configuration and log.")] = Path("broker-run"),
) -> None:
    """Run a broker without passwords on this machine's loopback address, until Ctrl-C.

    Other machines cannot reach it. For a real federation run Mosquitto with the project's mosquitto.conf.
    """
    from mailboat import foreground

    foreground.run(_serve(kind, port, workdir))


async def _serve(kind: Kind, port: int, workdir: Path) -> None:
    from broker.launcher import run_broker
    from shared.errors import UnavailableError

    async with run_broker(kind.value, workdir, port) as broker:
        console.result().print(broker.url)
        console.say(f"{broker.kind} {broker.version} serves; its log is {broker.log}; Ctrl-C stops it")
        if broker.notice:
            console.say(broker.notice, style="yellow")
        status = await broker.wait()
        raise UnavailableError(
            f"{broker.kind} ended by itself with status {status}", hint=f"the last lines of {broker.log} tell why"
        )


@app.command()
def acl(
    *,
    federation: Annotated[str, typer.Option(help="Name of the federation.")],
    coordinator_user: Annotated[str, typer.Option(help="The coordinator's user name at the broker.")] = "coordinator",
) -> None:
    """Print Mosquitto's access rules (acl_file) for a federation; each site's user name is the site's name."""
    from broker.acl import render_acl

    console.result().print(render_acl(federation, coordinator_user), end="", markup=False)


@app.command()
def check(
    *,
    config: Annotated[
        list[Path],
        typer.Option(
            "--config", "-c", help="site.toml of two sites or more, and coordinator.toml if it is here; repeat it."
        ),
    ],
    revoked: Annotated[
        Path | None, typer.Option(help="Kit of a site that was revoked: its certificate must not let it in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove by trying that the broker keeps sites apart: reading, writing, client ids, certificates.

    It connects with the certificates that the configurations name, so the sites' own processes lose their connections
    meanwhile; take sites that were enrolled for this alone. Returns 0 when the broker refused all that it must.
    """
    import asyncio

    from mailboat.doctor.finding import status_of
    from mailboat.intrusion import check as try_all

    parties = [_party(path) for path in config]
    if sum(party.site is not None for party in parties) < 2:
        raise ConfigError("one site alone cannot try to be another", hint="name the site.toml of two sites: -c A -c B")
    findings = asyncio.run(try_all(parties, _revoked(parties[0], revoked)))
    if as_json:
        console.print_json([finding.plain() for finding in findings])
    else:
        for finding in findings:
            console.result().print(f"{finding.level:<5s}{finding.what:<12s} {finding.message}", markup=False)
            if finding.hint:
                console.result().print(f"{'':17s} -> {finding.hint}", markup=False)
    raise typer.Exit(status_of(findings))


def _party(path: Path) -> Party:
    import tomllib

    from mailboat.doctor.network import Party
    from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
    from shared.configfile import load_config

    try:
        of_site = "name" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        of_site = True  # loading it below says what is wrong
    if of_site:
        site = load_config(path, SiteConfig)
        return Party(load_config(site.federation, FederationConfig).federation.name, site.name, site.broker)
    coordinator = load_config(path, CoordinatorConfig)
    name = load_config(coordinator.federation, FederationConfig).federation.name
    return Party(name, None, coordinator.broker)


def _revoked(party: Party, kit: Path | None) -> BrokerSection | None:
    from shared.trust.kit import TLS_CERT, TLS_KEY

    if kit is None:
        return None
    for name in (TLS_CERT, TLS_KEY):
        if not (kit / name).is_file():
            raise ConfigError(f"{kit / name}: no such file", hint="--revoked names a kit's folder")
    return party.broker.model_copy(update={"cert_file": kit / TLS_CERT, "key_file": kit / TLS_KEY})
