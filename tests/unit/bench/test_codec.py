"""The bench of codecs measures what a seal and a merge do."""

from __future__ import annotations

import numpy as np
import pytest

from bench.codec import CODECS, Rates, large_tensors, reader_of, sealed, sizes_and_errors, zstd_alone
from shared.errors import CorruptError

DELTAS = [{"w": np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)} for seed in (0, 1)]


def test_every_codec_has_its_row() -> None:
    """Share and error are those of the codec: f32 has no error, topk2 is the smallest; rates are positive."""
    rates = Rates(DELTAS)
    rates.turn()
    rows = {codec: sizes_and_errors(DELTAS, codec) | rates.of(codec) for codec in CODECS}
    assert rows["f32"]["relative_error"] == 0
    assert min(rows, key=lambda codec: rows[codec]["share_percent"]) == "topk2"
    assert all(row["encode_mb_s"] > 0 and row["decode_add_mb_s"] > 0 for row in rows.values())
    assert zstd_alone(DELTAS)["zstd -1 on bf16"]["share_percent"] < 50


def test_a_merge_compares_each_frame_with_its_hash() -> None:
    """As the coordinator's does: the hashing is in the rate."""
    manifest, frames = sealed(DELTAS[0], "int8")
    frames[0] = frames[0][:-1] + b"x"
    with pytest.raises(CorruptError):
        reader_of(manifest, frames)


def test_large_tensors_hold_the_same_values() -> None:
    """In another order, and again where there are too few."""
    (large,) = large_tensors(DELTAS)
    values = {float(each) for delta in DELTAS for each in delta["w"].reshape(-1)}
    assert {float(each) for each in np.unique(large["layer.3"])} == values
    assert large["layer.0"].shape == (2048, 2048)
