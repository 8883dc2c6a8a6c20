"""Token classification: concepts such as problem, treatment and test, as BIO classes of words.

Sang and Veenstra (1999), "Representing text chunks", call this scheme IOB2: the first word of an entity is B, each
further one I, everything else O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nervaluate.evaluator import Evaluator
from torch.nn.functional import cross_entropy

from edge_client.data import MARKED_FORMATS, Entity, Note, Sentence, TextNote, read_marked, read_plain
from edge_client.data.checks import split_words
from edge_client.tasks import IGNORED, TOKENS, Ids, Scores, Window
from edge_client.tasks.encoding import NO_WORD, EncodedLine, TextEncoder
from shared.config import TaskSection
from shared.errors import RefusedError

OUTSIDE = 0


def make(section: TaskSection) -> NerTask:
    """Return the task for the federation's labels."""
    return NerTask(section.labels)


class NerTask:
    """Named-entity recognition over a closed set of labels. A unit is a word; an example is a line with words."""

    head = TOKENS
    formats = MARKED_FORMATS

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._begin = {label: 1 + 2 * index for index, label in enumerate(self.labels)}

    @property
    def classes(self) -> tuple[str, ...]:
        """O, then B-x and I-x for each label x, in the order of the federation's labels."""
        return ("O", *(f"{part}-{label}" for label in self.labels for part in "BI"))

    def read(self, path: Path) -> Iterator[Note | RefusedError]:
        """Yield the notes with marked entities under `path`."""
        return read_marked(path, self.labels)

    def read_bare(self, path: Path) -> Iterator[Note | RefusedError]:
        """Yield the texts under `path` as lines of words."""
        return read_unmarked(path)

    def findings(self, notes: Sequence[Note], predictions: Ids) -> Iterator[Mapping[str, Any]]:
        """Yield each note's entities; see `entity_findings`."""
        found, at = [], 0
        for line in lines_with_words(notes):
            found.append(self.entities(predictions[at : at + len(line.tokens)]))
            at += len(line.tokens)
        return entity_findings(notes, found)

    def examples(self, notes: Sequence[Note]) -> int:
        """Return the number of lines that hold a word."""
        return len(lines_with_words(notes))

    def units(self, notes: Sequence[Note]) -> int:
        """Return the number of words."""
        return sum(len(line.tokens) for line in lines_with_words(notes))

    def windows(self, notes: Sequence[Note], encoder: TextEncoder) -> Iterator[Window]:
        """Yield windows of consecutive lines of one note, as many lines as fit; a longer line is split between words.

        A word that alone is longer than a window keeps the tokens that fit. A word that the tokenizer turns into no
        token at all is in no window and counts as outside.
        """
        first_unit = 0
        for note in notes:
            lines = lines_with_words([note])
            packer = _Packer(encoder)
            for sentence, encoded in zip(lines, encoder.encode([line.tokens for line in lines]), strict=True):
                yield from packer.add(encoded, self._targets(sentence), first_unit)
                first_unit += len(sentence.tokens)
            yield from packer.flush()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy over the tokens that bear a label."""
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def decide(self, logits: torch.Tensor) -> Ids:
        """Return the likeliest class of each word."""
        best: Ids = logits.argmax(dim=-1).numpy()
        return best

    def score(self, notes: Sequence[Note], predictions: Ids) -> Scores:
        """Entity-level F1: strict wants span and type right, lenient an overlap and the type.

        Both as nervaluate counts them (`strict` and `ent_type`, after SemEval-2013 task 9.1). `predictions` holds a
        class id for each word of `notes` in reading order.
        """
        lines, found, at = lines_with_words(notes), [], 0
        for line in lines:
            after = at + len(line.tokens)
            found.append(self.entities(predictions[at:after]))
            at = after
        assert at == len(predictions), "one prediction for each word"
        return entity_scores([line.entities for line in lines], found, self.labels)

    def entities(self, classes: Ids) -> tuple[Entity, ...]:
        """Return the entities that the class ids of one line's words spell.

        An I that continues nothing of its label begins an entity, as in the CoNLL scorer.
        """
        label_of = np.where(classes == OUTSIDE, -1, (classes - 1) // 2)
        starts = (classes != OUTSIDE) & (classes % 2 == 1)
        starts[1:] |= label_of[1:] != label_of[:-1]
        starts[:1] = True
        bounds = [*np.flatnonzero(starts).tolist(), len(classes)]
        return tuple(
            Entity(start, end, self.labels[label_of[start]]) for start, end in pairwise(bounds) if label_of[start] >= 0
        )

    def _targets(self, sentence: Sentence) -> Ids:
        """The class id of each word."""
        targets = np.full(len(sentence.tokens), OUTSIDE, dtype=np.int64)
        for entity in sentence.entities:
            targets[entity.start : entity.end] = self._begin[entity.label] + 1
            targets[entity.start] -= 1
        return targets


class _Packer:
    """Fills windows with the lines of one note."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._ids: list[int] = []
        self._spoken: list[tuple[int, int, int]] = []
        """(token, unit, target) of each word in the window."""

    def add(self, line: EncodedLine, targets: Ids, first_unit: int) -> Iterator[Window]:
        """Put a line into the window; yields the windows that this fills."""
        joint = len(self._encoder.line_break) if self._ids else 0
        if len(self._ids) + joint + len(line.ids) > self._encoder.room:
            yield from self.flush()
        elif self._ids:
            self._ids += self._encoder.line_break
        for start, end in _pieces(line, self._encoder.room):
            if len(self._ids) + min(end - start, self._encoder.room) > self._encoder.room:
                yield from self.flush()
            self._put(line, start, end, targets, first_unit)

    def _put(self, line: EncodedLine, start: int, end: int, targets: Ids, first_unit: int) -> None:
        base = len(self._ids)
        kept = line.ids[start:end][: self._encoder.room]
        speakers: dict[int, int] = {}
        for token, owner in enumerate(line.owners[start : start + len(kept)], start=base):
            if owner != NO_WORD and (self._encoder.speaks_last or owner not in speakers):
                speakers[owner] = token
        self._ids += kept
        self._spoken += [(token, first_unit + word, int(targets[word])) for word, token in speakers.items()]

    def flush(self) -> Iterator[Window]:
        """Yield the window begun, if it holds a word, and begin the next."""
        if self._spoken:
            encoder = self._encoder
            ids = np.array([*encoder.start, *self._ids, *encoder.end], dtype=np.int64)
            token, units, classes = np.array(self._spoken, dtype=np.int64).T
            positions = token + len(encoder.start)
            targets = np.full(len(ids), IGNORED, dtype=np.int64)
            targets[positions] = classes
            yield Window(ids, targets, positions, units)
        self._ids, self._spoken = [], []


