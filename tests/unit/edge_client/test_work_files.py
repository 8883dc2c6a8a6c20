"""What a training leaves for the next one to write over, and what it does not leave."""

from __future__ import annotations

from pathlib import Path

from edge_client.work_files import WorkFiles


def test_the_two_large_files_stay_until_the_end(tmp_path: Path) -> None:
    """Whatever lies beside them goes after each training; at start and end everything goes."""
    work = WorkFiles(tmp_path / "work")
    work.clear()
    assert work.size == 0
    work.state.write_bytes(b"12345")
    work.delta.write_bytes(b"123")
    (work.folder / "delta.own").write_bytes(b"1")
    assert work.size == 9
    work.tidy()
    assert {path.name for path in work.folder.iterdir()} == {"state.safetensors", "delta.safetensors"}
    work.clear()
    assert list(work.folder.iterdir()) == []
