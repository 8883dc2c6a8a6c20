"""Collects the sites' updates, merges them and publishes versions."""
