"""The front door: command line and demonstration."""
