from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.masters import master_path
from coordinator.proof import Proof, prove
from coordinator.records import (
    Accepted,
    Dropped,
    Finished,
    Opened,
    Quarantined,
    Record,
    Rejected,
    Released,
    VersionCommitted,
)
from coordinator.trail import Finding
from coordinator.views import JOURNAL
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.manifest import manifest_from_bytes
from shared.messages import Receipt
from tests.audited import SECTIONS, VERSIONS, AuditedRun, Edit, flipped, on, put, restored, spoilt

FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """A synchronous run; each test leaves it as it was."""
    return AuditedRun(tmp_path_factory.mktemp("sync") / "storage", "sync")


def proof_of(run: AuditedRun, **options: Any) -> Proof:
    """What the check says of the run as it lies there now."""
    return prove(run.storage, run.federation, run.plan, **options)


def found(run: AuditedRun, **options: Any) -> list[tuple[str, str]]:
    """Rule and place of each finding."""
    return [(finding.rule, finding.where) for finding in proof_of(run, **options).findings]


@pytest.mark.parametrize("mode", SECTIONS)
def test_nothing_is_wrong_with_a_sound_run(tmp_path: Path, mode: str) -> None:
    """In every mode a run that was left alone has no finding, and all of it was looked at."""
    run = AuditedRun(tmp_path / "storage", mode)
    with Journal.open_read(run.storage / JOURNAL) as journal:
        rows = list(journal.rows())
    shares: list[float] = []
    proof = proof_of(run, progress=shares.append)
    assert proof == Proof(len(rows), rows[-1].hash.hex(), VERSIONS, len(run.accepted), 0, ())
    assert shares[-1] == 1.0


# -- one bit, anywhere ---


FILES = [
    ("updates/{update}.frames", "frame-hash"),
    ("updates/{update}.manifest", "manifest-digest"),
    ("states/{state}.frames", "frame-hash"),
    ("states/{state}.manifest", "manifest-digest"),
    ("masters/v00000000.safetensors", "master-digest"),
    ("masters/v00000002.safetensors", "master-digest"),
    ("masters/v00000003.safetensors", "master-digest"),
    ("masters/v00000003.momentum.safetensors", "slots-digest"),
]


def named(run: AuditedRun, name: str) -> str:
    """A file's name with the id of one of the run's updates or states."""
    state = manifest_from_bytes(run.committed[1].state).transfer_id
    return name.format(update=run.accepted[3].update_id, state=state)


@pytest.mark.parametrize(("name", "rule"), FILES)
@FEW
@given(data=st.data())
def test_one_bit_in_a_file_is_found_and_located(run: AuditedRun, name: str, rule: str, data: st.DataObject) -> None:
    """Whichever bit is turned over, there is one finding, and it names the file and, for frames, the frame."""
    name = named(run, name)
    path = run.storage / name
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    where = name
    if rule == "frame-hash":
        manifest = manifest_from_bytes(path.with_suffix(".manifest").read_bytes())
        ends = [sum(manifest.frame_lengths[: index + 1]) for index in range(manifest.frames)]
        where += f": frame {next(index for index, end in enumerate(ends) if bit // 8 < end)}"
    with spoilt(path, bit):
        assert found(run) == [(rule, where)]


@pytest.mark.parametrize("column", ["body", "prev", "hash"])
@FEW
@given(data=st.data())
def test_one_bit_in_a_row_is_found_and_located(run: AuditedRun, column: str, data: st.DataObject) -> None:
    """Whichever bit of a row is turned over, the first finding names that row."""
    seq = data.draw(st.integers(1, len(run.records)))
    with Journal.open_read(run.storage / JOURNAL) as journal:
        value = getattr(next(journal.rows(after=seq - 1)), column)
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    with run.row_changed(seq, column, flipped(value, bit)):
        findings = proof_of(run).findings
    assert (findings[0].rule, findings[0].where) == ("chain", f"{JOURNAL}: row {seq}")


