"""Measurements that are too long for a test; each prints what it found, and writes it as JSON."""
