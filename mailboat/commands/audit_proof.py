"""`mailboat audit verify`, `replay` and `export`: what can be proven of a run, to oneself and to others."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mailboat import console
from shared.errors import ConfigError, CorruptError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.replay import Recomputed
    from shared.config import FederationConfig
    from shared.plan import SealedPlan
    from shared.trust.membership import Believed

    Told = Callable[[str, float], None]

_CONFIG = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")]
_STORAGE = Annotated[
    Path | None,
    typer.Option(
        help="Instead of --config: a coordinator's storage folder or a copy, federation.toml in or beside it."
    ),
]
_AUTHORITY = Annotated[
    Path | None,
    typer.Option(
        help="The authority's public keys (authority.pub, endorsements beside it); by default the coordinator's kit's."
    ),
]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_DEFAULT = Path("coordinator.toml")


def register(app: typer.Typer) -> None:
    """Add the three commands to the group `audit`."""
    app.command()(verify)
    app.command()(replay)
    app.command()(export)


def verify(
    *,
    receipts: Annotated[
        list[Path] | None, typer.Option(help="A copy of a site's receipts folder; may be given several times.")
    ] = None,
    authority: _AUTHORITY = None,
    config: _CONFIG = _DEFAULT,
    storage: _STORAGE = None,
    as_json: _JSON = False,
) -> None:
    """Check the journal's hash chain, the audit trail and every kept file against each other; name all that is wrong.

    In a sealed federation also the signatures of coordinator and sites, and the history that they speak of.

    Works beside a running coordinator, and writes nothing.
    """
    from coordinator.proof import prove

    folder, federation, plan = _load(config, storage)
    believed = _believed(_authority(config, storage, authority), federation.federation.name)
    with _progress() as told:
        proof = prove(
            folder,
            federation,
            plan,
            receipts=receipts or (),
            believed=believed,
            progress=lambda share: told("checking files", share),
        )
    if as_json:
        console.print_json(dataclasses.asdict(proof))
    else:
        out = console.result()
        out.print(f"journal   {proof.rows} rows, the last one has hash {proof.head}", markup=False)
        out.print(f"run       version {proof.version}, {proof.updates} updates accepted", markup=False)
        if receipts:
            out.print(f"receipts  {proof.receipts} held by sites", markup=False)
        if federation.trust.mode == "sealed":
            whose = "" if believed else "; whose keys they are was not checked, --authority was not given"
            out.print(f"signed    {proof.signatures} signatures fit{whose}", markup=False)
        for missed in proof.pruned:
            out.print(f"pruned    {missed}", markup=False)
        for finding in proof.findings:
            out.print(f"wrong     {finding}", markup=False, style="bold red")
        if not proof.findings:
            out.print("nothing is wrong", markup=False, style="bold green")
    if proof.findings:
        raise CorruptError(
            f"{folder}: {_counted(len(proof.findings), 'thing is', 'things are')} wrong, first {proof.findings[0]}",
            hint="keep a copy of the folder as it is, then look into each finding",
        )


def replay(
    *,
    version: Annotated[int | None, typer.Option(min=0, help="Stop at this version.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All versions; what happens without --version.")] = False,
    config: _CONFIG = _DEFAULT,
    storage: _STORAGE = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for temporary files (two versions' worth) instead of the system's.")
    ] = None,
    as_json: _JSON = False,
) -> None:
    """Compute the versions again from version 0 and the kept updates, and compare them bit for bit with the journal.

    The run's own files are only read. Ends at the first version that differs, and says where.
    """
    from coordinator.replay import replay as replay_versions

    if every and version is not None:
        raise ConfigError("--all and --version were both given", hint="give one of them")
    if scratch is not None and not scratch.is_dir():
        raise ConfigError(f"{scratch} is not a folder", hint="name one with room for two versions")
    folder, federation, plan = _load(config, storage)
    made: list[Recomputed] = []
    with tempfile.TemporaryDirectory(prefix="mailboat-replay-", dir=scratch) as work, _progress() as told:
        for each in replay_versions(
            folder,
            federation,
            plan,
            Path(work),
            upto=version,
            progress=lambda number, share: told(f"version {number}", share),
        ):
            made.append(each)
            if not as_json:
                _tell_version(each)
    if as_json:
        console.print_json({"versions": [_plain(each) for each in made], "same": not made[-1].differences})
    if made[-1].differences:
        raise CorruptError(
            f"version {made[-1].version} differs: {made[-1].differences[0]}",
            hint="`mailboat audit verify` lists what else is wrong",
        )


def export(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The tar file to write; must be new.")],
    version: Annotated[int | None, typer.Option(min=0, help="Only what led to this version.")] = None,
    authority: _AUTHORITY = None,
    config: _CONFIG = _DEFAULT,
    storage: _STORAGE = None,
) -> None:
    """Write the evidence of a run to one file that others check without Mailboat: unpack it and run verify.py.

    It holds the journal, the kept updates, version 0, the plan and the agreed settings; no notes and no paths.
    """
    from coordinator.bundle import export_bundle

    folder, federation, plan = _load(config, storage)
    files = _authority_files(_authority(config, storage, authority))
    bundle = export_bundle(folder, federation, plan, out, upto=version, authority=files)
    console.say(f"{out}: version {bundle.version}, {bundle.rows} rows, {bundle.updates} updates")
    console.result().print(f"sha256    {bundle.sha256}", markup=False)
    console.result().print(f"last row  {bundle.head}", markup=False)


def _load(config: Path, storage: Path | None) -> tuple[Path, FederationConfig, SealedPlan]:
    from mailboat.sealing import PLAN
    from shared.config import CoordinatorConfig, FederationConfig
    from shared.configfile import load_config
    from shared.plan import load_plan

    if storage is None:
        coordinator = load_config(config, CoordinatorConfig)
        folder, path = coordinator.storage, coordinator.federation
    else:
        folder = storage
        inside = storage / "federation.toml"
        path = inside if inside.exists() else storage.resolve().parent / "federation.toml"
    federation = load_config(path, FederationConfig)
    return folder, federation, load_plan(folder / PLAN, federation)


def _authority(config: Path, storage: Path | None, named: Path | None) -> Path | None:
    """Where the authority's public keys lie: as named, else in the coordinator's kit; None for neither."""
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config
    from shared.trust.kit import AUTHORITY

    if named is not None or storage is not None:
        return named
    kit = load_config(config, CoordinatorConfig).trust.kit
    return None if kit is None else kit / AUTHORITY


def _authority_files(keys: Path | None) -> dict[str, bytes]:
    """The keys, and the endorsements beside them if there are any, by their names in a bundle."""
    from mailboat.files import reading
    from shared.trust.kit import AUTHORITY, ENDORSEMENTS
    from shared.trust.membership import MAX_DOCUMENT_BYTES

    if keys is None:
        return {}
    paths = {AUTHORITY: keys, ENDORSEMENTS: keys.with_name(ENDORSEMENTS)}
    return {
        name: reading(path, MAX_DOCUMENT_BYTES) for name, path in paths.items() if name == AUTHORITY or path.exists()
    }


def _believed(keys: Path | None, federation: str) -> Believed | None:
    """Whom these files tell to believe; ConfigError names the one that is not what it should be."""
    from shared.trust.kit import AUTHORITY, ENDORSEMENTS, parse_authorities
    from shared.trust.membership import Believed, verify_endorsements

    if keys is None:
        return None
    files = _authority_files(keys)
    authorities = parse_authorities(files[AUTHORITY], keys)
    if ENDORSEMENTS not in files:
        return Believed(authorities)
    try:
        endorsed = verify_endorsements(files[ENDORSEMENTS], authorities, federation=federation)
    except RefusedError as error:
        raise ConfigError(
            f"{keys.with_name(ENDORSEMENTS)}: {error.message}", hint="copy it from the authority, with authority.pub"
        ) from None
    return Believed(authorities, frozenset(endorsed.sha256))


def _tell_version(each: Recomputed) -> None:
    verdict = "differs" if each.differences else "the same, bit for bit"
    of = f"version {each.version} of {each.last}"
    text = f"{of}  {_counted(each.updates, 'update', 'updates')}  {each.seconds:.1f} s  {verdict}"
    console.result().print(text, markup=False, style="bold red" if each.differences else "")
    for difference in each.differences:
        console.result().print(f"  {difference}", markup=False)


def _plain(each: Recomputed) -> dict[str, Any]:
    return {**dataclasses.asdict(each), "same": not each.differences}


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


@contextlib.contextmanager
def _progress() -> Iterator[Told]:
    """Yield what shows a step and its share on a terminal, and nothing elsewhere."""
    from rich.progress import Progress

    with Progress(console=console.errors(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda step, share: bar.update(task, description=step, completed=share)
