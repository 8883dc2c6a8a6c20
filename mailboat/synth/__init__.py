"""Synthetic discharge notes with marked problems, treatments and tests: the door is `make_notes`."""

from __future__ import annotations

from mailboat.synth.write import SynthReport, make_notes

__all__ = ["SynthReport", "make_notes"]
