"""`mailboat provision`: the authority that says who takes part in a federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from mailboat.register import Entry

app = typer.Typer(help="Say who takes part: keys, certificates, revocations.", no_args_is_help=True)

DEFAULT = Path("authority")
DIR = typer.Option("--dir", help="The authority's folder.")
_BROKER_FOLDER = Path("/etc/mosquitto/mailboat")
_DAY_S = 86_400

SITE_DAYS = 45
"""Renewed from the fifteenth day before the end on: a weekly `provision renew` reaches a site that was a week away."""
DaysOption = Annotated[int, typer.Option(min=1, max=3650, help="How long the site's membership and certificate count.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder, on a machine that few can use.")],
    *,
    federation: Annotated[Path, typer.Option(help="The federation's federation.toml.")] = Path("federation.toml"),
    broker_host: Annotated[
        list[str], typer.Option(help="Name or address by which clients dial the broker; may be repeated.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The broker's TLS port.")] = 8883,
    broker_folder: Annotated[
        Path, typer.Option(help="Where the broker's files will lie on its own machine.")
    ] = _BROKER_FOLDER,
) -> None:
    """Make an authority, the coordinator's kit, and all that the broker needs; say what to copy where."""
    from mailboat import authority as bench
    from shared.config import FederationConfig
    from shared.configfile import load_config
    from shared.trust.signing import authority_fingerprint

    agreed = load_config(federation, FederationConfig)
    if agreed.trust.mode != "sealed":
        raise ConfigError(
            f"{federation}: trust.mode is {agreed.trust.mode}, so nothing would be signed or encrypted",
            hint='write under [trust]: mode = "sealed"',
        )
    name, there = agreed.federation.name, broker_folder.absolute()
    made = bench.create(folder, name, broker_host, port=port, broker_folder=there, now=bench.unix_now())
    for line in _copy_what_where(folder, there, broker_host[0], port):
        console.result().print(line, markup=False)
    console.result().print(f"\nauthority fingerprint: {authority_fingerprint(made.public)}", markup=False)
    console.result().print("Read it to each site over the telephone when it is admitted.", markup=False)


def _copy_what_where(folder: Path, there: Path, host: str, port: int) -> list[str]:
    return [
        f"{folder}: keep it offline or on a machine that few can use, and keep a backup of it apart.",
        "",
        f"{folder}/broker -> {there} on the broker's machine, owned by the broker's user, modes as they are:",
        f"  mosquitto -c {there}/mosquitto.conf",
        f"{folder}/coordinator-kit -> the coordinator's machine, owned by its user; in coordinator.toml:",
        "  [trust]",
        '  kit = "coordinator-kit"',
        "  [broker]",
        f'  url = "mqtts://{host}:{port}"',
        '  ca_file = "coordinator-kit/ca.crt"',
        '  cert_file = "coordinator-kit/tls.crt"',
        '  key_file = "coordinator-kit/tls.key"',
    ]


@app.command()
def approve(
    request: Annotated[Path, typer.Argument(help="The site's request.json.")],
    *,
    folder: Annotated[Path, DIR] = DEFAULT,
    days: DaysOption = SITE_DAYS,
    fingerprint: Annotated[
        str | None, typer.Option(help="What the site has read out; else it is shown and asked for.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The site has new keys: revoke those that it had before.")
    ] = False,
) -> None:
    """Admit a site, once its fingerprint was compared over the telephone; writes NAME.grant for the site."""
    from mailboat import authority as bench
    from mailboat.enrolment import parse_request
    from mailboat.files import reading
    from shared.trust.document import MAX_DOCUMENT_BYTES
    from shared.trust.signing import authority_fingerprint

    opened = bench.open_authority(folder)
    asked = parse_request(reading(request, MAX_DOCUMENT_BYTES))
    confirm(asked.fingerprint, fingerprint, f"request of {asked.name}", "the site")
    barred = any(entry.name == asked.name and entry.state == "revoked" for entry in opened.register.entries)
    opened, path = bench.approve(opened, asked, days=days, now=bench.unix_now(), replace=replace)
    _tell_grant(asked.name, path, days)
    console.say(f"the authority's fingerprint, to read to the site: {authority_fingerprint(opened.public)}")
    if replace or barred:
        _tell_revoked(folder)
    else:
        _tell_roster(folder)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The site.")], *, folder: Annotated[Path, DIR] = DEFAULT) -> None:
    """Take a site's membership and certificate back, for good; its name may be admitted again with new keys."""
    from mailboat import authority as bench

    bench.revoke(bench.open_authority(folder), name, now=bench.unix_now())
    console.say(f"{name} is revoked")
    _tell_revoked(folder)


