"""The real `mailboat experiment`, whose workers never end their second cell: `python -m tests.stuck experiment WORDS`.

So it is in the midst of its work whenever a test looks, however quick the machine is.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from mailboat import cli
from mailboat.experiment import runner, worker
from mailboat.experiment.results import Result
from mailboat.experiment.trial import Bench


class Stuck(Bench):
    """Carries out one cell."""

    begun = False

    def carry_out(self, *args: Any) -> Result:
        """See Bench; the second time there is no end."""
        if self.begun:
            threading.Event().wait()
        self.begun = True
        return super().carry_out(*args)


if __name__ == "__main__":
    if sys.argv[1] == "experiment":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in tests/commands.py
        runner.WORKER = "tests.stuck"
        cli.main()
    with mock.patch.object(worker, "Bench", Stuck):
        worker.main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
