from __future__ import annotations

from pathlib import Path

import pytest

from mailboat.demo.wire import measure_full_transfer
from shared.errors import UnavailableError
from tests.helpers import run_async

pytestmark = pytest.mark.integration


def test_every_byte_of_the_file_is_counted_at_both_ends(mosquitto_url: str, tmp_path: Path) -> None:
    """Weights of several chunks cost their own bytes and a small overhead, the same for sender and receiver."""
    for shard in ("model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        (tmp_path / shard).write_bytes(bytes(range(256)) * 5_000)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    measured = run_async(measure_full_transfer(tmp_path, mosquitto_url, "demo-test-full", "site-1"))
    assert measured.file_bytes == 2_560_000
    assert measured.sent_bytes == measured.received_bytes
    assert 2_560_000 < measured.sent_bytes < 2_560_000 + 5 * 100


def test_a_broker_that_is_not_there_is_said(free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement gives up instead of waiting for ever."""
    monkeypatch.setattr("mailboat.demo.wire.STALL_S", 0.3)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UnavailableError):
        run_async(measure_full_transfer(tmp_path, f"mqtt://127.0.0.1:{free_port}", "demo-test-full", "site-1"))
