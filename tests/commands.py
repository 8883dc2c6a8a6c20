"""The command line as its users meet it: `python -m mailboat` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# A shell that starts pytest in the background lets it ignore Ctrl-C; the command must not inherit that.
_START = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('mailboat', run_name='__main__', alter_sys=True)"
)
_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def call(folder: Path, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run `mailboat WORDS` in `folder` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "mailboat", *words],
        cwd=folder,
        env=_ENV,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def refused(folder: Path, *words: str, status: int, timeout_s: float = 60.0) -> str:
    """Run a command that must end with `status`, one error line and no traceback; return that line and its hint."""
    done = call(folder, *words, timeout_s=timeout_s)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr[done.stderr.index("error: ") :]


class Running:
    """A command that runs in the background; its output goes to a file that can be read meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def text(self) -> str:
        """All that it has said so far, standard error included."""
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, words: str, timeout_s: float = 60.0) -> str:
        """Return the output once `words` are in it; AssertionError when it ends or takes too long without."""
        until = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll()  # before its words are looked at: its last may be these
            if words in self.text():
                return self.text()
            assert ended is None, f"ended with {ended}:\n{self.text()}"
            assert time.monotonic() < until, f"never said {words!r}:\n{self.text()}"
            time.sleep(0.05)

    def end(self, how: signal.Signals, timeout_s: float = 30.0) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout_s)


@contextmanager
def running(folder: Path, *words: str, module: Sequence[str] = (), **env: str) -> Iterator[Running]:
    """`mailboat WORDS`, or `python -m MODULE`, in the background while the block runs; killed afterwards.

    `env` is added to its environment.
    """
    command = ["-m", *module] if module else ["-c", _START, *words]
    log = folder / f"{'-'.join(module or words).replace('/', '_')}.out"
    with log.open("wb") as output:
        process = _spawn(folder, command, env, output)
        try:
            yield Running(process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _spawn(folder: Path, command: Sequence[str], env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**_ENV, "PYTHONPATH": root, **env},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
