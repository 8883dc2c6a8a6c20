"""A process that carries out cells: one JSON line in for each, any number of lines out on its progress, then one more.

`python -m mailboat.experiment.worker SCRATCH NICENESS DEVICE`, started by `mailboat.experiment.runner`. It leaves in
the moment in which its input closes, which is when the runner ends, however it ends.

    in     {"title": ..., "settings": {...}}
    out    {"share": 0.25, "word": "version 2 of 8"}
           {"result": {...}}  or  {"failed": message, "hint": ...}
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn, TextIO

import structlog
import torch

from mailboat.experiment.cells import Settings
from mailboat.experiment.trial import Bench
from shared.config import ComputeSection
from shared.errors import MailboatError


def main(scratch: Path, niceness: int, device: str) -> NoReturn:
    """Carry out cells until the input closes."""
    os.nice(niceness)
    answers = _take_output()
    # Ctrl-C goes to the whole group of the terminal; the runner decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    torch.set_num_threads(1)

    def say(answer: dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(0)

    bench = Bench(scratch, ComputeSection(device=device))
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    while True:
        asked = inbox.get()
        try:
            settings = Settings.model_validate(asked["settings"])
            result = bench.carry_out(asked["title"], settings, lambda share, word: say({"share": share, "word": word}))
            say({"result": result.model_dump(mode="json")})
        except MailboatError as error:
            say({"failed": error.message, "hint": error.hint})


def _take_output() -> TextIO:
    """Keep standard output for answers alone: whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _read(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass lines on; at the end of input leave at once, in the middle of whatever the other thread does."""
    for line in sys.stdin:
        inbox.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
