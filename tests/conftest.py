"""For everybody: a free port, a real Mosquitto, and no hurry for generated examples."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from broker.launcher import RunningBroker, find_mosquitto, run_broker
from shared.link import link
from tests.helpers import any_free_port

# They need a GPU, and have a configuration of their own: `make test-gpu`.
collect_ignore = ["gpu"]

# How wide a terminal is, and whether there is one with colours, is said by the tests that are about it.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# A busy machine makes any example slow to run and to draw; what must not hang has the time-out of the whole test.
PATIENT = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# `make test` says the same of the same tree each time; `make explore` draws other examples, and more.
hypothesis.settings.register_profile("mailboat", PATIENT, derandomize=True)
hypothesis.settings.register_profile("explore", PATIENT, max_examples=1_000)
hypothesis.settings.load_profile(os.environ.get("MAILBOAT_EXAMPLES", "mailboat"))
if "MAILBOAT_EXAMPLES" not in os.environ:
    # Hypothesis draws constants, too, that stand in modules imported so far, which is a matter of the order of tests.
    providers._get_local_constants = Constants


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on."""
    return any_free_port()


@pytest.fixture
def patient_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is slow to answer is Mosquitto on a busy machine, and not one that speaks MQTT 3.1.1 alone.

    That one has no words for a refusal, or for a message that nobody hears.
    """
    monkeypatch.setattr(link, "FIRST_ANSWER_S", 20.0)


@pytest.fixture
def mosquitto(tmp_path: Path, patient_links: None) -> Iterator[RunningBroker]:
    """A real Mosquitto of this test's own, on a free port of the loopback address, gone afterwards."""
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")
    broker = run_broker("mosquitto", tmp_path / "mosquitto")
    with asyncio.Runner() as runner:
        running = runner.run(broker.__aenter__())
        try:
            yield running
        finally:
            runner.run(broker.__aexit__(None, None, None))


@pytest.fixture
def mosquitto_url(mosquitto: RunningBroker) -> str:
    """The URL of a real Mosquitto of this test's own, such as mqtt://127.0.0.1:40123."""
    return mosquitto.url
