"""What the demonstration learns with, in one place; found by trying on the shipped model and the synthetic notes.

Plain numbers: the command line shows them in its help, which must not wait for anything to be imported.
"""

from __future__ import annotations

SITES = 4
NOTES = 48
"""Training notes of each site: few enough that one site alone falls short, enough that four together do not."""
HELDOUT_NOTES = 40
"""Notes on which every F1 of the final table is computed, drawn from all sites in turn; nobody trains on them."""
ALPHA = 2.0
"""Dirichlet concentration of the label mix over the sites: smaller is more skewed."""
ROUNDS = 8
"""Local trainings of each site, whatever the mode: the sync run publishes this many versions."""
LAYERS = "6"
SEED = 0

MAX_LENGTH = 128
"""Tokens of one training window: short ones make more steps of the same notes."""
BASELINE_EPOCHS = 5
"""Epochs of the baselines, each with one rise and fall of the rate; they gain nothing from more: centralized training
on 28 notes a site reached a strict F1 of 72.5 with 5 epochs and 72.6 with 10."""
EPOCHS = 1
"""Passes over a site's notes in one local training."""
BATCH_SIZE = 2
LR = 5e-3
FINAL_LR = 0.2
"""Share of the rate that is left at the last version: sites that differ settle only as it falls."""
SERVER_MOMENTUM = 0.5

HOLDOUT = 0.1
"""Share of a site's own notes on which it reports its local F1."""
SLICE_KIB = 128
"""Raw bytes per chunk: small, so that a transfer that is cut has something to resume."""
STALL_S = 3.0
"""Everything is on one machine; what is silent for this long is asked for again."""
ROUND_DEADLINE_S = 60.0
"""A sync round that has its quorum closes after this long without the others."""
RUN_DEADLINE_S = 1800.0
"""The run is given up after this long; with the shipped model it needs about a tenth of it."""
STALLED_S = 240.0
"""The run is given up when nothing at all has moved for this long."""
