"""`mailboat demo`: a whole federation on this machine, in minutes."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console, foreground
from mailboat.demo import defaults

if TYPE_CHECKING:
    from rich.console import Console

    from mailboat.demo.live import Lines, Picture
    from mailboat.demo.plan import Plan
    from mailboat.demo.report import Result

ENDED_BY_SIGTERM = 143


class Mode(StrEnum):
    """When a version is made."""

    SYNC = "sync"
    FEDBUFF = "fedbuff"
    FEDASYNC = "fedasync"


class Staleness(StrEnum):
    """How a late update is weighted."""

    CONSTANT = "constant"
    HINGE = "hinge"
    POLYNOMIAL = "polynomial"


class Codec(StrEnum):
    """How numbers travel."""

    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    TERNARY = "ternary"
    TOPK2X4 = "topk2x4"
    TOPK2 = "topk2"


class Adapter(StrEnum):
    """What is trained in the blocks."""

    NONE = "none"
    LORA = "lora"
    FFA_LORA = "ffa-lora"
    FEDEX_LORA = "fedex-lora"


class Task(StrEnum):
    """What is learnt."""

    NER = "ner"
    CLASSIFICATION = "classification"
    MULTILABEL = "multilabel"


WorkdirOption = Annotated[
    Path | None, typer.Option(help="New folder for everything the run writes; default: ./demo-run-DATE-TIME.")
]
SitesOption = Annotated[int, typer.Option(min=1, max=32, help="Hospitals, each a process of its own.")]
AbsentOption = Annotated[int, typer.Option(min=0, help="So many of them are never started.")]
VersionsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Versions to publish. Default: as many as give each site {defaults.ROUNDS} local trainings: "
        f"{defaults.ROUNDS} in sync, where a version merges all sites; more in fedbuff, where it merges half of "
        "them, and in fedasync, where each update makes a version.",
    ),
]
ModeOption = Annotated[Mode, typer.Option(help="When a version is made.")]
StalenessOption = Annotated[Staleness, typer.Option(help="How a late update is weighted.")]
BrokerOption = Annotated[
    str, typer.Option(help="auto, mosquitto, amqtt, or mqtt://host:port of one that runs already.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Base model: a folder, or an id on the Hugging Face hub; default: the shipped one."),
]
LayersOption = Annotated[
    str,
    typer.Option(help="Which blocks are trained: 6 or top:6, a share such as 0.375, a list such as 10,11,15, all."),
]
AdapterOption = Annotated[
    Adapter,
    typer.Option(
        help=f"Train adapters of rank {defaults.ADAPTER_RANK} in the blocks of --layers, and not the blocks themselves."
    ),
]
CodecOption = Annotated[
    Codec, typer.Option(help="How numbers travel; where a state bears it no more, versions travel as steps.")
]
TaskOption = Annotated[
    Task,
    typer.Option(
        help="What is learnt: problems, treatments and tests in notes (ner), the primary diagnosis of a stay "
        "(classification), or all its codes (multilabel)."
    ),
]
AlphaOption = Annotated[
    float, typer.Option(help="How alike the sites' label mixes are: 0.1 very different, 100 nearly the same.")
]
NotesOption = Annotated[int, typer.Option(min=2, help="Training notes of each site.")]
LrOption = Annotated[
    float | None,
    typer.Option(
        min=1e-7,
        help=f"The sites' peak learning rate; default: {defaults.LR} for the shipped model, "
        f"{defaults.ADAPTER_LR} for adapters in it, {defaults.OTHER_MODEL_LR} for other models.",
    ),
]
FlakyOption = Annotated[
    bool, typer.Option("--flaky", help="Cut every site's link again and again, and kill one site in mid-work.")
]
BaselinesOption = Annotated[
    bool, typer.Option(help="Also train each site alone, and all notes in one place, to compare with.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Notes, head, batches and faults follow from it.")]
DeadlineOption = Annotated[
    float, typer.Option(min=1, help="Give up after so many seconds, and say who was waited for.")
]
JsonFileOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON too.")]


def demo(  # noqa: PLR0913 - one argument an option
    *,
    workdir: WorkdirOption = None,
    sites: SitesOption = defaults.SITES,
    absent: AbsentOption = 0,
    versions: VersionsOption = None,
    mode: ModeOption = Mode.SYNC,
    staleness: StalenessOption = Staleness.POLYNOMIAL,
    broker: BrokerOption = "auto",
    model: ModelOption = None,
    layers: LayersOption = defaults.LAYERS,
    adapter: AdapterOption = Adapter.NONE,
    codec: CodecOption = Codec.BF16,
    task: TaskOption = Task.NER,
    alpha: AlphaOption = defaults.ALPHA,
    notes: NotesOption = defaults.NOTES,
    lr: LrOption = None,
    flaky: FlakyOption = False,
    baselines: BaselinesOption = True,
    seed: SeedOption = defaults.SEED,
    deadline: DeadlineOption = defaults.RUN_DEADLINE_S,
    json_file: JsonFileOption = None,
) -> None:
    """Fine-tune one model in four hospitals on this machine: real broker, real processes, synthetic notes.

    Ends with status 0 only when every step ended well, with a table, a picture of the curves and the model.
    """
    out = console.result()
    folder = workdir or Path(time.strftime("demo-run-%Y%m%d-%H%M%S"))
    out.print(f"mailboat demo in {folder}: {sites - absent} of {sites} sites, {mode}, task {task}", markup=False)
    from mailboat.demo.plan import DemoOptions, make_plan

    _check_json(json_file)
    plan = make_plan(
        DemoOptions(
            workdir=folder,
            sites=sites,
            absent=absent,
            versions=versions,
            mode=mode.value,
            staleness=staleness.value,
            broker=broker,
            model=model,
            task=task.value,
            layers=layers,
            adapter=adapter.value,
            codec=codec.value,
            alpha=alpha,
            notes=notes,
            lr=lr,
            flaky=flaky,
            seed=seed,
            baselines=baselines,
            deadline_s=deadline,
        )
    )
    result = _run(plan, out)
    _tell(result, plan, out)
    if json_file is not None:
        _write_json(result, json_file)


def _check_json(path: Path | None) -> None:
    """Better now than when all is done."""
    from shared.errors import ConfigError

    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}", hint="make it, or name another")


def _run(plan: Plan, out: Console) -> Result:
    from mailboat.demo.run import run_demo
    from mailboat.files import making
    from shared import logs

    found: list[Result] = []

    async def job() -> None:
        with _view(plan, out) as view:
            found.append(await run_demo(plan, view))

    with making(plan.layout.logs):
        plan.layout.logs.mkdir(parents=True)
    with plan.layout.log("demo").open("w", encoding="utf-8") as log:
        logs.configure(stream=log)
        foreground.run(job())
    if not found:
        raise typer.Exit(ENDED_BY_SIGTERM)
    return found[0]


def _view(plan: Plan, out: Console) -> Lines | Picture:
    from mailboat.demo.live import Lines, Picture

    return Picture(out, plan.federation.federation.versions) if out.is_terminal else Lines(out)


def _tell(result: Result, plan: Plan, out: Console) -> None:
    from mailboat.demo.report import comparison_table, verdict, version_table, wire_table

    for table in (version_table(result), comparison_table(result), wire_table(result)):
        out.print(table)
    for line in verdict(result):
        out.print(line)
    layout = plan.layout
    out.print(f"{result.wall_s:.0f} s in all, {result.federated_s:.0f} s of them federated training", markup=False)
    out.print(f"curves  {layout.plot}\nmodel   {layout.export}\nlogs    {layout.logs}", markup=False)
    out.print(f"journal mailboat audit tail --config {layout.coordinator}", markup=False)


def _write_json(result: Result, path: Path) -> None:
    from mailboat.demo.report import to_json
    from mailboat.files import making

    with making(path.parent):
        path.write_text(json.dumps(to_json(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
