"""Generative extraction of relations: prompt and answer, answers read back, scores, and a tiny model that writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.data import Entity, HeadedLine, HeadedNote, Sentence, load_notes
from edge_client.model import load_model, read_trainable
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.relations import RelationsTask
from edge_client.trainer import evaluate, make_dataset, mean_loss, train
from shared.config import FederationConfig
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

LABELS = ("present", "absent", "TrAP")
TASK = RelationsTask(LABELS)
WORDS = ("aspirin", "for", "Chest", "pain", ",", "no", "fever")
ASPIRIN, PAIN, FEVER = Entity(0, 1, "treatment"), Entity(2, 4, "problem"), Entity(6, 7, "problem")


def headed(head: Entity, *said: Entity, line: int = 3) -> HeadedLine:
    """The line as seen from one of its entities."""
    return HeadedLine(line, head, Sentence(WORDS, said))


NOTE = HeadedNote(
    "n",
    (
        headed(ASPIRIN, Entity(2, 4, "TrAP")),
        headed(PAIN, Entity(2, 4, "present")),
        headed(FEVER, Entity(6, 7, "absent")),
        headed(Entity(4, 5, "sign"), line=7),
    ),
)
ANSWERS = (
    'aspirin for <span class="TrAP">Chest pain</span> , no fever',
    'aspirin for <span class="present">Chest pain</span> , no fever',
    'aspirin for Chest pain , no <span class="absent">fever</span>',
    "aspirin for Chest pain , no fever",
)


def written(*answers: str) -> np.ndarray:
    """What a model wrote, as the trainer hands it over."""
    return TASK.decide(answers)


def federation() -> FederationConfig:
    """A tiny federation of this task."""
    return tiny.federation(
        task={"kind": "relations", "labels": ["PIP", "present"], "max_length": 400}, layers={"plan": "all"}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA that reads long prompts, and writes with its own embeddings."""
    torch.set_num_threads(1)
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    longer = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**config, **longer}))
    return folder


def test_the_prompt_marks_the_head() -> None:
    """Written by hand: the labels, and the line with the head in a span; what is said of it is not told."""
    assert TASK.prompt(NOTE.heads[1]) == (
        'Mark the entity and what it relates to, each as <span class="LABEL">words</span> if one of present, absent, '
        "TrAP holds, and change nothing else.\n"
        'Text: aspirin for <span class="entity">Chest pain</span> , no fever\n'
        "Marked: "
    )


def test_a_line_is_asked_about_for_each_head(folder: Path) -> None:
    """Each prompt is answered by the line with what is said of its head, which is nothing of the last."""
    tokenizer = load_model(folder, federation()).tokenizer
    windows = list(TASK.windows([NOTE, NOTE], TextEncoder(tokenizer, max_length=400, speaks_last=True)))
    assert [int(window.units[0]) for window in windows] == list(range(8))
    assert TASK.units([NOTE, NOTE]) == TASK.examples([NOTE, NOTE]) == 8
    for window, headed, answer in zip(windows[4:], NOTE.heads, ANSWERS, strict=True):
        begin = int(window.positions[0])
        assert tokenizer.decode(window.ids[:begin].tolist()) == TASK.prompt(headed)
        assert tokenizer.decode(window.ids[begin:-1].tolist()) == answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (ANSWERS[0], [(2, 4, "TrAP")]),
        ("", []),
        ("TrAP", []),
        ('<span class="entity">aspirin</span> for Chest pain', []),
        ("Sure : aspirin for <span class=TrAP>chest pain , no fever", [(2, 7, "TrAP")]),
        (
            '<span class="present">aspirin</span> for <span class="TrAP">Chest pain</span>\n<span class="TrAP">no',
            [(0, 1, "present"), (2, 4, "TrAP")],
        ),
        ('<span class="TrAP"><span class="absent">fever</span></span>', [(6, 7, "absent")]),
    ],
)
def test_whatever_is_written_is_read(answer: str, found: list[tuple[int, int, str]]) -> None:
    """By line, head, words and label, and never by the words themselves; nonsense is no error."""
    (said,) = TASK.findings([HeadedNote("n", NOTE.heads[:1])], written(answer))
    assert said == {
        "relations": [
            {"line": 3, "head": {"start": 0, "end": 1}, "start": start, "end": end, "label": label}
            for start, end, label in found
        ]
    }


def test_findings_are_those_of_their_notes() -> None:
    """A note without entities has none, and moves nobody else's."""
    none = HeadedNote("m", ())
    first, second, third = TASK.findings([none, NOTE, none], written(*ANSWERS))
    assert first == third == {"relations": []}
    assert [(each["head"]["start"], each["label"]) for each in second["relations"]] == [
        (0, "TrAP"),
        (2, "present"),
        (6, "absent"),
    ]


def test_scores_by_hand() -> None:
    """Of three told, one is found as it is, one a word short, one not at all, and one is told that is not.

    Strict: 1 right of 3 found and 3 told, F1 = 1/3. Lenient: 2 of 3 and 3, F1 = 2/3. TrAP alone: 1 of 2 found and 1
    told, F1 = 2/3. `present` alone: found a word short, so 0 and 1.
    """
    short = 'aspirin for <span class="present">Chest</span> pain , no fever'
    made_up = 'aspirin for Chest pain , no <span class="TrAP">fever</span>'
    scores = TASK.score([NOTE], written(ANSWERS[0], short, ANSWERS[3], made_up))
    assert scores.overall == pytest.approx({"strict_f1": 1 / 3, "lenient_f1": 2 / 3})
    assert scores.main == scores.overall["strict_f1"]
    assert scores.labels["TrAP"]["strict_f1"] == pytest.approx(2 / 3)
    assert scores.labels["present"] == {"strict_f1": 0.0, "lenient_f1": 1.0}
    assert scores.labels["absent"] == {"strict_f1": 0.0, "lenient_f1": 0.0}
    assert TASK.score([NOTE], written(*ANSWERS)).overall == {"strict_f1": 1.0, "lenient_f1": 1.0}


def test_what_is_marked_for_another_head_is_wrong() -> None:
    """The same words and label at another head's line count for nothing; a unit without an answer marks nothing."""
    answers = written(ANSWERS[1], ANSWERS[0], *ANSWERS[2:])
    assert TASK.score([NOTE], answers).overall == pytest.approx({"strict_f1": 1 / 3, "lenient_f1": 1 / 3})
    assert TASK.score([NOTE], np.zeros(4, dtype=object)).main == 0.0


def test_it_learns_what_is_said(folder: Path, tmp_path: Path) -> None:
    """A model that has been trained on a folder's few lines says of each entity what the folder says."""
    notes = load_notes(
        tiny.write_relations(tmp_path / "notes", tiny.notes(1, lines=1)), RelationsTask(("PIP", "present"))
    ).notes
    loaded = load_model(folder, federation())
    data = make_dataset(loaded, notes, batch_size=4, seed=0)
    before = mean_loss(loaded, data)
    assert evaluate(loaded, data).main == 0.0
    section = federation().training.model_copy(update={"epochs": 150, "lr": 1e-2})
    result = train(loaded, read_trainable(loaded), data, section, seed=1)
    assert result.examples == len(notes[0].heads)
    assert mean_loss(loaded, data) < before / 10
    assert evaluate(loaded, data).overall == {"strict_f1": 1.0, "lenient_f1": 1.0}, result.metrics
