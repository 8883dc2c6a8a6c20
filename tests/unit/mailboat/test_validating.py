"""When a coordinator has a validator, and what is said when it cannot have one; with a model: tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailboat import validating
from mailboat.doctor import checks
from mailboat.validating import validator_for
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import ConfigError
from tests.factories import make_federation, make_plan
from tests.helpers import run_async
from tests.unit.edge_client import tiny

WEIGHING = make_federation(aggregation={"quality": "exp-loss"})


def yielded(config: dict[str, object], federation: FederationConfig = WEIGHING) -> object:
    """What stands at the coordinator's side."""
    section = CoordinatorConfig.model_validate({"federation": "f", "storage": "s", **config})

    async def story() -> object:
        async with validator_for(section, federation, make_plan(WEIGHING)) as validator:
            return validator

    return run_async(story())


def test_there_is_none_where_none_is_asked_for_or_none_can_be() -> None:
    """Notes alone start no process; neither does a federation that weighs by loss, without notes."""
    assert yielded({"validation": {"notes": "n"}}, make_federation()) is None
    assert yielded({}) is None


def test_without_pytorch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any process is started."""
    monkeypatch.setattr(validating, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="torch") as caught:
        yielded({"validation": {"notes": "n"}})
    assert "mailboat[edge]" in caught.value.hint


def test_the_worker_is_given_the_operators_notes_whole(tmp_path: Path) -> None:
    """All notes, none held out, and the model and threads that the file names."""
    section = {"notes": tmp_path / "n", "skip_bad": True, "model_dir": tmp_path / "m", "threads": 3}
    config = CoordinatorConfig.model_validate({"federation": "f", "storage": "s", "validation": section})
    site = validating._as_site(config)
    assert site is not None
    assert (site.data.notes, site.data.skip_bad, site.data.holdout) == (tmp_path / "n", True, 0.0)
    assert (site.model_dir, site.threads, site.storage) == (tmp_path / "m", 3, Path("s") / "validation")


def test_the_doctor_reads_the_notes_of_a_coordinator_that_weighs_by_loss(tmp_path: Path) -> None:
    """Where it does; without notes, or with notes that cannot be read, it says what is missing."""

    def told(notes: Path | None, federation: FederationConfig = WEIGHING) -> list[tuple[str, str]]:
        section = {"federation": "f", "storage": "s", "validation": {"notes": notes}}
        config = CoordinatorConfig.model_validate(section)
        return [(found.level, found.message) for found in checks._validation(config, federation)]

    assert told(tmp_path, make_federation()) == []
    ((level, message),) = told(None)
    assert (level, "exp-loss" in message) == ("FAIL", True)
    (level, message), _ = told(tmp_path / "nowhere")
    assert (level, "nowhere" in message) == ("FAIL", True)
    (level, message), device = told(tiny.write_conll(tmp_path / "held.conll", tiny.notes(3)))
    assert (level, message.startswith("3 notes in ")) == ("OK", True)
    assert device == ("OK", "cpu, precision f32")