@pytest.mark.parametrize(("column", "value", "rule"), [("kind", "acceptee", "chain"), ("at", 17.5, "row-columns")])
def test_a_changed_column_is_found_and_located(run: AuditedRun, column: str, value: object, rule: str) -> None:
    """Kind and time of a row are compared too: the one is in the chain, the other also in the body."""
    with run.row_changed(4, column, value):
        assert (rule, f"{JOURNAL}: row 4") in found(run)


@FEW
@given(data=st.data())
def test_one_bit_in_the_database_file_changes_no_row_unseen(run: AuditedRun, data: st.DataObject) -> None:
    """A bit turned over in SQLite's file is found, or every row is still what it was (free space, page counters)."""
    path = run.storage / JOURNAL
    with Journal.open_read(path) as journal:
        before = list(journal.rows())
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    with spoilt(path, bit):
        try:
            findings = proof_of(run).findings
        except RefusedError as error:
            findings = (Finding(error.rule, JOURNAL, error.message),)
        if findings:
            assert findings[0].where.startswith((JOURNAL, "audit.jsonl"))
            return
        with Journal.open_read(path) as journal:
            assert list(journal.rows()) == before


@FEW
@given(data=st.data())
def test_one_bit_in_the_audit_trail_is_found_and_located(run: AuditedRun, data: st.DataObject) -> None:
    """The first finding names the line; a bit that makes or ends a line shifts those behind it."""
    path = run.storage / "audit.jsonl"
    text = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    with spoilt(path, bit):
        assert found(run)[0] == ("audit-line", f"audit.jsonl: line {text[: bit // 8].count(10) + 1}")


def test_a_damaged_database_is_a_finding(tmp_path: Path) -> None:
    """What SQLite cannot read at all is named, and what follows from it is not."""
    run = AuditedRun(tmp_path / "storage", "fedasync")
    (run.storage / JOURNAL).write_bytes(b"no database at all" * 100)
    assert found(run) == [("journal-unreadable", JOURNAL)]


def leads_back(path: Path) -> bool:
    """Whether the row that SQLite finds behind some row is not behind it, which the journal refuses to follow."""
    after = 0
    try:
        with Journal.open_read(path) as journal:
            while (row := next(journal.rows(after, limit=1), None)) is not None:
                after = row.seq
    except CorruptError as error:
        return "comes again" in error.message
    return False


def test_a_damaged_row_number_does_not_lead_in_circles(run: AuditedRun) -> None:
    """One bit in SQLite's own number of a row can make row 1 follow row 6 for ever; the check ends and says so."""
    path = run.storage / JOURNAL
    with Journal.open_read(path) as journal:
        begin = path.read_bytes().index(next(journal.rows(after=5)).body)
    for bit in reversed(range(8 * (begin - 60), 8 * begin)):  # the number stands shortly before the columns
        with spoilt(path, bit):
            if leads_back(path):
                assert [finding for finding in proof_of(run).findings if "comes again" in finding.what]
                return
    pytest.fail("no bit leads back")


# -- files that are not what they were ---


def test_everything_is_listed(run: AuditedRun) -> None:
    """Two damaged frames and a damaged master are three findings, not one."""
    name = named(run, "updates/{update}.frames")
    first = manifest_from_bytes((run.storage / name).with_suffix(".manifest").read_bytes()).frame_lengths[0]
    with (
        spoilt(run.storage / name, 800),
        spoilt(run.storage / name, 8 * first + 800),
        spoilt(master_path(run.storage / "masters", 0), 9000),
    ):
        assert {where for _, where in found(run)} == {
            f"{name}: frame 0",
            f"{name}: frame 1",
            "masters/v00000000.safetensors",
        }


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("updates/{update}.frames", "frames-gone"),
        ("updates/{update}.manifest", "transfer-gone"),
        ("states/{state}.manifest", "transfer-gone"),
        ("masters/v00000000.safetensors", "master-gone"),
        ("masters/v00000003.momentum.safetensors", "slots-gone"),
        ("audit.jsonl", "audit-gone"),
    ],
)
def test_a_file_that_is_gone_is_a_finding(run: AuditedRun, name: str, rule: str) -> None:
    """Each file that the journal needs is asked for by name."""
    path = run.storage / named(run, name)
    with restored(path):
        path.unlink()
        assert found(run) == [(rule, named(run, name))]


