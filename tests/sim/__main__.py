"""See `runner`."""

from tests.sim.runner import main

if __name__ == "__main__":
    main()
