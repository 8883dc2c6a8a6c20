"""What tasks have in common in which the model writes a line of words once more, with spans of them marked.

As in Fed-MedLoRA (arXiv 2601.22124): instruction and line are the prompt, the marked line is the answer, the loss is on
the answer alone, and an answer is written greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from edge_client.data import Entity, Sentence
from edge_client.tasks import IGNORED, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.markup import read_markup, write_markup
from shared.errors import ConfigError


def written_windows(prompts: Sequence[str], answers: Sequence[Sentence], encoder: TextEncoder) -> Iterator[Window]:
    """Yield one window for each prompt and the marked line that answers it; unit i is prompt i.

    `positions` is where the answer begins. The target of a token is the token that follows it, IGNORED before the
    answer. An answer that does not fit is learnt as far as it does; a prompt that alone fills the window is in none.

    Raises ConfigError when the tokenizer has nothing to end an answer with.
    """
    if encoder.stop is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token, and a written answer must end",
            hint="give tokenizer_config.json an eos_token, or choose another task",
        )
    asked = encoder.encode_texts(prompts)
    told = encoder.encode_texts([write_markup(answer) for answer in answers])
    room = encoder.room + len(encoder.end) + len(encoder.start)
    for unit, (prompt, answer) in enumerate(zip(asked, told, strict=True)):
        begin = len(encoder.start) + len(prompt)
        ids = np.array([*encoder.start, *prompt, *answer, encoder.stop][:room], dtype=np.int64)
        if len(ids) > begin:
            targets = np.full(len(ids), IGNORED, dtype=np.int64)
            targets[begin - 1 : -1] = ids[begin:]
            yield Window(ids, targets, np.array([begin], dtype=np.int64), np.array([unit], dtype=np.int64))


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over the tokens of the answers."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def as_written(outputs: Sequence[str]) -> npt.NDArray[Any]:
    """Return the answers as they are: what they mark is read beside their lines."""
    return np.array(outputs, dtype=object)


def read_answers(
    lines: Sequence[Sentence], predictions: npt.NDArray[Any], labels: Sequence[str]
) -> list[tuple[Entity, ...]]:
    """Return what the answers mark in their lines; a line without an answer has nothing marked."""
    return [read_markup(answer or "", line.tokens, labels) for line, answer in zip(lines, predictions, strict=True)]
