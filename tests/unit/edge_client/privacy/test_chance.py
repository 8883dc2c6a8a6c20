"""The secret stream; bounds are six standard errors wide: one run in hundreds of millions fails by chance."""

from __future__ import annotations

import numpy as np
import torch

from edge_client.privacy.chance import Chance

COUNT = 200_000
WIDE = 6 / np.sqrt(COUNT)


def test_two_streams_differ_whatever_was_seeded() -> None:
    """No seed of torch or numpy makes a stream repeat another."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002 - the global generator is the one that must not matter
        chance = Chance()
        drawn += [chance.uniform(8), chance.normal(8)]
    assert len({each.tobytes() for each in drawn}) == 4


def test_why_torch_does_not_make_the_noise() -> None:
    """Its generator on a processor keeps 32 bits of a seed: two seeds that differ above them give one stream."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (5, 5 + (1 << 32)))
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=second))


def test_uniform_numbers_fill_the_interval() -> None:
    """All are in [0, 1), each tenth of it holds a tenth of them, and they do not hang together."""
    drawn = Chance().uniform(COUNT)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    shares, _ = np.histogram(drawn, bins=10, range=(0, 1))
    np.testing.assert_allclose(shares / COUNT, 0.1, atol=0.3 * WIDE)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < WIDE


def test_normal_numbers_are_normal() -> None:
    """Moments one to four, the share beyond two and three standard deviations, and the halves of pairs."""
    drawn = Chance().normal(COUNT)
    assert abs(drawn.mean()) < WIDE
    assert abs((drawn**2).mean() - 1) < np.sqrt(2) * WIDE
    assert abs((drawn**3).mean()) < np.sqrt(15) * WIDE
    assert abs((drawn**4).mean() - 3) < np.sqrt(96) * WIDE
    for bound, share in ((2, 0.0455003), (3, 0.0026998)):
        assert abs((abs(drawn) > bound).mean() - share) < np.sqrt(share) * WIDE
    assert abs(np.corrcoef(drawn[: COUNT // 2], drawn[COUNT // 2 :])[0, 1]) < np.sqrt(2) * WIDE


def test_any_count_is_given() -> None:
    """None, an odd one, an even one."""
    chance = Chance()
    assert [len(chance.normal(count)) for count in (0, 1, 6)] == [0, 1, 6]
    assert [len(chance.uniform(count)) for count in (0, 1, 6)] == [0, 1, 6]
