"""The one place where words and marked spans become a sentence, and where a file is decoded.

Every message made here names a file, a line and a rule. None quotes what the file holds: a message
ends in logs that leave the hospital, and a note must not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client.data.notes import Entity, Sentence
from shared.errors import RefusedError, UnavailableError

# Only the white space that typists and exporters write. `str.split()` would also split at U+00A0
# and U+0085, which are letters' neighbours in badly converted notes and would shift every offset.
_BLANKS = re.compile(r"[ \t\f\v]+")


@dataclass(frozen=True, slots=True)
class Where:
    """A line of a file, counted from 1."""

    path: Path
    line: int

    def refuse(self, problem: str, *, rule: str = "note-format", hint: str) -> RefusedError:
        """Return the error that names this line; `problem` and `hint` must quote no content."""
        return RefusedError(f"{self.path}, line {self.line}: {problem}", rule=rule, hint=hint)


def read_lines(path: Path) -> list[str]:
    r"""Return the lines of a text file without their ends (`\n` or `\r\n`) and without a BOM.

    The text is UTF-8. A file that is not UTF-8 is read as Latin-1, in which every byte is a
    character: old exports are written so, and only words outside ASCII differ.

    Raises UnavailableError when the file cannot be read; that is no fault of the note, so it is never skipped.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be read: {error.strerror}",
            hint="give the account that runs the site the right to read its notes",
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    # A file that ends in a line end has no further, empty line after it.
    return lines[:-1] if lines[-1] == "" else lines


def split_words(line: str) -> tuple[str, ...]:
    """Return the words of a line; repeated blanks count as one."""
    return tuple(word for word in _BLANKS.split(line) if word)


def check_label(label: str, labels: Sequence[str], where: Where) -> str:
    """Return `label` if it is one of `labels`; raise RefusedError with the set if not."""
    if label not in labels:
        raise where.refuse(
            f"a label is not one of the label set ({', '.join(labels)})",
            rule="label-set",
            hint="correct the annotation, or agree on a label set that holds it",
        )
    return label


def build_sentence(tokens: Sequence[str], marked: Sequence[tuple[Entity, Where]], where: Where) -> Sentence:
    """Return the sentence whose entities are `marked`, sorted by their start.

    `where` is the line of the sentence; each entity comes with the line that marked it.

    Raises RefusedError when a span is empty, leaves the sentence, or overlaps another one.
    """
    ordered = sorted(marked, key=lambda pair: (pair[0].start, pair[0].end))
    end_before = 0
    for entity, source in ordered:
        if not 0 <= entity.start < entity.end <= len(tokens):
            raise source.refuse(
                f"an entity does not lie inside its sentence of {len(tokens)} tokens "
                f"(line {where.line} of {where.path.name})",
                hint="token offsets count from 0, words are separated by white space",
            )
        if entity.start < end_before:
            raise source.refuse(
                "an entity overlaps another one of the same sentence",
                hint="each token can bear one label; keep one of the two",
            )
        end_before = entity.end
    return Sentence(tuple(tokens), tuple(entity for entity, _ in ordered))
