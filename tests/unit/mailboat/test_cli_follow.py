from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mailboat.follow import follow_lines, read_lines
from shared.audit import Line
from shared.errors import CorruptError


def line(seq: int, note: str = "") -> str:
    """One line of audit.jsonl."""
    return json.dumps({"seq": seq, "kind": "accepted", "note": note}) + "\n"


class Scripted:
    """The writer: takes its next step each time the reader has nothing to do, and ends the reading after the last."""

    class OverError(Exception):
        """No step is left."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = iter(steps)

    def __call__(self) -> None:
        """Take the next step."""
        step = next(self._steps, None)
        if step is None:
            raise Scripted.OverError
        step()


def followed(path: Path, *steps: Callable[[], object]) -> list[Any]:
    """The numbers of the lines told while the writer takes its steps."""

    def told(lines: Iterator[Line]) -> Iterator[Line]:
        try:
            yield from lines
        except Scripted.OverError:
            return

    return [found["seq"] for found in told(follow_lines(path, Scripted(*steps)))]


def append(path: Path, text: str) -> Callable[[], object]:
    """A step that appends."""

    def step() -> None:
        with path.open("a") as file:
            file.write(text)

    return step


def test_new_lines_are_told_once_each(tmp_path: Path) -> None:
    """Lines that were there, and each one appended later, are told in order."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1) + line(2))
    assert followed(path, append(path, line(3)), append(path, line(4) + line(5))) == [1, 2, 3, 4, 5]


def test_a_line_is_told_when_it_is_whole(tmp_path: Path) -> None:
    """A line without its end waits for the rest of it."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1) + line(2)[:10])
    assert followed(path, append(path, line(2)[10:])) == [1, 2]


def test_a_file_that_is_not_there_yet_is_awaited(tmp_path: Path) -> None:
    """Following may start before the coordinator does."""
    path = tmp_path / "audit.jsonl"
    assert followed(path, lambda: None, lambda: path.write_text(line(1))) == [1]


def test_a_mended_file_repeats_nothing(tmp_path: Path) -> None:
    """A coordinator that cuts the file and writes it again tells only what is new."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1) + line(2) + line(3))
    steps = (lambda: os.truncate(path, len(line(1))), append(path, line(2) + line(3) + line(4)))
    assert followed(path, *steps) == [1, 2, 3, 4]


def test_a_replaced_file_repeats_nothing(tmp_path: Path) -> None:
    """Another file under the same name, also a longer one, is read from its beginning."""
    path, other = tmp_path / "audit.jsonl", tmp_path / "other"
    path.write_text(line(1) + line(2))
    other.write_text("".join(line(seq, "longer") for seq in range(1, 5)))
    assert followed(path, lambda: other.replace(path), lambda: None) == [1, 2, 3, 4]


def test_a_file_deleted_and_made_again_goes_on(tmp_path: Path) -> None:
    """The file may disappear in between."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1))
    assert followed(path, path.unlink, lambda: path.write_text(line(1) + line(2))) == [1, 2]


def test_lines_that_moved_in_place_are_noticed(tmp_path: Path) -> None:
    """Where the old offset no longer begins a line, reading starts over and tells only what is new."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1, "edited by somebody") + line(2))
    steps = (lambda: path.write_text(line(1) + line(2) + line(3) + line(4)), lambda: None)
    assert followed(path, *steps) == [1, 2, 3, 4]


def test_reading_once_leaves_out_an_unfinished_line(tmp_path: Path) -> None:
    """What is still being written is no line yet."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1) + line(2)[:-1])
    assert [found["seq"] for found in read_lines(path)] == [1]


@pytest.mark.parametrize("bad", ["not json\n", '["a list"]\n', line(7)])
def test_reading_once_names_a_changed_line(tmp_path: Path, bad: str) -> None:
    """A line that is not a row's, or not in its place, is named by its number and not quoted."""
    path = tmp_path / "audit.jsonl"
    path.write_text(line(1) + bad)
    with pytest.raises(CorruptError, match=r"line 2, was changed"):
        list(read_lines(path))
