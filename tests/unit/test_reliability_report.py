"""The report on reliability says what the measurements say, and nothing where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import reliability_report as report

CHAOS: dict[str, Any] = {
    "machine": {"date": "2026-01-02", "cores": 3},
    "seeds": [4, 5],
    "kills": 41,
    "kills_at_points": 17,
    "points": {"site seal.before": 2},
    "points_never_reached": ["coordinator delete.middle"],
    "faults": {"kill site": 9},
    "updates": 33,
    "versions": 20,
    "failed": {},
    "runs": [
        dict.fromkeys(
            ("seed", "mode", "sites", "sealed", "queue_max", "versions", "kills", "faults", "updates", "ok"), 7
        ),
    ],
}
RECOVERY: dict[str, Any] = {
    "settings": {"update_bytes": 8_000_000, "slice_kib": 128, "window": 16, "mbit_s": 8},
    "faults": {
        "site killed": [
            {"recovery_s": 1.5, "resent_bytes": 1_000_000, "starved": 0.0},
            {"recovery_s": 2.5, "resent_bytes": 3_000_000, "starved": 0.01},
            {"recovery_s": 99.0, "resent_bytes": 2_000_000, "starved": 0.5},
        ]
    },
}


SIM: dict[str, Any] = {
    "machine": {"date": "2026-01-03"},
    "commit": "0123456789abcdef",
    "ranges": [[0, 999], [10_000_000, 10_000_499]],
    "worlds": {"sync": 1000, "fedasync, sealed": 500},
    "versions": 4000,
    "updates": {"merged": 9000, "open": 3},
    "faults": {"power lost": 1234},
    "virtual_s": 7200,
    "cpu_s": 75.0,
    "failures": [],
    "notes": ["Seed 7 failed at an earlier commit."],
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the report from the measurements given, and returns it."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "docs" / "results")
    (tmp_path / "docs" / "results").mkdir(parents=True)

    def write(**measured: dict[str, Any]) -> str:
        for name, found in measured.items():
            (tmp_path / "docs" / "results" / f"{name}.json").write_text(json.dumps(found))
        report.main()
        return (tmp_path / "docs" / "reliability.md").read_text()

    return write


def test_without_measurements_it_says_how_to_make_them(written: Any) -> None:
    """No number stands where nothing was measured."""
    text = written()
    for command in ("make chaos", "make bench-memory", "make sim SEEDS=100000"):
        assert f"Not measured yet: `{command}`." in text
    assert "kills" not in text


def test_numbers_come_from_the_files(written: Any) -> None:
    """Sums, date and machine are those of the JSON; a point that was never reached is named."""
    text = written(chaos=CHAOS)
    assert "**41 kills** by SIGKILL, 17 of them" in text
    assert "date 2026-01-02, cores 3" in text
    assert "none lost, none counted twice" in text
    assert "Never reached in these runs: coordinator delete.middle." in text


def test_worlds_are_told_with_their_bugs(written: Any) -> None:
    """Counts, seeds and commit are those of the file; a bug that no seed found is named as such."""
    bugs = {"commit": "fedcba9876543210", "found at seed": {"no dedupe": 3, "blind": None}}
    text = written(sim=SIM, **{"sim-bugs": bugs})
    assert "**1,500 worlds**, each from its seed (0 to 999, 10000000 to 10000499), at commit `0123456789ab`" in text
    assert "none broke a promise" in text
    assert "2 hours of their own" in text
    assert "75 s of processor time, 50 ms each" in text
    for line in ("| power lost | 1,234 |", "| no dedupe | 3 |", "| blind | not found |", "- Seed 7 failed"):
        assert line in text
    failed = {**SIM, "failures": [{"seed": 11, "what": "lost", "where": "here"}]}
    assert "broke a promise in seeds [11]" in written(sim=failed)


def test_a_failed_seed_is_said(written: Any) -> None:
    """A run that failed is not hidden behind the sums."""
    text = written(chaos={**CHAOS, "failed": {"5": ["lost"]}})
    assert "seeds that failed: ['5']" in text
    assert "none lost" not in text


def test_times_of_a_busy_machine_are_left_out(written: Any) -> None:
    """Median and worst are of the calm measurements; bytes do not depend on the clock and are all counted."""
    text = written(recovery=RECOVERY)
    assert "| site killed | 2 of 3 | 2.00 | 2.50 | 2.00 | 3.00 |" in text
    assert "1 times are left out" in text


def test_outages_appear_with_what_was_late(written: Any) -> None:
    """A line for each kind of outage, with the settings that it was measured under."""
    settings = {
        "update_bytes": 8e6,
        "mbit_s": 4.0,
        "progress_bytes": 16384,
        "starved_max": 0.1,
        "window_bytes": 8.4e6,
    }
    text = written(reconnect={"settings": settings, "table": [{"fault": "hole", "late": 1}], "note": "Noted."})
    assert "transfers of 8 MB over 4 Mbit/s" in text
    assert "| hole | 1 |" in text
    assert "Noted." in text


def test_other_measurements_appear_as_they_are(written: Any) -> None:
    """What another program measured is shown under its own names."""
    text = written(goodput={"seeds": 2000, "found": {"no dedupe": 3}, "runs": [{"a": 1, "b": 2}]})
    assert "| seeds | 2000 |" in text
    assert "| no dedupe | 3 |" in text
    assert "| a | b |" in text


def test_the_same_faults_given_to_others_stand_side_by_side(written: Any) -> None:
    """A run that never went on says never, one whose rounds went on during the fault says since when."""
    run = {
        "framework": "other",
        "version": "9.1",
        "fault": "link down",
        "verdict": "running",
        "took_s": 12.3,
        "trained": [2, 2],
        "counted": [1, 1],
        "up_mb": 30.2,
        "down_mb": 41.0,
        "moving_s": None,
        "round_s": -7.4,
        "site_1_s": 3.0,
        "load": 0.0,
    }
    settings = {"sites": 2, "mb": 24, "mbit": 16, "rounds": 7, "training": 60, "outage": 240, "restart_s": 5}
    text = written(peers={"machine": {}, "settings": settings, "remarks": ["a remark"], "runs": [run]})
    assert "| link down | other 9.1 | running | 12 | 2 2 | 1 1 | 30, 41 | never | -7 | 3 | - |" in text
    assert "- a remark" in text
