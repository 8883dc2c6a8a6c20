"""`mailboat privacy`: what record-level differential privacy costs, before a run and during it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console

if TYPE_CHECKING:
    from mailboat.spending import Report, Scheme

app = typer.Typer(
    help="Record-level differential privacy: plan its noise, report what was spent.", no_args_is_help=True
)

_JSON = typer.Option("--json", help="Print JSON.")


@app.command()
def report(
    *,
    config: Annotated[Path, typer.Option("--config", "-c", help="The site's configuration file.")] = Path("site.toml"),
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say what this site's trainings have cost each patient so far, and what is left.

    Reads the ledger in the site's storage folder, whether or not the site runs, and adds it up anew.
    """
    from mailboat.spending import read_report
    from shared.config import FederationConfig, SiteConfig
    from shared.configfile import load_config

    site = load_config(config, SiteConfig)
    found = read_report(site, load_config(site.federation, FederationConfig))
    if as_json:
        console.print_json(found.plain())
        return
    for label, text in _told(found):
        console.result().print(f"{label:<11s} {text}", markup=False)


@app.command()
def plan(  # noqa: PLR0913 - an argument for each option
    *,
    records: Annotated[int, typer.Option(min=1, help="Patients (or notes, where nobody says whose) of a site.")],
    epsilon: Annotated[
        float | None, typer.Option(min=0, help="What the run may cost; the noise for it is printed.")
    ] = None,
    noise: Annotated[float | None, typer.Option(min=0, help="Noise multiplier; what it costs is printed.")] = None,
    federation: Annotated[
        Path | None,
        typer.Option("--federation", "-f", help="federation.toml: what is not given here is taken from it."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Records in a step, on average.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of an update.")] = None,
    versions: Annotated[int | None, typer.Option(min=1, help="Versions that the site trains.")] = None,
    delta: Annotated[float | None, typer.Option(min=0, max=0.01, help="Well below 1 / records.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say which noise a wanted epsilon takes, or which epsilon a noise gives, before a run begins.

    Neither given, federation.toml decides.
    """
    from mailboat.spending import Question, make_scheme
    from shared.config import FederationConfig
    from shared.configfile import load_config

    asked = Question(batch=batch, epochs=epochs, versions=versions, delta=delta, epsilon=epsilon, noise=noise)
    if federation is not None:
        asked = asked.completed(load_config(federation, FederationConfig))
    scheme = make_scheme(asked, records)
    if as_json:
        console.print_json(scheme.plain())
        return
    for label, text in _planned(scheme):
        console.result().print(f"{label:<11s} {text}", markup=False)


def _told(found: Report) -> Iterator[tuple[str, str]]:
    yield "site", found.site
    yield "trainings", f"{len(found.rows)}, of {found.steps} steps in all"
    if found.rows:
        yield "spent", f"epsilon {found.epsilon:.4g} at delta {found.delta:g}"
    else:
        yield "spent", "nothing: no training was private here"
    for limit in found.limits:
        enough = "" if limit.trainings is None else f", enough for {limit.trainings} more like the last"
        yield "left", f"{limit.left:.4g} of {limit.epsilon:g}, {limit.name}{enough}"
    if not found.limits:
        yield "left", "no bound: neither privacy.budget_epsilon nor privacy.target_epsilon is set"
    for number, row in enumerate(found.rows, start=1):
        charge, at = row.spent.charge, time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(row.at))
        how = f"{charge.steps} steps, rate {charge.sample_rate:.4g}, noise {charge.noise_multiplier:.4g}"
        by_then = f"epsilon {row.spent.epsilon:.4g} at delta {row.spent.delta:g} by then"
        yield str(number), f"{at}  {row.federation} from version {row.base_version}: {how}; {by_then}"


def _planned(scheme: Scheme) -> Iterator[tuple[str, str]]:
    charge = scheme.charge
    yield "records", f"{scheme.records}, each in a step with probability {charge.sample_rate:.4g}"
    yield "steps", f"{charge.steps} in an update, {charge.steps * scheme.versions} in {scheme.versions} versions"
    yield "noise", f"multiplier {charge.noise_multiplier:.4g}"
    for version, epsilon in scheme.epsilons.items():
        yield f"version {version}", f"epsilon {epsilon:.4g} at delta {scheme.delta:g}"
    if scheme.delta * scheme.records >= 1:
        yield "warning", "delta is not below 1 / records: giving one record away whole would count as private"
