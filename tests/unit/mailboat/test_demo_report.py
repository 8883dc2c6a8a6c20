from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from mailboat.demo.plot import draw
from mailboat.demo.report import comparison_table, to_json, verdict, version_table, wire_table
from tests.unit.mailboat.demo_samples import result


def text_of(table: object) -> str:
    """A table as plain text."""
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_full_fedavg_is_the_measured_transfer_times_the_transfers_made() -> None:
    """Four updates up and seven states down, each at what its direction measured."""
    wire = result().wire
    assert wire.full_fedavg == 4 * 12_100 + 7 * 12_200
    assert (wire.up, wire.down) == (3000, 6000)
    assert wire.saving == pytest.approx(1 - 9000 / (4 * 12_100 + 7 * 12_200))


def test_json_holds_what_scripts_rely_on() -> None:
    """The keys and units are stable, and the whole is JSON."""
    told = json.loads(json.dumps(to_json(result()), allow_nan=False))
    assert [version["version"] for version in told["versions"]] == [0, 1, 2]
    last = told["versions"][2]
    assert (last["strict_f1"], last["lenient_f1"], last["state_digest"]) == (0.612, 0.703, f"{2:064x}")
    assert last["contributions"][1] == {
        "update_id": f"{5:032x}",
        "site": "site-3",
        "base_version": 0,
        "staleness": 1,
        "weight": 0.5,
    }
    assert told["versions"][0]["contributions"] == []
    assert told["local_only"]["site-2"] == {"strict_f1": 0.52, "lenient_f1": 0.58}
    assert told["centralized"] == {"strict_f1": 0.64, "lenient_f1": 0.72}
    assert told["bytes"].keys() >= {"up", "down", "full_fedavg", "saving"}
    assert (told["broker"]["kind"], told["wall_s"]) == ("mosquitto", 90.0)


def test_tables_show_every_version_and_every_comparison() -> None:
    """A reader finds base, each site, the best of them, the federated model and the centralized one."""
    versions, compared = text_of(version_table(result())), text_of(comparison_table(result()))
    for expected in ("0", "base model", "40.0", "61.2", "70.3", "site-1 (0), site-3 (1)"):
        assert expected in versions
    for expected in ("site-2 alone, the best single site", "federated, version 2", "centralized", "64.0", "1.0"):
        assert expected in compared


def test_the_wire_table_says_how_it_was_counted() -> None:
    """Measured transfer, number of transfers and saving stand together."""
    text = text_of(wire_table(result()))
    for expected in ("3 kB", "6 kB", "measured", "12.1 kB", "times 4 up and 7 down", "93.3%"):
        assert expected in text


def test_the_verdict_tells_a_loss_as_plainly_as_a_gain() -> None:
    """Above the best single site, below centralized, in points."""
    above, below = verdict(result())
    assert "9.2 points above the best single site (site-2)" in above
    assert "2.8 points below centralized" in below


def test_without_baselines_nothing_is_compared() -> None:
    """No best site, no centralized line, and still a table and JSON."""
    bare = result(local_only={}, centralized=None)
    assert verdict(bare) == []
    assert "alone" not in text_of(comparison_table(bare))
    assert to_json(bare)["centralized"] is None


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    """Drawn with and without baselines, without a display."""
    for name, made in (("whole", result()), ("bare", result(local_only={}, centralized=None))):
        draw(made, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