@app.command("list")
def list_command(
    *,
    folder: Annotated[Path, DIR] = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say who was admitted, until when, and who was revoked."""
    from mailboat import authority as bench

    opened, now = bench.open_authority(folder), bench.unix_now()
    rows = [_row(entry, now) for entry in opened.register.entries]
    if as_json:
        console.print_json(
            {
                "federation": opened.register.federation,
                "revocations": opened.register.number,
                "cas": opened.register.cas.trusted,
                "keys": opened.register.keys.trusted,
                "members": rows,
            }
        )
        return
    out = console.result()
    out.print(f"{'name':20s} {'role':11s} {'state':10s} {'until':10s} {'days':>5s}  serial", markup=False)
    for row in rows:
        out.print(
            f"{row['name']:20s} {row['role']:11s} {row['state']:10s} {row['until']:10s} {row['days_left']:>5d}  "
            f"{row['serial']:016x}",
            markup=False,
        )


def confirm(right: str, given: str | None, what: str, who: str) -> None:
    """Return when a person has compared the fingerprint; RefusedError(rule='other-fingerprint') when it differs."""
    from mailboat.enrolment import same_fingerprint

    console.result().print(f"fingerprint of the {what}: {right}", markup=False)
    if given is None:
        if not typer.confirm(f"Has {who} read you exactly this over the telephone?", err=True):
            raise RefusedError(
                f"the {what} was not confirmed", rule="other-fingerprint", hint="find out who altered it on the way"
            )
    elif not same_fingerprint(given, right):
        raise RefusedError(
            f"the fingerprint of the {what} is another one",
            rule="other-fingerprint",
            hint="find out who altered it on the way",
        )


def tell_hand_over(folder: Path) -> None:
    """Say how roster and grants get to the coordinator, which hands the grants to the sites."""
    console.say(f"copy {folder}/coordinator-kit/roster and grants into the coordinator's kit, unless it uses this very")
    console.say("folder; a running coordinator hands each site its grant within seconds, or when the site comes")


SIGHUP = "systemctl reload mosquitto, or: kill -HUP its process"


def _tell_grant(name: str, path: Path, days: int) -> None:
    console.say(f"{name} counts for {days} days; send it {path}, which holds no secret; at the site:")
    console.say(f"  mailboat site accept {path.name} --kit KIT")


def _tell_roster(folder: Path) -> None:
    console.say(f"copy {folder}/coordinator-kit/roster into the coordinator's kit, unless it uses this very folder")


def _tell_revoked(folder: Path) -> None:
    console.say(f"copy {folder}/coordinator-kit/revocations and roster into the coordinator's kit, unless it uses this")
    console.say("very folder; a running coordinator sees it within seconds, and revoked keys count no more")
    console.say(f"copy {folder}/broker/crl.pem and acl to the broker's folder, then: {SIGHUP}")


def _row(entry: Entry, now: int) -> dict[str, str | int]:
    import time

    return {
        "name": entry.name,
        "role": entry.role,
        "state": entry.state,
        "until": time.strftime("%Y-%m-%d", time.gmtime(entry.not_after)),
        "days_left": (entry.not_after - now) // _DAY_S,
        "serial": entry.serial,
        "ca": entry.ca,
        "key": entry.key,
    }