def test_bytes_behind_the_frames_are_a_finding(run: AuditedRun) -> None:
    """Frames that are whole and followed by something else are not what arrived."""
    name = named(run, "updates/{update}.frames")
    path = run.storage / name
    with restored(path):
        path.write_bytes(path.read_bytes() + b"more")
        assert found(run) == [("frames-size", name)]


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda lines: lines[:-1], "audit-short"),
        (lambda lines: [*lines, b'{"seq":99}\n'], "audit-line"),
        (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], "audit-line"),
    ],
)
def test_the_audit_trail_has_a_line_for_each_row(
    run: AuditedRun, edit: Callable[[list[bytes]], list[bytes]], rule: str
) -> None:
    """A line that is missing, added or out of place is a finding."""
    path = run.storage / "audit.jsonl"
    with restored(path):
        path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
        assert {name for name, _ in found(run)} == {rule}


# -- a journal that was written anew, with a sound chain ---


def part(**fields: Any) -> Callable[[VersionCommitted], Sequence[Record]]:
    """Other values for some fields of a version's second contribution."""

    def change(record: VersionCommitted) -> Sequence[Record]:
        parts = list(record.contributions)
        parts[1] = dataclasses.replace(parts[1], **fields)
        return [dataclasses.replace(record, contributions=tuple(parts))]

    return change


