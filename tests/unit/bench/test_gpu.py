"""The bench of training on a GPU: what it counts, and that all of it runs where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import LLAMA_1B, Shape, Way, lines, main, peak_of, step_operations
from edge_client.device import Device


def test_operations_by_hand() -> None:
    """Weights of a block: 4 x (4 + 4 + 2 + 2 + 3 x 8) = 144. Forwards 2 x 144 + 4 x 6 x 4 = 384 for each token."""
    shape = Shape(depth=5, width=4, heads=2, kv_heads=1, inner=8, vocabulary=9, sequence=6)
    assert shape.block_weights == 144
    assert step_operations(shape, Way(2, kept=True), tokens=10) == 10 * 384 * 3 * 2
    assert step_operations(shape, Way(2, kept=False), tokens=10) == 10 * 384 * (3 * 2 + 3)
    assert step_operations(shape, Way(5, kept=False), tokens=10) == 10 * 384 * 3 * 5


def test_the_blocks_of_llama_1b() -> None:
    """16 blocks of 60.8 million: with 262.7 million of embeddings the 1.24 billion that Meta says."""
    assert LLAMA_1B.vocabulary is not None
    assert LLAMA_1B.depth * LLAMA_1B.block_weights + LLAMA_1B.vocabulary * LLAMA_1B.width == 1_235_746_816


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [("NVIDIA H200", "bf16", 989e12), ("NVIDIA H200", "f32", None), ("NVIDIA H100 PCIe", "bf16", None)],
)
def test_a_peak_is_of_one_gpu_and_one_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    """Another card, another form of the same card, or float32 have none here."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_of(Device(torch.device("cuda", 0), "bf16" if precision == "bf16" else "f32")) == peak


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script, in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.gpu", *arguments])
    main()


def test_all_of_it_runs_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model, all ways: kept states lie on the disk, and what only a GPU can tell is told to be unknown."""
    out = tmp_path / "gpu.json"
    run(monkeypatch, "--device", "cpu", "--tiny", "--batch", "2", "--batches", "4", "--tops", "4", "--json", str(out))
    told = json.loads(out.read_text())
    rows = {row["way"]: row for row in told["rows"]}
    assert list(rows) == ["top 4, kept", "top 4, plain", "full"]
    assert told["machine"]["device"] == "cpu"
    assert [row["kept_bytes"] > 0 for row in told["rows"]] == [True, False, False]
    for row in told["rows"]:
        assert (row["steps"], row["peak_bytes"], row["share_of_peak"]) == (4, None, None)
        assert row["round_s"]["int8"] >= row["train_s"] > 0
        assert row["codecs"]["int8"]["bytes"] < row["codecs"]["bf16"]["bytes"]
    assert rows["top 4, kept"]["losses"] == rows["top 4, plain"]["losses"]
    assert "unknown" in lines(told["rows"])[1]


def test_without_a_gpu_it_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what can be done here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"bench\.gpu: .*finds no GPU of CUDA here; --device cpu --tiny") as ended:
        run(monkeypatch)
    assert "\n" not in str(ended.value)
