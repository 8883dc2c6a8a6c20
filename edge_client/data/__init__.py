"""Reading annotated notes from disk: the door is `load_notes`."""

from __future__ import annotations

from edge_client.data.load import MARKED_FORMATS, NoteSet, load_notes, read_files, read_marked
from edge_client.data.notes import AnyNote, Entity, Note, Sentence

__all__ = [
    "MARKED_FORMATS",
    "AnyNote",
    "Entity",
    "Note",
    "NoteSet",
    "Sentence",
    "load_notes",
    "read_files",
    "read_marked",
]
