"""The model that a validator is shown, when it is asked, and what comes of one that cannot answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator import validation
from coordinator.decisions import Validate
from coordinator.disk import Disk
from coordinator.means import Kept
from coordinator.records import Accepted
from coordinator.validation import Validation, check_validator
from shared.config import AggregationSection, CodecSection, CoordinatorConfig
from shared.errors import ConfigError, CorruptError, NoRoomError, UnavailableError
from tests.factories import make_federation
from tests.helpers import run_async
from tests.small_run import SmallRun


class Mean:
    """Gives the mean of all values as the loss, after `first` has had its say."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self.seen: list[Path] = []
        self._first = first

    async def loss(self, state: Path) -> float:
        """See Validator."""
        self.seen.append(state)
        self._first()
        await asyncio.sleep(0)
        assert len(list(state.parent.iterdir())) == 1
        return float(np.mean([np.mean(values) for values in load_file(state).values()]))


def begun(run: SmallRun, validator: Mean) -> Validation:
    """A run's validation."""
    config = CoordinatorConfig.model_validate({"federation": "f", "storage": run.folder})
    kept = Kept(run.updates, run.states)
    return Validation(validator, kept, run.plan.tensors, run.folder, Disk(config, run.updates.root))


def job(run: SmallRun, update: Accepted) -> Validate:
    """To measure an update, from the state that it starts from."""
    return Validate(update.update_id, update.norm, run.parts(update.base_version))


def test_what_is_measured_is_the_base_state_with_the_update(tmp_path: Path) -> None:
    """(1, 3) and 10 with (2, 2) added: (3, 5) and 10, by mean 4 and 10; the file is there meanwhile, and gone after."""
    run = SmallRun(tmp_path, {"a": [1.0, 3.0], "b": [10.0]})
    update = run.update("north", {"a": [2, 2]})
    validator = Mean()
    measured = run_async(begun(run, validator).measure(job(run, update)))
    assert (measured.update_id, measured.norm, measured.loss) == (update.update_id, math.sqrt(8), 7.0)
    assert not validator.seen[0].exists()


def test_it_starts_from_what_the_site_had_and_not_from_the_newest_master(tmp_path: Path) -> None:
    """A late update of version 0, whose published state is rounded: 256 + 2, where the master has gone on to 260.5."""
    run = SmallRun(tmp_path, {"a": [256.5]}, codec=CodecSection(up="f32", down="bf16"))
    late = run.update("late", {"a": [2]})
    run.merge(run.update("north", {"a": [4]}))
    assert run_async(begun(run, Mean()).measure(job(run, late))).loss == 258


def test_one_model_lies_there_at_a_time(tmp_path: Path) -> None:
    """Three that arrive together are measured one after the other; each finds the only file, as Mean asserts."""
    run = SmallRun(tmp_path, {"a": [0.0]})
    jobs = [job(run, run.update(f"s{number}", {"a": [number]})) for number in range(3)]
    begun_once = begun(run, Mean())

    async def together() -> list[float]:
        return [each.loss for each in await asyncio.gather(*map(begun_once.measure, jobs))]

    assert run_async(together()) == [0, 1, 2]


def test_a_validator_that_cannot_answer_is_asked_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice it fails: the status says why until it has answered; the update is measured then."""
    monkeypatch.setattr(validation, "RETRY_S", 0.01)
    run = SmallRun(tmp_path, {"a": [0.0]})
    said: list[str] = []

    def fails_twice() -> None:
        said.append(found.held)
        if len(said) < 3:
            raise UnavailableError("the training worker died 3 times", hint="free memory")

    found = begun(run, Mean(fails_twice))
    assert run_async(found.measure(job(run, run.update("north", {"a": [2]})))).loss == 2
    assert said == ["", *["no update can be validated: the training worker died 3 times"] * 2]
    assert found.held == ""


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is written when there is room; meanwhile the disk says that it holds."""
    monkeypatch.setattr("coordinator.disk.POLL_S", 0.01)
    run = SmallRun(tmp_path, {"a": [0.0]})
    found, real = begun(run, Mean()), validation.write_model
    fails = iter([NoRoomError("full", hint=""), NoRoomError("full", hint="")])

    def write(*args: object) -> None:
        for error in fails:
            raise error
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "write_model", write)
    assert run_async(found.measure(job(run, run.update("north", {"a": [2]})))).loss == 2
    assert found._disk.held == "full"


@pytest.mark.parametrize("what", ["update", "state"])
def test_what_is_gone_is_named(tmp_path: Path, what: str) -> None:
    """The journal will need it, or needs it: corruption, and no half-written model stays."""
    run = SmallRun(tmp_path, {"a": [0.0]})
    asked = job(run, run.update("north", {"a": [2]}))
    run.updates.delete(asked.update_id) if what == "update" else run.states.delete(asked.base[0])
    with pytest.raises(CorruptError, match=asked.update_id if what == "update" else asked.base[0]):
        run_async(begun(run, Mean()).measure(asked))
    assert list((tmp_path / "validation").iterdir()) == []


def test_a_start_clears_what_a_crash_left(tmp_path: Path) -> None:
    """The model of an update that was being measured goes: it is written anew when it is measured again."""
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "half.safetensors").write_bytes(b"half")
    begun(SmallRun(tmp_path, {"a": [0.0]}), Mean())
    assert not (tmp_path / "validation").exists()


def test_a_federation_that_weighs_by_loss_needs_somebody_to_measure() -> None:
    """Without notes in coordinator.toml it does not start, and the hint says which key to set."""
    weighing = make_federation(aggregation={"quality": "exp-loss"})
    with pytest.raises(ConfigError, match="exp-loss") as caught:
        check_validator(weighing, None)
    assert "[validation] notes" in caught.value.hint
    check_validator(weighing, Mean())
    check_validator(make_federation(), None)
    assert AggregationSection().quality == "none"
