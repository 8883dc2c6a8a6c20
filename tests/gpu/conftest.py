"""What has to be seen on a GPU: `make test-gpu`, or `python -m pytest tests/gpu` where no more than `[edge]` is.

The device under test is a fixture. With `--device cpu` the processor stands in its place, which shows that each test
runs, and nothing of GPUs; what would then say nothing at all is left out. What was measured is told at the end.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from edge_client.device import Device, find_device
from edge_client.tasks.registry import known_tasks
from shared.config import ComputeSection
from shared.errors import ConfigError
from tests.gpu.seen import TOLD, Seen
from tests.gpu.ways import without_dropout
from tests.unit.edge_client import tiny

# As make sets them: nothing is fetched, and tokenizers start no threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice of the device."""
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in the GPU's place, as a trial")


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU nothing is run, and nothing passes; nor without the tasks, which are found as installed."""
    config.stash[TOLD] = []
    torch.set_num_threads(1)
    try:
        found(config)
    except ConfigError as error:
        raise pytest.UsageError(f"these tests need a GPU, or --device cpu as a trial: {error.message}") from None
    if not known_tasks():
        raise pytest.UsageError("these tests need Mailboat installed for this Python: pip install --no-deps -e .")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what says something of a GPU alone where there is none."""
    if config.getoption("--device") == "cpu":
        alone = [item for item in items if item.get_closest_marker("gpu_alone")]
        config.hook.pytest_deselected(items=alone)
        items[:] = [item for item in items if item not in alone]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None]:
    """Fail a test of what it measured when it has measured all."""
    yield
    seen = item.funcargs.get("seen")
    assert not (isinstance(seen, Seen) and seen.beyond), "; ".join(seen.beyond)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tell what was measured, and where; not to those who want quiet."""
    if config.get_verbosity() < 0:
        return
    terminalreporter.section(f"seen on {found(config).title}, torch {torch.__version__}")
    for line in config.stash[TOLD]:
        terminalreporter.line(line)


def found(config: pytest.Config) -> Device:
    """The device under test."""
    return find_device(ComputeSection(device=config.getoption("--device")))


@pytest.fixture(scope="session")
def f32(pytestconfig: pytest.Config) -> Device:
    """The device under test, in float32."""
    return found(pytestconfig)


@pytest.fixture(scope="session")
def bf16(pytestconfig: pytest.Config) -> Device:
    """The device under test, in bfloat16."""
    return find_device(ComputeSection(device=pytestconfig.getoption("--device"), precision="bf16"))


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """Where a test tells what it measured."""
    node: pytest.Item = request.node
    return Seen(node.name, request.config.stash[TOLD])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type, without dropout: no two devices draw alike."""
    root = tmp_path_factory.mktemp("models")
    return {name: without_dropout(tiny.save_model(root / name, name)) for name in tiny.MODEL_TYPES}
