"""`python -m mailboat` is the command `mailboat`."""

from __future__ import annotations

from mailboat.cli import main

if __name__ == "__main__":
    main()
