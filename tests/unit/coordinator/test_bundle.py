from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import bundle_verify
from coordinator.bundle import SCRIPT, export_bundle
from coordinator.journal import Journal
from coordinator.records import Record, VersionCommitted
from coordinator.views import JOURNAL
from shared.errors import ConfigError, CorruptError
from shared.manifest import manifest_from_bytes
from shared.slices import compress_slice
from tests.audited import VERSIONS, AuditedRun, restored, spoilt

FEW = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """A synchronous run."""
    return AuditedRun(tmp_path_factory.mktemp("sync") / "storage", "sync")


@pytest.fixture(scope="module")
def unpacked(run: AuditedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, unpacked."""
    return unpack(run, tmp_path_factory.mktemp("bundle"))


def unpack(run: AuditedRun, folder: Path, *, upto: int | None = None) -> Path:
    """Export into `folder`, unpack there and return the bundle's own folder."""
    export_bundle(run.storage, run.federation, run.plan, folder / "run.tar", upto=upto)
    with tarfile.open(folder / "run.tar") as tar:
        tar.extractall(folder / "out", filter="data")
    (inner,) = (folder / "out").iterdir()
    return inner


def checked(folder: Path) -> list[str]:
    """What the script finds."""
    return list(bundle_verify.check(folder))


def test_the_script_alone_finds_nothing_wrong(unpacked: Path) -> None:
    """In a process that sees nothing of this project the bundle's own script ends with status 0."""
    command = [sys.executable, "-I", str(unpacked / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing is wrong\n")
    assert len(SCRIPT.read_text().splitlines()) <= 350


def test_the_script_needs_little() -> None:
    """Besides the standard library it imports msgpack, zstandard and blake3; what else, only where a run is sealed."""
    modules = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith(("import ", "from "))}
    assert modules - sys.stdlib_module_names - {"collections.abc", "__future__"} == {"blake3", "msgpack", "zstandard"}


def test_the_same_run_gives_the_same_bytes(run: AuditedRun, tmp_path: Path) -> None:
    """Two exports are one file twice: sorted, without dates and owners; and other tools read its sums."""
    first, second = (
        export_bundle(run.storage, run.federation, run.plan, tmp_path / name) for name in ("a.tar", "b.tar")
    )
    assert first == second
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        entries = tar.getmembers()
        tar.extractall(tmp_path, filter="data")
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in entries} == {(0, 0, 0, "", 0o644)}
    tool = shutil.which("sha256sum")
    assert tool is not None
    inner = tmp_path / f"north-v{VERSIONS:08d}"
    subprocess.run([tool, "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=inner, check=True)


def test_no_machine_is_told(unpacked: Path) -> None:
    """Where the base model lies on this machine is in no file."""
    assert not [path for path in unpacked.rglob("*") if path.is_file() and b"/models/base" in path.read_bytes()]


def test_a_bundle_up_to_a_version(run: AuditedRun, tmp_path: Path) -> None:
    """It ends with the row of that version, holds the updates merged by then alone, and is sound."""
    inner = unpack(run, tmp_path, upto=1)
    end = run.records.index(run.committed[0]) + 1
    assert len((inner / "journal.jsonl").read_text().splitlines()) == end
    merged = {part.update_id for part in run.committed[0].contributions}
    assert {path.stem for path in (inner / "updates").iterdir()} == merged
    assert checked(inner) == []
    with pytest.raises(ConfigError, match="there is no version 9"):
        export_bundle(run.storage, run.federation, run.plan, tmp_path / "none.tar", upto=9)
    assert not (tmp_path / "none.tar").exists()


def test_nothing_is_overwritten(run: AuditedRun, tmp_path: Path) -> None:
    """A file that is there stays; without one of its parts no bundle appears."""
    (tmp_path / "run.tar").write_text("precious")
    with pytest.raises(ConfigError, match="already there"):
        export_bundle(run.storage, run.federation, run.plan, tmp_path / "run.tar")
    assert (tmp_path / "run.tar").read_text() == "precious"
    path = run.storage / "updates" / f"{run.accepted[0].update_id}.frames"
    with restored(path):
        path.unlink()
        with pytest.raises(CorruptError, match="is gone"):
            export_bundle(run.storage, run.federation, run.plan, tmp_path / "other.tar")
    assert [each.name for each in tmp_path.iterdir()] == ["run.tar"]


NAMES = ["SHA256SUMS", "federation.json", "journal.jsonl", "masters/v00000000.safetensors", "plan.json", "verify.py"]


@pytest.mark.parametrize("name", [*NAMES, "updates/{}.frames", "updates/{}.manifest"])
@FEW
@given(data=st.data())
def test_one_bit_in_any_file_is_found(run: AuditedRun, unpacked: Path, name: str, data: st.DataObject) -> None:
    """Whichever bit of the bundle is turned over, the status is 3 and the file is named, by the sums already."""
    path = unpacked / name.format(run.accepted[1].update_id)
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    with spoilt(path, bit):
        assert bundle_verify.main(unpacked) == 3


@pytest.mark.parametrize("name", ["masters/v00000000.safetensors", "updates/{}.frames", "updates/{}.manifest"])
@FEW
@given(data=st.data())
def test_one_bit_is_located_when_the_sums_were_made_anew(
    run: AuditedRun, unpacked: Path, name: str, data: st.DataObject
) -> None:
    """One who changes the sums as well is caught by the journal, which names the file."""
    name = name.format(run.accepted[1].update_id)
    path = unpacked / name
    before = bundle_verify.file_sha256(path)
    with (
        spoilt(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1))),
        restored(unpacked / "SHA256SUMS"),
    ):
        sums = (unpacked / "SHA256SUMS").read_text()
        (unpacked / "SHA256SUMS").write_text(sums.replace(before, bundle_verify.file_sha256(path)))
        findings = checked(unpacked)
    assert len(findings) == 1
    assert findings[0].startswith(name)


def test_an_update_that_counts_twice_is_found(run: AuditedRun, tmp_path: Path) -> None:
    """A sound chain over what cannot be is named by the script too."""
    twice = run.committed[0]

    def again(record: object) -> list[object]:
        return [record, record] if isinstance(record, VersionCommitted) and record == twice else [record]

    with run.forged(again):  # type: ignore[arg-type]
        findings = checked(unpack(run, tmp_path))
    assert [text for text in findings if "has counted already" in text]
    assert [text for text in findings if "version 1 follows version 1" in text]


def test_steps_are_followed_by_the_script_alone(tmp_path: Path) -> None:
    """From state to state by their digests, and each update to the state that it starts from."""
    run = AuditedRun(tmp_path / "storage", "fedasync, steps")
    assert checked(unpack(run, tmp_path / "sound")) == []

    def other_state(record: Record) -> list[Record]:
        """The step to version 1 says that it makes another state."""
        if record != run.committed[0]:
            return [record]
        manifest = manifest_from_bytes(run.committed[0].state)
        facts = manifest.facts.model_copy(update={"state_digest": "ab" * 32})
        state = manifest.model_copy(update={"facts": facts}).to_bytes()
        return [dataclasses.replace(run.committed[0], state=state)]

    with run.forged(other_state):
        findings = checked(unpack(run, tmp_path / "forged"))
    row = run.records.index(run.committed[1]) + 1
    assert f"journal.jsonl: row {row}: its step does not start from the state of the version before" in findings
    late = [each.update_id for each in run.accepted if each.base_version == 1]
    assert late
    for update_id in late:
        assert f"updates/{update_id}.manifest: it starts from a state that was never published" in findings


def test_a_broken_chain_is_not_exported(run: AuditedRun, tmp_path: Path) -> None:
    """The journal is what the bundle stands on, so its chain is checked first."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        body = next(journal.rows(after=2)).body
    with run.row_changed(3, "body", body + b"\0"), pytest.raises(CorruptError, match="row 3 was changed"):
        export_bundle(run.storage, run.federation, run.plan, tmp_path / "run.tar")


@pytest.mark.parametrize(("size", "group"), [(4096, 0), (4096, 3), (4096, 2**62), (0, 1), (-1, 2), (2**40, 1)])
def test_a_slice_that_cannot_be_is_refused_before_it_is_undone(size: int, group: int) -> None:
    """Whoever hands over a bundle chooses these numbers: none of them divides by zero, or takes for ever."""
    frame = compress_slice(bytes(4096), 1)
    with pytest.raises(ValueError, match="size or grouping"):
        bundle_verify.expand(frame, size, group)