FORGERIES: dict[str, tuple[Callable[[], Edit], str]] = {
    "opened twice": (on(Opened, lambda record: [record, record]), "opened-once"),
    "never opened": (on(Opened, lambda _record: []), "opened-once"),
    "another plan": (on(Opened, put(fingerprint="ab" * 32)), "other-plan"),
    "another version 0": (on(Opened, put(master_digest="ab" * 32)), "master-digest"),
    "accepted twice": (on(Accepted, lambda record: [record, record]), "decided-twice"),
    "rejected twice": (on(Rejected, lambda record: [record, record]), "decided-twice"),
    "never accepted": (on(Accepted, lambda _record: [], nth=2), "unknown-update"),
    "from the future": (on(Accepted, put(base_version=7)), "base-unknown"),
    "no examples": (on(Accepted, put(examples=0)), "no-examples"),
    "more examples": (on(Accepted, put(examples=4242)), "update-facts"),
    "another norm": (on(Accepted, put(norm=1e-3)), "update-norm"),
    "another manifest": (on(Accepted, put(manifest_sha256="ab" * 32)), "manifest-digest"),
    "another site": (on(Accepted, put(site="other")), "other-site"),
    "another weight": (on(VersionCommitted, part(weight=0.125), nth=1), "contribution"),
    "fresher than it was": (on(VersionCommitted, part(staleness=2), nth=1), "contribution"),
    "counted once more": (on(VersionCommitted, lambda record: [record, *put(version=2)(record)]), "counted-twice"),
    "another order": (
        on(VersionCommitted, lambda record: put(contributions=record.contributions[::-1])(record)),
        "merge-order",
    ),
    "nobody's version": (on(VersionCommitted, put(contributions=())), "round-size"),
    "a version missing": (on(VersionCommitted, lambda _record: [], nth=1), "version-gap"),
    "another state": (
        on(
            VersionCommitted,
            lambda record: put(state=manifest_from_bytes(record.state).model_copy(update={"codec": "f32"}).to_bytes())(
                record
            ),
        ),
        "state-manifest",
    ),
    "another state's manifest": (
        on(
            VersionCommitted,
            lambda record: put(state=manifest_from_bytes(record.state).model_copy(update={"created": 77.0}).to_bytes())(
                record
            ),
        ),
        "manifest-digest",
    ),
    "no slots": (on(VersionCommitted, put(optimizer_digest=None), nth=2), "slots-digest"),
    "another master": (on(VersionCommitted, put(master_digest="ab" * 32), nth=2), "master-digest"),
    "dropped twice": (on(Dropped, lambda record: [record, record]), "not-pending"),
    "left waiting": (on(Dropped, lambda _record: [Finished(VERSIONS, 9.0)]), "left-pending"),
    "ended early": (on(Dropped, lambda record: [record, Finished(VERSIONS, 9.0)]), "last-version"),
    "past the end": (on(Accepted, lambda record: [Finished(0, 1.0), record]), "after-the-end"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_what_cannot_have_happened_is_found_under_a_sound_chain(run: AuditedRun, kind: str) -> None:
    """Each forgery is found by its own rule, without help from the hash chain."""
    begin, rule = FORGERIES[kind]
    with run.forged(begin()):
        rules = {name for name, _ in found(run)}
    assert rule in rules
    assert "chain" not in rules


def test_the_weight_finding_says_both_numbers(run: AuditedRun) -> None:
    """Recorded and right weight stand side by side, with row and update."""
    right = run.committed[1].contributions[1]
    with run.forged(on(VersionCommitted, part(weight=0.125), nth=1)()):
        (finding,) = proof_of(run).findings
    assert finding.where == f"{JOURNAL}: row {run.records.index(run.committed[1]) + 1}"
    assert finding.what == f"update {right.update_id} has weight 0.125, the rules give {right.weight}"


def test_a_body_that_is_no_record_is_a_finding(run: AuditedRun) -> None:
    """Bytes that are not a record are named; the rows behind them are still read."""
    with run.row_changed(5, "body", b"\xc1"):
        findings = found(run)
    assert ("row-content", f"{JOURNAL}: row 5") in findings
    assert not [where for _, where in findings if where == f"{JOURNAL}: row 4"]


def test_a_row_with_a_manifest_that_is_none_is_a_finding(run: AuditedRun) -> None:
    """A state's manifest that does not parse is told with its row, and everything else is still looked at."""
    seq = run.records.index(run.committed[1]) + 1
    with run.forged(on(VersionCommitted, put(state=b"\xc1"), nth=1)()), spoilt(run.storage / "audit.jsonl", 0):
        findings = found(run)
    assert ("state-manifest", f"{JOURNAL}: row {seq}") in findings
    assert ("audit-line", "audit.jsonl: line 1") in findings


# -- what the sites hold ---


@pytest.fixture
def receipts(run: AuditedRun, tmp_path: Path) -> Iterator[Path]:
    """The receipts that a site got for every update of the run, in a folder of their own."""
    ledger = Ledger()
    for record in run.records:
        ledger.apply(record)
    folder = tmp_path / "site-1" / "receipts"
    folder.mkdir(parents=True)
    for accepted in run.accepted:
        write_receipt(folder, run, accepted, ledger.receipt(accepted.update_id))
    yield folder
    shutil.rmtree(folder)


def write_receipt(folder: Path, run: AuditedRun, accepted: Accepted, receipt: Receipt) -> Path:
    """Keep a receipt as a site does."""
    base = run.records[0] if accepted.base_version == 0 else run.committed[accepted.base_version - 1]
    assert isinstance(base, Opened | VersionCommitted)
    origin = {
        "base_version": accepted.base_version,
        "base_digest": manifest_from_bytes(base.state).file_digest,
    }
    path = folder / f"{receipt.update_id}.json"
    path.write_text(json.dumps({**origin, **receipt.model_dump(mode="json")}))
    return path


def test_receipts_agree_with_the_journal(run: AuditedRun, receipts: Path) -> None:
    """Final receipts agree, and so does one from before the update was merged."""
    first = run.accepted[0]
    early = Receipt(update_id=first.update_id, manifest_sha256=first.manifest_sha256, outcome="accepted")
    write_receipt(receipts, run, first, early)
    proof = proof_of(run, receipts=[receipts])
    assert (proof.receipts, proof.findings) == (len(run.accepted), ())


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.125},
        {"version": 3},
        {"outcome": "rejected"},
        {"outcome": "dropped", "rule": "run-complete"},
        {"manifest_sha256": "ab" * 32},
        {"base_digest": "ab" * 32},
        {"base_version": 2},
    ],
    ids=str,
)
def test_a_receipt_that_says_otherwise_is_a_finding(run: AuditedRun, receipts: Path, change: dict[str, Any]) -> None:
    """Whatever a site was told otherwise than the journal says is found in that receipt."""
    path = receipts / f"{run.accepted[0].update_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    findings = found(run, receipts=[receipts])
    assert set(findings) == {("receipt-differs", f"site-1/receipts/{path.name}")}


