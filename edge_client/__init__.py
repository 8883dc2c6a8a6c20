"""Trains at a hospital site and sends its updates."""
