"""Reading annotated notes from disk: the door is `load_notes`."""

from __future__ import annotations

from edge_client.data.load import NoteSet, load_notes
from edge_client.data.notes import Entity, Note, Sentence

__all__ = ["Entity", "Note", "NoteSet", "Sentence", "load_notes"]
