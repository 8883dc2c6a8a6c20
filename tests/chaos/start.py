"""The real `mailboat` command, whose training worker is the one of these tests: `python -m tests.chaos.start WORDS`."""

from __future__ import annotations

from edge_client import worker_client
from mailboat.cli import main

if __name__ == "__main__":
    worker_client.WORKER = "tests.chaos.worker"
    main()
