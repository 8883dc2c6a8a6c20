"""Synthetic discharge notes: `make_notes` marks problems, treatments and tests, `make_stays` gives ICD-9 codes."""

from __future__ import annotations

from mailboat.synth.stays import load_codes, make_stays, pool_stays
from mailboat.synth.tasks import SYNTHETIC, Synthetic, find_synthetic
from mailboat.synth.write import SynthReport, make_notes, pool_notes

__all__ = [
    "SYNTHETIC",
    "SynthReport",
    "Synthetic",
    "find_synthetic",
    "load_codes",
    "make_notes",
    "make_stays",
    "pool_notes",
    "pool_stays",
]
