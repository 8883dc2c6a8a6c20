"""Synthetic discharge notes: `make_notes` marks problems, treatments and tests, `make_stays` gives ICD-9 codes."""

from __future__ import annotations

from mailboat.synth.stays import load_codes, make_stays, pool_stays
from mailboat.synth.write import SynthReport, make_notes

__all__ = ["SynthReport", "load_codes", "make_notes", "make_stays", "pool_stays"]
