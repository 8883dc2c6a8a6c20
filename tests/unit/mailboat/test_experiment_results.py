from __future__ import annotations

from pathlib import Path

import pytest

from mailboat.experiment import inputs
from mailboat.experiment.inputs import ROOT, code_digest, counted_files
from mailboat.experiment.results import Cabinet, Point, Result, is_current
from shared.errors import CorruptError


def result(**changes: object) -> Result:
    """A result of two versions."""
    values = {
        "settings_sha256": "ab" * 32,
        "code_sha256": code_digest(),
        "title": "small: top 2, seed 1",
        "scores": {"strict_f1": 0.5, "lenient_f1": 0.6},
        "curve": [Point(version=n, at_s=60.0 * n, up=n, down=n, scores={"strict_f1": 0.25 * n}) for n in range(3)],
        "versions": 2,
        "up": 2000,
        "down": 3000,
        "train_s": 0.5,
        "trainings": 4,
        "cpu_s": 3.0,
        "trained_parameters": 10,
        "total_parameters": 40,
        "machine": "m",
        "software": "s",
    }
    return Result.model_validate(values | changes)


def test_a_result_is_found_again(tmp_path: Path) -> None:
    """What was put away comes back equal; nothing is found for other settings; a later one replaces it."""
    cabinet = Cabinet(tmp_path)
    assert cabinet.get("ab" * 32) is None
    cabinet.put(result())
    assert cabinet.get("ab" * 32) == result()
    assert cabinet.get("cd" * 32) is None
    cabinet.put(result(title="again"))
    assert cabinet.get("ab" * 32) == result(title="again")


def test_a_spoilt_result_is_named(tmp_path: Path) -> None:
    """A file that is not what was written stops the run, and says which."""
    cabinet = Cabinet(tmp_path)
    cabinet.put(result())
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text(path.read_text().replace('"versions": 2', '"versions": "two"'))
    with pytest.raises(CorruptError, match=r"field versions"):
        cabinet.get("ab" * 32)


def test_results_of_other_sources_are_told_apart() -> None:
    """A result knows the sources that made it."""
    assert is_current(result())
    assert not is_current(result(code_sha256="00" * 32))


def test_what_the_numbers_come_from_is_counted() -> None:
    """Trainer, codec, merge, core, tasks and notes count; commands, the link's sockets and the plots do not."""
    names = {str(path.relative_to(ROOT)) for path in counted_files()}
    assert names >= {
        "edge_client/trainer.py",
        "edge_client/prefix.py",
        "edge_client/tasks/ner.py",
        "shared/codec.py",
        "shared/config/learning.py",
        "coordinator/core.py",
        "coordinator/aggregate.py",
        "mailboat/synth/notes.py",
        "mailboat/synth/words/problem.txt",
        "mailboat/experiment/splitnn.py",
    }
    assert not names & {"mailboat/cli.py", "mailboat/experiment/plots.py", "shared/link/client.py", "broker/config.py"}


def test_comments_and_docstrings_do_not_count() -> None:
    """The same code with other words about it is the same code; another number is not."""
    one = 'def f():\n    """One."""\n    return 1  # first\n'
    two = 'def f():\n    """Two, longer."""\n\n    return 1\n'
    bare = inputs._bare
    assert bare(one) == bare(two)
    assert bare(one) != bare(one.replace("return 1", "return 2"))
