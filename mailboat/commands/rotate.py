"""`mailboat provision rotate` and `renew`: what was issued, issued anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from mailboat.commands.provision import DEFAULT, DIR, SIGHUP, SITE_DAYS, DaysOption, tell_hand_over
from shared.errors import ConfigError

if TYPE_CHECKING:
    from mailboat.issuing import Authority


def rotate(
    name: Annotated[
        str,
        typer.Argument(
            help="A site, coordinator or broker: its certificate; federation-key: the key of states; ca: the TLS CA."
        ),
    ],
    *,
    folder: Annotated[Path, DIR] = DEFAULT,
    days: DaysOption = SITE_DAYS,
    finish: Annotated[bool, typer.Option("--finish", help="With `ca`: drop the CA before, and its key.")] = False,
) -> None:
    """Renew one certificate now, for the keys that are there; have the federation key drawn anew; change the TLS CA."""
    from mailboat import authority as bench
    from mailboat import renewing

    if finish and name != "ca":
        raise ConfigError(f"--finish has no meaning for {name}", hint="it ends `mailboat provision rotate ca`")
    opened, now = bench.open_authority(folder), bench.unix_now()
    if name == "ca":
        _roll_over(opened, finish=finish, now=now)
    elif name == "federation-key":
        bench.rotate_federation_key(opened, now=now)
        console.say(f"copy {folder}/coordinator-kit/revocations into the coordinator's kit: it draws a new key at once")
    elif name == "coordinator":
        renewing.rotate_end(opened, "coordinator", now=now)
        _tell_coordinator(folder)
    elif name == "broker":
        renewing.rotate_end(opened, "broker", now=now)
        _tell_broker(folder)
    else:
        renewing.rotate_site(opened, name, days=days, now=now)
        console.say(f"{name} counts for {days} days from now")
        tell_hand_over(folder)
        _tell_late(folder)


def renew(
    *,
    folder: Annotated[Path, DIR] = DEFAULT,
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="How long sites count then; else as long as each did before.")
    ] = None,
    everybody: Annotated[
        bool,
        typer.Option("--all", help="Every site and the coordinator, whatever is left; a second CA issues from now on."),
    ] = False,
) -> None:
    """Renew whoever has less than a third of the time left; to be run each week, by hand or by a timer."""
    from mailboat import authority as bench
    from mailboat import renewing

    _opened, names = renewing.renew(bench.open_authority(folder), days=days, now=bench.unix_now(), everybody=everybody)
    if not names:
        console.say("nobody's time is near its end")
        return
    console.say(f"renewed: {', '.join(names)}")
    if "coordinator" in names:
        _tell_coordinator(folder)
    if "broker" in names:
        _tell_broker(folder)
    if set(names) - {"coordinator", "broker"}:
        tell_hand_over(folder)
        _tell_late(folder)


def _roll_over(opened: Authority, *, finish: bool, now: int) -> None:
    from mailboat import renewing

    folder = opened.folder
    copied = f"{folder}/broker/ca.crt and crl.pem to the broker's folder, then: {SIGHUP}"
    if finish:
        renewing.finish_ca(opened, now=now)
        console.say("the CA before and its key are gone")
        console.say(f"copy {folder}/coordinator-kit/ca.crt into the coordinator's kit")
        tell_hand_over(folder)
        console.say(f"copy {copied}")
        return
    renewing.begin_ca(opened, now=now)
    for line in (
        "there is a second CA now; each step only when the one before it is done:",
        f"1. copy {copied}",
        f"   copy {folder}/coordinator-kit/ca.crt into the coordinator's kit",
        "2. mailboat provision renew --all, and copy what it says; then wait until `mailboat status` at the",
        "   coordinator names no site any more that has not taken its renewal",
        "3. mailboat provision rotate broker, and copy what it says",
        "4. mailboat provision rotate ca --finish, and copy what it says",
    ):
        console.say(line)


def _tell_coordinator(folder: Path) -> None:
    console.say(
        f"copy {folder}/coordinator-kit/tls.crt and ca.crt into the coordinator's kit, unless it uses this very"
    )
    console.say("folder; they count from its next connection on")


def _tell_broker(folder: Path) -> None:
    console.say(f"copy {folder}/broker/server.crt to the broker's folder, then: {SIGHUP}")


def _tell_late(folder: Path) -> None:
    console.say(f"for a site whose certificate has ended, send it {folder}/grants/NAME.grant: `mailboat site accept`")
