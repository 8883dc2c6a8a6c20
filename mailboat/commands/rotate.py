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
            help="A site, coordinator or broker: its certificate; federation-key: the key of states; ca: the TLS CA; "
            "authority: its own signing key."
        ),
    ],
    *,
    folder: Annotated[Path, DIR] = DEFAULT,
    days: DaysOption = SITE_DAYS,
    finish: Annotated[
        bool, typer.Option("--finish", help="With `ca` or `authority`: drop the one before, and its key.")
    ] = False,
) -> None:
    """Renew one certificate now, for the keys that are there; have the federation key drawn anew; change CA or key."""
    from mailboat import authority as bench
    from mailboat import renewing

    if finish and name not in {"ca", "authority"}:
        raise ConfigError(f"--finish has no meaning for {name}", hint="it ends `rotate ca` and `rotate authority`")
    opened, now = bench.open_authority(folder), bench.unix_now()
    if name == "ca":
        _another_ca(opened, finish=finish, now=now)
    elif name == "authority":
        _another_key(opened, finish=finish, now=now)
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
        typer.Option(
            "--all", help="Every site and the coordinator, whatever is left; a second CA or key takes over from now on."
        ),
    ] = False,
) -> None:
    """Renew whoever has less than a third of the time left; to be run each week, by hand or by a timer."""
    from mailboat import authority as bench
    from mailboat import renewing

    before = bench.open_authority(folder)
    opened, names = renewing.renew(before, days=days, now=bench.unix_now(), everybody=everybody)
    if opened.public != before.public:
        _tell_key(opened)
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


def _another_ca(opened: Authority, *, finish: bool, now: int) -> None:
    from mailboat import rolling

    folder = opened.folder
    copied = f"{folder}/broker/ca.crt and crl.pem to the broker's folder, then: {SIGHUP}"
    if finish:
        rolling.finish_ca(opened, now=now)
        console.say("the CA before and its key are gone")
        console.say(f"copy {folder}/coordinator-kit/ca.crt into the coordinator's kit")
        tell_hand_over(folder)
        console.say(f"copy {copied}")
        return
    rolling.begin_ca(opened, now=now)
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


def _another_key(opened: Authority, *, finish: bool, now: int) -> None:
    from mailboat import rolling

    kit = opened.folder / "coordinator-kit"
    if finish:
        rolling.finish_key(opened, now=now)
        console.say("the key before is gone; what it has signed counts no more, but for the past")
        console.say(f"copy {kit}/authority.pub and endorsements into the coordinator's kit, unless it uses this very")
        console.say("folder; give both to whoever verifies runs")
        return
    rolling.begin_key(opened, now=now)
    for line in (
        "there is a second key now, which signs nothing yet; each step only when the one before it is done:",
        f"1. copy {kit}/authority.pub into the coordinator's kit, unless it uses this very folder",
        "2. mailboat provision renew --all, and copy what it says",
        "3. mailboat provision rotate authority --finish, and copy what it says",
        "a site believes the key before until it has taken its renewal: `mailboat status` at the coordinator names",
        "those that have not",
    ):
        console.say(line)


def _tell_key(opened: Authority) -> None:
    from shared.trust.signing import authority_fingerprint

    console.say(f"from now on the authority's fingerprint is: {authority_fingerprint(opened.public)}")
    console.say(
        f"copy {opened.folder}/coordinator-kit/member and revocations into the coordinator's kit, unless it uses"
    )
    console.say("this very folder")


def _tell_coordinator(folder: Path) -> None:
    console.say(
        f"copy {folder}/coordinator-kit/tls.crt and ca.crt into the coordinator's kit, unless it uses this very"
    )
    console.say("folder; they count from its next connection on")


def _tell_broker(folder: Path) -> None:
    console.say(f"copy {folder}/broker/server.crt to the broker's folder, then: {SIGHUP}")


def _tell_late(folder: Path) -> None:
    console.say(f"for a site whose certificate has ended, send it {folder}/grants/NAME.grant: `mailboat site accept`")
