"""DP-SGD with real gradients over a real Mosquitto: a tiny model or adapters in it, and each way to clip by its name.

What leaves a site, what it charges and what a kill leaves of it are in test_private_run.py, with a toy; the commands in
test_private_site.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from structlog.testing import capture_logs

from edge_client.privacy import descent, ghost
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import LEDGER, Charge, charges_of, read_ledger
from shared.config import Clipping
from shared.tensorfile import F32Array
from tests.tiny_run import metrics_of, run_tiny, updates_of, write_tiny
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.integration

SHORT, LONG = 4, 3
"""Records of one line, which fit in 64 tokens, and of eight, which do not."""
DELTA, NOISE = 1e-5, 1e-9
"""Noise that hides nothing: with all records drawn in each step, only the way of computing differs."""
EPOCHS = 3
SITES = {f"site-{number}": clipping for number, clipping in enumerate(get_args(Clipping), start=1)}
SAID = {"record": "record", "ghost": "ghost", "auto": "ghost up to 64 tokens"}


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_every_clipping_runs_by_its_name(
    kind: str, tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sites with the same notes, each with a way of its own: it says which, takes it, and sends the same update.

    Each is charged what its records cost, in a private federation of adapters as in one of blocks.
    """
    federation = (
        f'[layers]\nplan = "top:2"\n[adapter]\nkind = "{kind}"\nrank = 4\n[training]\nepochs = {EPOCHS}\nlr = 0.005\n'
        f"[privacy]\ndelta = {DELTA}\nnoise_multiplier = {NOISE}\nclip_norm = 0.5\n"
    )
    locals_ = {site: f'holdout = 0\n[privacy]\nclipping = "{clipping}"\n' for site, clipping in SITES.items()}
    write_tiny(tmp_path, mosquitto_url, sites=3, versions=1, federation=federation, locals_=locals_)
    config = tmp_path / "model" / "config.json"
    # What the head drops in training is drawn for each pass.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"classifier_dropout": 0.0}))
    notes = tiny.notes(SHORT, lines=1) + tiny.notes(SHORT + LONG, lines=8)[SHORT:]
    for site in SITES:
        tiny.write_conll(tmp_path / f"{site}.conll", notes)
    taken = Counter[str]()
    alone = counted(taken, "alone", descent.record_gradient, lambda *_: 1)
    together = counted(taken, "together", ghost.add_clipped_together, lambda *arguments: len(arguments[3]))
    monkeypatch.setattr(descent, "record_gradient", alone)
    monkeypatch.setattr(descent, "add_clipped_together", together)
    with capture_logs() as logs:
        run_tiny(tmp_path, sites=3)
    said = [entry["clipping"] for entry in logs if entry["event"] == "private"]
    assert said == [SAID[clipping] for clipping in SITES.values()]
    assert taken == {"alone": EPOCHS * (SHORT + LONG + LONG), "together": EPOCHS * (SHORT + LONG + SHORT)}

    updates, told = updates_of(tmp_path), metrics_of(tmp_path)
    by_record, *others = (flat(updates[site, 0]) for site in SITES)
    assert all(cosine(by_record, each) > 0.999 for each in others)
    assert any("lora" in name for name in updates["site-1", 0]) == (kind == "lora")
    charge = Charge(sample_rate=1.0, noise_multiplier=NOISE, steps=EPOCHS)
    for site in SITES:
        assert told[site, 0] == {
            "steps": EPOCHS,
            "epsilon": pytest.approx(epsilon_of([charge], DELTA)),
            "delta": DELTA,
            "charges": 1,
        }
        assert charges_of(read_ledger(tmp_path / site / LEDGER)[0]) == (charge,)


def counted(
    taken: Counter[str], name: str, real: Callable[..., Any], records: Callable[..., int]
) -> Callable[..., Any]:
    """The function, and how many records it is given."""

    def counting(*arguments: Any) -> Any:
        taken[name] += records(*arguments)
        return real(*arguments)

    return counting


def flat(tensors: dict[str, F32Array]) -> F32Array:
    """All values of an update, in the order of the names."""
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def cosine(one: F32Array, other: F32Array) -> float:
    """Of the angle between two updates."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
