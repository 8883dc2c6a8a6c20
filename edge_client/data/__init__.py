"""Reading annotated notes from disk: the door is `load_notes`."""

from __future__ import annotations

from edge_client.data.load import MARKED_FORMATS, NoteSet, load_notes, read_files, read_marked
from edge_client.data.notes import AnyNote, Entity, HeadedLine, HeadedNote, Note, Sentence, TextNote
from edge_client.data.plain import PLAIN_FORMATS, read_plain
from edge_client.data.relations import RELATION_FORMATS, read_heads, read_relations
from edge_client.data.texts import ANY_LABELS_FORMATS, ONE_LABEL_FORMATS, read_any_labels, read_one_label

__all__ = [
    "ANY_LABELS_FORMATS",
    "MARKED_FORMATS",
    "ONE_LABEL_FORMATS",
    "PLAIN_FORMATS",
    "RELATION_FORMATS",
    "AnyNote",
    "Entity",
    "HeadedLine",
    "HeadedNote",
    "Note",
    "NoteSet",
    "Sentence",
    "TextNote",
    "load_notes",
    "read_any_labels",
    "read_files",
    "read_heads",
    "read_marked",
    "read_one_label",
    "read_plain",
    "read_relations",
]
