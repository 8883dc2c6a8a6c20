"""The federations in docs/recipes: each loads, and says what it claims to."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import FederationConfig
from shared.configfile import load_config

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"


def recipe(name: str) -> FederationConfig:
    """One of them."""
    return load_config(RECIPES / f"{name}.toml", FederationConfig)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_loads(path: Path) -> None:
    """Nothing in it is unknown to this release, and it waits for more than one site."""
    assert load_config(path, FederationConfig).aggregation.quorum > 1


@pytest.mark.parametrize(
    "name", ["fed-medlora-i2b2-1b", "fed-medlora-i2b2-relations-1b", "fed-medlora-i2b2-8b", "fed-medlora-mimic-1b"]
)
def test_fed_medloras_settings(name: str) -> None:
    """Rank 16 and alpha 64 on all linear layers of all blocks, rate 2e-4 with 5 % warm-up, batch 4."""
    federation = recipe(name)
    adapter, training = federation.adapter, federation.training
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.targets) == ("lora", 16, 64, ())
    assert (training.lr, training.warmup, training.batch_size) == (2e-4, 0.05, 4)
    assert federation.layers.plan == "all"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fed-medlora-i2b2-1b", "extraction"),
        ("fed-medlora-i2b2-8b", "extraction"),
        ("fed-medlora-i2b2-relations-1b", "relations"),
    ],
)
def test_fed_medloras_extraction(name: str, kind: str) -> None:
    """Text of at most 800 tokens, two local epochs, three rounds."""
    federation = recipe(name)
    assert (federation.task.kind, federation.task.max_length) == (kind, 800)
    assert (federation.training.epochs, federation.federation.versions) == (2, 3)


@pytest.mark.parametrize("name", ["layers-i2b2-1b", "layers-mimic-1b"])
def test_layer_skippings_plan(name: str) -> None:
    """The top 6 of 16 blocks: 6 of 60,821,504 parameters of 1,235,814,400 travel, so 70.5 % never do."""
    federation = recipe(name)
    assert (federation.layers.plan, federation.adapter.kind) == ("top:6", "none")
    saved = 1 - 6 * 60_821_504 / 1_235_814_400
    assert saved == pytest.approx(0.705, abs=5e-4)


def test_what_travels_by_hand() -> None:
    """LLaMA-3.2-1B, 16 blocks of width 2048: rank 16 makes the 11.3 million parameters that the recipe names.

    Query and output map 2048 to 2048, key and value 2048 to 512, gate and up 2048 to 8192, down 8192 to 2048; an
    adapter has rank times in plus out.
    """
    adapter = recipe("fed-medlora-i2b2-1b").adapter
    ends = 2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)
    assert 16 * adapter.rank * ends == 11_272_192
