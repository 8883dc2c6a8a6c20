"""What the command line says, and how it ends: the one place where an error becomes a line and an exit status.

    0    done; for `coordinator run`, `site run` and `broker run` also: ended by SIGTERM, everything in order
    1    the reader of our output went away
    2    the command line or a configuration is wrong
    3    a peer or data was refused, or bytes at rest are not what was written
    4    broker, disk or memory is not there now
    130  ended by Ctrl-C

Results go to standard output, everything else to standard error, so that a pipe carries results alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared.errors import MailboatError

if TYPE_CHECKING:
    from rich.console import Console

READER_GONE = 1
INTERRUPTED = 130
PIPE_COLUMNS = 200


def run(command: Callable[[], object]) -> int:
    """Call `command` and return the process's exit status; a bug keeps its traceback."""
    try:
        command()
        sys.stdout.flush()
    except MailboatError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:
        # Python flushes once more when it ends; that too shall be quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        from shared.durable import storage_failure

        told = storage_failure(error, str(error.filename or "what this command writes"))
        if told is None:
            raise
        print_error(told)
        return told.exit_code
    except SystemExit as leaving:  # how typer ends: 0, 2 for wrong usage, 130 for Ctrl-C
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if status == INTERRUPTED:
            say("stopped")
        return status
    return 0


def print_error(error: MailboatError) -> None:
    """Print one red line and, where there is one, the hint below it."""
    errors().print(f"error: {error.message}", style="bold red", markup=False)
    if error.hint:
        errors().print(f" hint: {error.hint}", markup=False)


def measure_title(name: str) -> str:
    """Return a measure's name for people: strict F1 for strict_f1."""
    return name.replace("_f1", " F1").replace("_", " ")


def say(text: str, *, style: str = "") -> None:
    """Print a line for people to standard error."""
    errors().print(text, style=style, markup=False)


def result() -> Console:
    """Standard output for people: colours on a terminal alone, no line broken by us, no table narrowed in a pipe."""
    from rich.console import Console

    piped = not sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=True, width=PIPE_COLUMNS if piped else None)


def errors() -> Console:
    """Standard error for people; each line stays one line, also in a narrow window."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON for scripts, readable for people too."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
