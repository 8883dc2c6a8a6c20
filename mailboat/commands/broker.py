"""`mailboat broker`: a broker for trying things on one machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mailboat import console

app = typer.Typer(help="A broker for trying things on this machine.", no_args_is_help=True)


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
