"""The command line: which commands there are. What they do stands in `mailboat/commands`, one file a group.

Those files import the parts that they drive when a command is called, so that `mailboat --help` waits for none of them.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mailboat import console
from mailboat.commands import (
    audit,
    broker,
    coordinator,
    data,
    doctor,
    enroll,
    experiment,
    export,
    init,
    predict,
    privacy,
    provision,
    quarantine,
    rotate,
    site,
    status,
)

_WHAT = """Fine-tune one language model in several hospitals, over an ordinary MQTT broker.

The notes never leave a hospital; what travels is the change of the trained layers.
"""
_START = "First steps: `mailboat demo` shows everything on one machine; `mailboat init DIR` begins a federation."

_ORDER = [
    "demo",
    "init",
    "provision",
    "data",
    "broker",
    "coordinator",
    "site",
    "privacy",
    "status",
    "audit",
    "quarantine",
    "export",
    "evaluate",
    "predict",
    "experiment",
    "doctor",
]


class _Commands(TyperGroup):
    """The commands in the order in which a newcomer meets them."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=_ORDER.index)


_STYLE: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,  # plain help: half the start-up time, and it can be piped
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["--help", "-h"]},
}

app = typer.Typer(name="mailboat", cls=_Commands, help=_WHAT, epilog=_START, no_args_is_help=True, **_STYLE)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mailboat {version('mailboat')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune one language model in several hospitals, over an ordinary MQTT broker."""


@app.command(
    "demo",
    short_help="Show everything on this machine, in minutes.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def demo(ctx: typer.Context) -> None:
    """Hand over to the demonstration: its options show default values that take long to import."""
    from mailboat.commands.demo import demo as run_demo

    inner = typer.Typer(**_STYLE)
    inner.command()(run_demo)
    inner(ctx.args, prog_name=ctx.command_path)


app.command("init", short_help="Write the configuration files of a federation.")(init.init)
app.add_typer(provision.app, name="provision", short_help="Say who takes part: keys and certificates.")
provision.app.command("rotate")(rotate.rotate)
provision.app.command("renew")(rotate.renew)
app.add_typer(data.app, name="data", short_help="Write synthetic notes to try things with.")
app.add_typer(broker.app, name="broker", short_help="Run a broker on this machine; write access rules.")
app.add_typer(coordinator.app, name="coordinator", short_help="Run the side that merges.")
app.add_typer(site.app, name="site", short_help="Run one hospital's part.")
site.app.command("enroll")(enroll.enroll)
site.app.command("accept")(enroll.accept)
app.add_typer(privacy.app, name="privacy", short_help="Say what differential privacy costs, or has cost.")
app.command("status", short_help="Say where the run stands.")(status.status)
app.add_typer(audit.app, name="audit", short_help="Tell what happened, line by line.")
app.add_typer(quarantine.app, name="quarantine", short_help="Decide about updates that are out of line.")
app.command("export", short_help="Write a version as a Hugging Face model.")(export.export)
app.command("evaluate", short_help="Measure a model on annotated notes.")(export.evaluate)
app.add_typer(experiment.app, name="experiment", short_help="Compare methods on synthetic notes, reproducibly.")
app.command("predict", short_help="Write what a model finds in notes.")(predict.predict)
app.command("doctor", short_help="Check this machine, and say what to do.")(doctor.doctor)


def main() -> None:
    """Run the command line and end the process with the status that `mailboat.console` lists."""
    sys.exit(console.run(lambda: app(prog_name="mailboat")))
