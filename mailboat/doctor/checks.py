"""Which checks a machine gets: by the configuration files that it has."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.views import JOURNAL, load_run
from mailboat.doctor.finding import Finding, fail, ok, warn
from mailboat.doctor.machine import check_device, check_disk, check_versions
from mailboat.doctor.network import Party, ask_clock, check_broker, read_announcement
from mailboat.doctor.trust import check_trust
from mailboat.sealing import PLAN, resolve
from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import ConfigError, MailboatError, RefusedError
from shared.messages import Announce, Refused, Welcome
from shared.plan import SealedPlan, load_plan

NAMES = ("coordinator.toml", "site.toml")
SKEW_S = 60.0
"""Clocks are for people here, never for decisions; but an audit trail should tell one time."""


def examine(given: Sequence[Path] | None) -> Iterator[Finding]:
    """Yield the findings for the given configuration files, by default those in the current folder."""
    paths = list(given or (Path(name) for name in NAMES if Path(name).exists()))
    sites = [path for path in paths if _is_site(path)]
    yield from check_versions(trains=bool(sites))
    if not paths:
        hint = "`mailboat init DIR` writes them; run the doctor in that folder, or name them with --config"
        yield warn("config", f"no {' or '.join(NAMES)} in this folder: only the machine was looked at", hint)
    for path in paths:
        yield from _examine_site(path) if path in sites else _examine_coordinator(path)


def _is_site(path: Path) -> bool:
    try:
        return "data" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return "site" in path.name  # loading it tells what is wrong


def _examine_coordinator(path: Path) -> Iterator[Finding]:
    try:
        config = load_config(path, CoordinatorConfig)
        federation = load_config(config.federation, FederationConfig)
    except MailboatError as error:
        yield fail("config", error)
        return
    yield ok("config", f"{path}: coordinator of federation {federation.federation.name}")
    yield from check_disk(config.storage)
    yield from check_trust(federation, config.trust, config.broker, None)
    findings, _ = asyncio.run(check_broker(Party(federation.federation.name, None, config.broker)))
    yield from findings
    yield ok("clock", f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())}; `mailboat doctor` at a site compares")
    yield from _journal(config.storage)
    yield from _coordinator_plan(config, federation)
    yield from _validation(config, federation)


def _validation(config: CoordinatorConfig, federation: FederationConfig) -> Iterator[Finding]:
    """The notes on which losses are measured, where updates are weighed by them."""
    section, quality = config.validation, federation.aggregation.quality
    if quality == "none":
        return
    if section.notes is None:
        hint = "name a folder of annotated notes in coordinator.toml: [validation] notes = ..."
        yield fail("notes", ConfigError(f'there are none, and quality = "{quality}" needs some', hint=hint))
        return
    try:
        yield _notes(section.notes, federation, skip_bad=section.skip_bad)
        yield check_device(section)
    except ModuleNotFoundError as error:
        yield fail("notes", ConfigError(f"{error.name} is not installed here", hint="pip install 'mailboat[edge]'"))


def _journal(storage: Path) -> Iterator[Finding]:
    if not (storage / JOURNAL).exists():
        yield ok("journal", "no run has begun")
        return
    try:
        run = load_run(storage)
    except MailboatError as error:
        yield fail("journal", error)
        return
    yield ok("journal", f"version {run.current.version}, {len(run.updates)} updates, hash chain sound")


def _coordinator_plan(config: CoordinatorConfig, federation: FederationConfig) -> Iterator[Finding]:
    path = config.storage / PLAN
    agreed: SealedPlan | None = None
    if path.exists():
        try:
            agreed = load_plan(path, federation)
        except MailboatError as error:
            yield fail("plan", error)
            return
        yield ok("plan", f"{path} fits federation.toml: fingerprint {agreed.fingerprint[:12]}")
    else:
        yield warn("plan", "not sealed yet", "`mailboat coordinator run` does it, or: mailboat coordinator seal")
    try:
        found = resolve(federation, federation.model.base)
    except ModuleNotFoundError as error:
        yield warn("model", f"not looked at: {error.name} is not installed here", "fine with a plan sealed elsewhere")
    except MailboatError as error:
        yield fail("model", error)
    else:
        yield _compare(found, agreed.frozen_sha256 if agreed else None, "plan.json")


def _compare(found: SealedPlan, agreed: str | None, where: str) -> Finding:
    text = f"{found.architecture}, {found.depth} blocks, frozen weights {found.frozen_sha256[:12]}"
    if agreed is None:
        return ok("model", text)
    if found.frozen_sha256 == agreed:
        return ok("model", f"{text}, the same as in {where}")
    return fail(
        "model",
        RefusedError(
            f"{text}, but {agreed[:12]} in {where}",
            rule="frozen-weights",
            hint="copy the base model again, from where the coordinator has it; check model.revision",
        ),
    )


def _examine_site(path: Path) -> Iterator[Finding]:
    try:
        config = load_config(path, SiteConfig)
        federation = load_config(config.federation, FederationConfig)
    except MailboatError as error:
        yield fail("config", error)
        return
    yield ok("config", f"{path}: site {config.name} of federation {federation.federation.name}")
    yield from check_disk(config.storage)
    yield _notes(config.data.notes, federation, skip_bad=config.data.skip_bad)
    yield from check_trust(federation, config.trust, config.broker, config.name)
    party = Party(federation.federation.name, config.name, config.broker)
    findings, protocol = asyncio.run(check_broker(party))
    yield from findings
    announced: Announce | None = None
    if federation.trust.mode == "sealed":
        yield ok("coordinator", "not asked: what it says is encrypted; `mailboat status` there tells who is connected")
    elif protocol is not None:
        try:
            announced = asyncio.run(read_announcement(party, protocol))
        except MailboatError as error:
            yield fail("coordinator", error)
        else:
            yield _announcement(announced, federation)
    try:
        yield check_device(config.training)
        found = resolve(federation, config.model_dir or federation.model.base)
    except ModuleNotFoundError as error:
        yield fail("model", ConfigError(f"{error.name} is not installed here", hint="pip install 'mailboat[edge]'"))
        return
    except MailboatError as error:
        yield fail("model", error)
        return
    yield _compare(found, announced.frozen_sha256 if announced else None, "the coordinator's announcement")
    if protocol is not None and announced is not None and announced.fingerprint == found.fingerprint:
        yield _clock(party, protocol, found)


def _notes(folder: Path, federation: FederationConfig, *, skip_bad: bool) -> Finding:
    from edge_client.data.load import load_notes

    try:
        from edge_client.tasks.registry import load_task

        found = load_notes(folder, load_task(federation.task), skip_bad=skip_bad)
    except MailboatError as error:
        return fail("notes", error)
    skipped = f", {found.skipped} left out as unreadable" if found.skipped else ""
    return ok("notes", f"{len(found.notes)} notes in {folder}{skipped}")


def _announcement(announced: Announce | None, federation: FederationConfig) -> Finding:
    if announced is None:
        return warn("coordinator", "has announced nothing yet", "start it, or ask whoever runs it")
    if announced.config_sha256 != federation.config_sha256:
        return fail(
            "coordinator",
            RefusedError(
                "announces a run that was made from another federation.toml than the one here",
                rule="other-config",
                hint="copy the coordinator's federation.toml here",
            ),
        )
    last = ", the last" if announced.final else ""
    return ok("coordinator", f"announces version {announced.version} of {announced.target}{last}")


def _clock(party: Party, protocol: str, plan: SealedPlan) -> Finding:
    try:
        answer = asyncio.run(ask_clock(party, protocol, plan))
    except MailboatError as error:
        return fail("clock", error)
    match answer:
        case Welcome(clock=theirs):
            skew = time.time() - theirs
            text = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
            return (
                ok("clock", text) if abs(skew) < SKEW_S else warn("clock", text, "let both machines keep time by NTP")
            )
        case Refused(rule="duplicate-site"):
            return ok("clock", "not compared: the site itself is running")
        case Refused(rule=rule, detail=detail):
            return fail("clock", RefusedError(f"the coordinator refuses this site: {detail}", rule=rule))
    return warn(
        "clock",
        "not compared: the coordinator does not answer",
        "is it running? its announcement is kept by the broker",
    )
