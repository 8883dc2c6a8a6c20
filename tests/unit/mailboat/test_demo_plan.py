from __future__ import annotations

from pathlib import Path

import pytest

from mailboat.demo.defaults import ADAPTER_ALPHA, ADAPTER_LR, ADAPTER_RANK, ROUNDS
from mailboat.demo.plan import (
    SHIPPED_MODEL,
    DemoOptions,
    Plan,
    coordinator_config,
    make_plan,
    model_source,
    schedule,
    site_config,
    write_federation,
    write_processes,
)
from mailboat.demo.toml import to_toml
from shared.config import CoordinatorConfig, FederationConfig, Mode, SiteConfig
from shared.configfile import load_config
from shared.errors import ConfigError

BROKER = "mqtt://127.0.0.1:4711"


def plan_for(tmp_path: Path, **options: object) -> Plan:
    """A plan in a folder that does not exist yet."""
    return make_plan(DemoOptions(workdir=tmp_path / "run", **options), name="demo-test")  # type: ignore[arg-type]


def test_the_files_say_what_the_plan_says(tmp_path: Path) -> None:
    """Each written file loads as the very configuration it was written from."""
    plan = plan_for(
        tmp_path, mode="fedbuff", staleness="hinge", codec="int8", layers="10,11,15", model="org/some-model"
    )
    plan.layout.root.mkdir()
    write_federation(plan)
    write_processes(plan, BROKER, dict.fromkeys(plan.started, BROKER))
    assert load_config(plan.layout.federation, FederationConfig) == plan.federation
    assert load_config(plan.layout.coordinator, CoordinatorConfig) == coordinator_config(plan, BROKER)
    for name in plan.started:
        assert load_config(plan.layout.site(name), SiteConfig) == site_config(plan, name, BROKER)


def test_text_with_quotes_and_backslashes_survives_toml(tmp_path: Path) -> None:
    """A path may hold anything."""
    config = CoordinatorConfig(federation=Path('/a "b"\\c\x7f/é.toml'), storage=Path("/s"))
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.toml", CoordinatorConfig) == config


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("mode", ["sync", "fedbuff", "fedasync"])
def test_every_mode_does_about_the_same_work(tmp_path: Path, mode: Mode, sites: int) -> None:
    """The default number of versions gives each site the same number of local trainings, plus at most one."""
    plan = plan_for(tmp_path, mode=mode, sites=sites)
    assert plan.rounds in {ROUNDS, ROUNDS + 1}
    assert plan.schedule.buffer <= sites


@pytest.mark.parametrize(
    ("sites", "absent", "quorum", "buffer"), [(4, 0, 3, 2), (4, 1, 3, 2), (4, 2, 2, 2), (1, 0, 1, 1)]
)
def test_rounds_never_wait_for_more_sites_than_there_are(
    tmp_path: Path, sites: int, absent: int, quorum: int, buffer: int
) -> None:
    """Quorum and buffer can be filled by the sites that are started."""
    found = schedule(DemoOptions(workdir=tmp_path, sites=sites, absent=absent))
    assert (found.quorum, found.buffer) == (quorum, buffer)


def test_versions_that_were_asked_for_are_taken_literally(tmp_path: Path) -> None:
    """A number given is the number of versions, in every mode."""
    assert plan_for(tmp_path, mode="fedasync", versions=5).federation.federation.versions == 5


@pytest.mark.parametrize(("kind", "optimizer"), [("lora", "momentum"), ("fedex-lora", "sgd")])
def test_adapters_have_settings_of_their_own(tmp_path: Path, kind: str, optimizer: str) -> None:
    """The kind asked for, at the rate for adapters; a mean that is made exact is added as it is."""
    plan = plan_for(tmp_path, adapter=kind)
    adapter = plan.federation.adapter
    assert (adapter.kind, adapter.rank, adapter.alpha) == (kind, ADAPTER_RANK, ADAPTER_ALPHA)
    assert plan.federation.training.lr == ADAPTER_LR
    assert plan.federation.aggregation.server.optimizer == optimizer
    assert plan_for(tmp_path, adapter=kind, lr=0.5).federation.training.lr == 0.5
    assert not plan_for(tmp_path).federation.adapter.used


def test_absent_sites_belong_to_the_federation(tmp_path: Path) -> None:
    """Who is never started is on the list all the same, and comes last."""
    plan = plan_for(tmp_path, absent=1)
    assert plan.federation.federation.sites == ("site-1", "site-2", "site-3", "site-4")
    assert (plan.started, plan.absent) == (("site-1", "site-2", "site-3"), ("site-4",))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"absent": 4}, "--absent 4"),
        ({"broker": "http://x"}, "--broker http://x"),
        ({"sites": 0}, "--sites 0"),
        ({"adapter": "fedex-lora", "mode": "fedasync"}, "--adapter fedex-lora"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict[str, object], named: str) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match=named):
        plan_for(tmp_path, **options)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    """A demonstration never writes among other files."""
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        make_plan(DemoOptions(workdir=tmp_path))


@pytest.mark.parametrize(("broker", "names"), [("mqtt://broker:1883", 8), ("auto", 1), ("amqtt", 1)])
def test_two_plans_share_no_federation_at_a_shared_broker(tmp_path: Path, broker: str, names: int) -> None:
    """Each run draws a name, so that nothing retained there is taken for its own; at its own broker it need not."""
    options = DemoOptions(workdir=tmp_path / "run", broker=broker)
    assert len({make_plan(options).federation.federation.name for _ in range(8)}) == names


def test_a_model_is_a_folder_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is there is named absolutely; anything else is passed on as an id."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_source("model") == str(tmp_path / "model")
    assert model_source("org/name") == "org/name"
    assert model_source(None) == str(SHIPPED_MODEL)
