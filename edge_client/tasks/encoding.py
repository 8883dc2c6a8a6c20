"""Words of a line into token ids, whatever the tokenizer, and which token speaks for which word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NO_WORD = -1
"""Owner of a token that belongs to no word, such as a separator."""

TEXTS_AT_ONCE = 256
"""Whole notes tokenized in one call: enough for the tokenizer's threads, little enough for the memory."""


@dataclass(frozen=True, slots=True)
class EncodedLine:
    """Token ids of one line, and for each token the word (counted from 0) that it belongs to, or NO_WORD."""

    ids: tuple[int, ...]
    owners: tuple[int, ...]


class TextEncoder:
    """A fast tokenizer, a window's length in tokens, and which token of a word speaks for it.

    Words are joined by single blanks and tokenized as running text, as in pre-training; a token then belongs to the
    word that its last character lies in. That holds for WordPiece, byte-level BPE and SentencePiece alike, where
    feeding words one by one would lose the leading blank with some.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, speaks_last: bool) -> None:
        self._tokenizer = tokenizer
        self.speaks_last = speaks_last
        """A causal model has read a word only at the word's last token; others are used to the first."""
        self.stop: int | None = tokenizer.eos_token_id
        """Id of the token that ends a written answer."""
        self.start, self.end = _specials(tokenizer)
        """Ids that stand before and after each window, such as [CLS] and [SEP]."""
        self.line_break: tuple[int, ...] = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
        """Ids of a line break between two lines; none where the tokenizer drops white space."""
        self.room = max_length - len(self.start) - len(self.end)
        """Tokens of text that one window holds."""

    def encode(self, lines: Sequence[Sequence[str]]) -> list[EncodedLine]:
        """Return the tokens of each line of words."""
        texts = [" ".join(words) for words in lines]
        if not texts:
            return []
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            EncodedLine(tuple(ids), _owners(words, offsets))
            for words, ids, offsets in zip(lines, batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def encode_texts(self, texts: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Yield the token ids of each text as it stands, however many; line breaks are part of it."""
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = self._tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), add_special_tokens=False, verbose=False)
            yield from (tuple(ids) for ids in batch["input_ids"])


def _owners(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The word of each token, by the token's last character; offsets count characters of the joined text."""
    at: list[int] = []
    for index, word in enumerate(words):
        at += [index] * len(word)
        at.append(NO_WORD)
    return tuple(at[end - 1] if end > start else NO_WORD for start, end in offsets)


def _specials(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after a text of its own accord."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    inside = [index for index, special in enumerate(mask) if not special]
    if not inside:
        return tuple(ids), ()
    return tuple(ids[: inside[0]]), tuple(ids[inside[-1] + 1 :])