def _pieces(line: EncodedLine, room: int) -> Iterator[tuple[int, int]]:
    """Token ranges of a line, each of whole words and at most `room` tokens (one longer word stands alone)."""
    starts = [0]
    for token, (before, owner) in enumerate(pairwise(line.owners), start=1):
        if owner not in (before, NO_WORD):
            starts.append(token)
    start, end = 0, 0
    for after in [*starts[1:], len(line.ids)]:
        if after - start > room and end > start:
            yield start, end
            start = end
        end = after
    if end > start:
        yield start, end


def lines_with_words(notes: Sequence[Note]) -> list[Sentence]:
    """Return the lines of all notes that hold a word, in reading order."""
    return [sentence for note in notes for sentence in note.sentences if sentence.tokens]


def read_unmarked(path: Path) -> Iterator[Note | RefusedError]:
    """Yield the texts under `path` as lines of words, without any entity; lines keep their numbers.

    Errors as `read_plain`.
    """
    return (note if isinstance(note, RefusedError) else _lines_of(note) for note in read_plain(path))


def _lines_of(note: TextNote) -> Note:
    lines = note.text.split("\n")
    return Note(note.id, tuple(Sentence(split_words(line.removesuffix("\r")), ()) for line in lines))


def entity_findings(notes: Sequence[Note], found: Sequence[Sequence[Entity]]) -> Iterator[Mapping[str, Any]]:
    """Yield each note's `entities`: line from 1, first word and the one behind the last from 0, and label.

    `found` are the entities of each line with words, over all notes.
    """
    lines = iter(found)
    for note in notes:
        numbered = ((number, next(lines)) for number, line in enumerate(note.sentences, start=1) if line.tokens)
        yield {
            "entities": [
                {"line": number, "start": entity.start, "end": entity.end, "label": entity.label}
                for number, entities in numbered
                for entity in entities
            ]
        }


def entity_scores(true: Sequence[Sequence[Entity]], found: Sequence[Sequence[Entity]], labels: Sequence[str]) -> Scores:
    """Compare the entities found in each line with the true ones; see `NerTask.score`."""
    pairs = [pair for pair in zip(true, found, strict=True) if any(pair)]
    if not pairs:
        return Scores(_both(None), {label: _both(None) for label in labels})
    gold, guess = ([[_spans(entity) for entity in line] for line in lines] for lines in zip(*pairs, strict=True))
    report = Evaluator(gold, guess, tags=list(labels), loader="dict").evaluate()
    return Scores(_both(report["overall"]), {label: _both(report["entities"].get(label)) for label in labels})


def _spans(entity: Entity) -> dict[str, object]:
    """An entity as nervaluate wants it: both ends inclusive."""
    return {"label": entity.label, "start": entity.start, "end": entity.end - 1}


def _both(report: Mapping[str, Any] | None) -> dict[str, float]:
    """The two readings out of nervaluate's report; 0 where it has none."""
    strict, lenient = (float(report[of].f1) if report else 0.0 for of in ("strict", "ent_type"))
    return {"strict_f1": strict, "lenient_f1": lenient}
