"""Reproducible experiments: federations from TOML files, run in one process each, counted and compared.

The sites' sessions, trainer and codec, and the coordinator's core, admission and merge are those of a real run; only
the clock, the network and the disks' loss of power are left out. docs/experiments.md tells how to write one.
"""