def test_a_receipted_update_that_the_journal_forgot_is_a_finding(run: AuditedRun, receipts: Path) -> None:
    """A coordinator that rewrites its journal without an update is given away by the site's receipt."""
    spare = run.accepted[-1]

    def forget(record: Record) -> Sequence[Record]:
        about = isinstance(record, Accepted | Dropped) and record.update_id == spare.update_id
        return [] if about else [record]

    with run.forged(forget):
        assert found(run) == []
        expected = ("receipt-unknown-update", f"site-1/receipts/{spare.update_id}.json")
        assert found(run, receipts=[receipts]) == [expected]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"base_version": 0, "base_digest": "", "weight": -1}', "[" * 100_000, '{"a": ' * 5000]
)
def test_a_receipt_that_cannot_be_read_is_a_finding(run: AuditedRun, tmp_path: Path, text: str) -> None:
    """A file that is no receipt is named."""
    (tmp_path / f"{'ab' * 16}.json").write_text(text)
    ((rule, where),) = found(run, receipts=[tmp_path])
    assert rule == "receipt-unreadable"
    assert where.endswith(f"{'ab' * 16}.json")


def test_a_second_manifest_under_one_id_leaves_a_receipt_of_its_own(run: AuditedRun, receipts: Path) -> None:
    """The rejection id-reused is told and not journalled, so its receipt is no finding."""
    first = run.accepted[0]
    told = Receipt(update_id=first.update_id, manifest_sha256="ab" * 32, outcome="rejected", rule="id-reused")
    write_receipt(receipts, run, first, told)
    assert found(run, receipts=[receipts]) == []


def test_the_folders_are_asked_for(run: AuditedRun, tmp_path: Path) -> None:
    """Without a journal, or without the receipts folder that was named, the command line is wrong."""
    with pytest.raises(ConfigError, match="not a folder"):
        proof_of(run, receipts=[tmp_path / "none"])
    with pytest.raises(ConfigError, match="no journal"):
        prove(tmp_path, run.federation, run.plan)


# -- quarantine ---


def _apart(*, released: bool) -> Edit:
    """The spare update was kept apart, and perhaps released, before it was dropped."""

    def edit(record: Record) -> Sequence[Record]:
        if not (isinstance(record, Accepted) and record.site == "spare"):
            return [record]
        held = Quarantined(record.update_id, "norm-max", "its norm is 9", record.at)
        return [record, held, *([Released(record.update_id, record.at)] if released else [])]

    return edit


@pytest.mark.parametrize("released", [True, False])
def test_an_update_may_be_kept_apart(run: AuditedRun, released: bool) -> None:
    """Quarantined, and released or not, before it was dropped: nothing is wrong."""
    with run.forged(_apart(released=released)):
        assert found(run) == []


def test_a_quarantine_that_follows_from_nothing_is_found(run: AuditedRun) -> None:
    """Of an update that was merged already, and a release of what was not kept apart."""
    merged = run.accepted[0].update_id
    forged: list[Record] = [Quarantined(merged, "norm-max", "", 9.0), Released(merged, 9.0)]
    with run.forged(lambda record: [*forged, record] if isinstance(record, Dropped) else [record]):
        assert [rule for rule, _ in found(run)] == ["not-pending", "not-quarantined"]
