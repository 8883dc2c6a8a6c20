"""The command line in real processes: what it refuses and how, how it stops, and what it tells about a run."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.commands import call, refused, running
from tests.toys import write_toy

pytestmark = pytest.mark.integration

NOWHERE = "mqtt://127.0.0.1:9"
"""The discard port, on which nobody listens."""


@pytest.fixture
def toy(tmp_path: Path, mosquitto_url: str) -> Path:
    """The files of a federation of two toy sites that makes three versions."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=3, parameters=2_000, quorum=2)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# -- refusals ---


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Without a configuration file the command names it and says how to make one."""
    said = refused(tmp_path, "coordinator", "run", status=2)
    assert said.startswith("error: coordinator.toml: no such file\n hint: `mailboat init DIR`")


def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path: Path) -> None:
    """A configuration that does not parse is named with the place where it stops."""
    (tmp_path / "site.toml").write_text('name = "a"\nfederation = \n')
    assert "site.toml: not TOML: Invalid value (at line 2" in refused(tmp_path, "site", "run", status=2)


def test_an_unknown_key_comes_with_the_nearest_right_one(toy: Path) -> None:
    """A misspelt key is named with its section, and the key that was probably meant."""
    edit(toy / "coordinator.toml", "stall_s", "stal_s")
    said = refused(toy, "coordinator", "run", status=2)
    assert "coordinator.toml: unknown key link.stal_s: did you mean stall_s?" in said


def test_a_plan_of_another_federation_is_refused(toy: Path) -> None:
    """A federation changed after it was sealed does not silently go on under the old plan."""
    edit(toy / "federation.toml", "versions = 3", "versions = 4")
    assert "plan.json was sealed from another federation.toml" in refused(toy, "coordinator", "run", status=2)


def test_a_broker_that_is_away_is_said_and_given_up_on(tmp_path: Path) -> None:
    """While the broker cannot be reached the coordinator says so, and ends with 4 when told to give up."""
    write_toy(tmp_path, NOWHERE, sites=1, versions=1)
    done = call(tmp_path, "coordinator", "run", "--give-up-s", "1")
    assert done.returncode == 4
    assert "broker not reachable at 127.0.0.1:9, retrying" in done.stderr
    assert "error: broker not reachable at 127.0.0.1:9 within 1 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_limit_the_coordinator_waits_for_the_broker(tmp_path: Path) -> None:
    """By default an absent broker is no error: the coordinator says so, goes on trying, and stops when told."""
    write_toy(tmp_path, NOWHERE, sites=1, versions=1)
    with running(tmp_path, "coordinator", "run") as coordinator:
        coordinator.wait_for("broker not reachable at 127.0.0.1:9, retrying")
        assert coordinator.end(signal.SIGTERM) == 0


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """A broker cannot take a port that somebody has."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(tmp_path, "broker", "run", "--port", str(port), status=4)
    assert f"port {port} on 127.0.0.1 is in use" in said


def test_two_coordinators_in_one_folder_are_refused(toy: Path) -> None:
    """The second coordinator on the same storage ends with 4 and the first is not disturbed."""
    with running(toy, "coordinator", "run") as first:
        first.wait_for("announced")
        assert "another coordinator runs there" in refused(toy, "coordinator", "run", status=4)
        assert first.process.poll() is None


def test_notes_are_not_written_over(tmp_path: Path) -> None:
    """`data make` refuses a folder that holds something."""
    assert (
        call(tmp_path, "data", "make", "--out", "notes", "--sites", "1", "--notes", "1", "--heldout", "1").stderr == ""
    )
    said = refused(tmp_path, "data", "make", "--out", "notes", status=2)
    assert "notes is not empty" in said


def test_an_audit_file_that_was_edited_is_not_believed(toy: Path) -> None:
    """A line of audit.jsonl that is out of its place is an error that names the line."""
    (toy / "coordinator" / "audit.jsonl").write_text('{"seq":2}\n')
    assert "audit.jsonl, line 1, was changed" in refused(toy, "audit", "tail", status=3)


@pytest.mark.parametrize(
    "words",
    [["status"], ["audit", "tail"], ["audit", "show", "00"], ["export", "--out", "m"], ["coordinator", "prune"]],
)
def test_a_run_that_has_not_begun_has_nothing_to_show(toy: Path, words: list[str]) -> None:
    """Before the first start of the coordinator, the commands that look at a run say that there is none."""
    assert "no run has begun there" in refused(toy, *words, status=2)


def on_a_small_disk(root: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `root`, where the folder `name` is a file system of 300 kB that holds what was there."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False).returncode:
        pytest.skip("needs permission to mount a small file system of its own (unshare -rm)")
    (root / name).rename(root / "before")
    (root / name).mkdir()
    script = f'mount -t tmpfs -o size=300k none {name} && cp -r before/. {name}/ && exec "$@"'
    return subprocess.run(
        [unshare, "-rm", "sh", "-c", script, "sh", sys.executable, "-m", "mailboat", *words],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A coordinator whose disk has no room for its first version ends with 4 and names the folder."""
    write_toy(tmp_path, NOWHERE, sites=1, versions=1, parameters=50_000)
    done = on_a_small_disk(tmp_path, "coordinator", "coordinator", "run")
    assert done.returncode == 4, done.stderr
    assert "coordinator/masters: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_for_notes_is_said(tmp_path: Path) -> None:
    """`data make` ends with 4 and one line that names its folder."""
    (tmp_path / "disk").mkdir()
    done = on_a_small_disk(tmp_path, "disk", "data", "make", "--out", "disk/notes", "--notes", "200")
    assert done.returncode == 4, done.stderr
    assert "disk/notes: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


# -- stopping ---


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_broker_stops_in_order(tmp_path: Path, free_port: int, how: signal.Signals, status: int) -> None:
    """Ctrl-C ends the broker's process with 130, SIGTERM with 0; both say so in a word, and the port is free again."""
    with running(tmp_path, "broker", "run", "--port", str(free_port)) as broker:
        broker.wait_for("Ctrl-C stops it")
        assert f"mqtt://127.0.0.1:{free_port}\n" in broker.text()
        assert broker.end(how) == status
        assert broker.text().endswith("stopped\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port))


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_coordinator_stops_in_order_and_starts_again(toy: Path, how: signal.Signals, status: int) -> None:
    """A stopped coordinator says one word, leaves no lock behind, and the next start goes on with the same run."""
    for _ in range(2):
        with running(toy, "coordinator", "run") as coordinator:
            coordinator.wait_for("announced")
            assert coordinator.end(how) == status
            assert coordinator.text().endswith("stopped\n")
            assert "Traceback" not in coordinator.text()
    opened = call(toy, "audit", "tail").stdout
    assert opened.count("opened") == 1


# -- a run, looked at ---


def test_a_run_can_be_watched_and_told_afterwards(toy: Path) -> None:
    """Tail follows the run from before its start; status, show and extract agree with it afterwards."""
    with running(toy, "audit", "tail", "-f", "--json") as tail, running(toy, "coordinator", "run") as coordinator:
        with (
            running(toy, module=["tests.toys", "site", "site-1.toml"]),
            running(toy, module=["tests.toys", "site", "site-2.toml"]),
        ):
            tail.wait_for('"kind":"finished"')
            assert coordinator.process.wait(30) == 0
        lines = [json.loads(line) for line in tail.text().splitlines()]
        assert tail.end(signal.SIGINT) == 130
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert call(toy, "audit", "tail", "--json").stdout == "".join(
        json.dumps(line, separators=(",", ":")) + "\n" for line in lines
    )

    told = json.loads(call(toy, "status", "--json").stdout)
    assert (told["version"], told["finished"], told["waiting_for"]) == (3, True, "nothing: the run is complete")
    assert {site["site"]: site["merged"] for site in told["sites"]} == {"site-1": 3, "site-2": 3}
    assert "version     3 of 3, sync" in call(toy, "status").stdout

    part = next(line for line in lines if line["kind"] == "committed" and line["version"] == 2)["contributions"][0]
    shown = call(toy, "audit", "show", part["update_id"][:12], "--extract", "delta.safetensors")
    assert shown.returncode == 0, shown.stderr
    assert f"update       {part['update_id']}" in shown.stdout
    assert "into version 2, late by 0, weight 0.5" in shown.stdout
    assert {float(values.min()) for values in load_file(toy / "delta.safetensors").values()} == {1.0}
    life = json.loads(call(toy, "audit", "show", part["update_id"], "--json").stdout)
    assert (life["fate"], life["version"], life["site"], life["examples"]) == ("merged", 2, part["site"], 10)

    only = call(toy, "audit", "tail", "--site", "site-1", "--version", "2").stdout.splitlines()
    assert [line.split()[3] for line in only] == ["committed", "accepted"]
    assert "there is no version 9" in refused(toy, "export", "--version", "9", "--out", "model", status=2)


def test_following_goes_through_a_rebuilt_file(toy: Path) -> None:
    """When a restarted coordinator mends a file that was cut, the follower repeats nothing and misses nothing."""
    audit = toy / "coordinator" / "audit.jsonl"
    with running(toy, "audit", "tail", "-f") as tail:
        with running(toy, "coordinator", "run") as coordinator:
            coordinator.wait_for("announced")
            tail.wait_for("opened")
            coordinator.end(signal.SIGTERM)
        audit.write_bytes(b"")
        with (
            running(toy, "coordinator", "run"),
            running(toy, module=["tests.toys", "site", "site-1.toml"]),
            running(toy, module=["tests.toys", "site", "site-2.toml"]),
        ):
            tail.wait_for("is the last")
        told = [int(line.split("#")[1].split()[0]) for line in tail.text().splitlines()]
    assert told == list(range(1, len(told) + 1))


def test_the_doctor_tells_a_coordinator_what_is_well(toy: Path) -> None:
    """On an open broker without a model folder, everything is OK or a warning with a hint, except the model."""
    done = call(toy, "doctor", "--json")
    found = [(line["what"], line["level"]) for line in json.loads(done.stdout)]
    assert ("broker", "OK") in found
    assert ("MQTT 5", "OK") in found
    assert ("MQTT 3.1.1", "OK") in found
    assert ("access", "WARN") in found, "an open broker must be pointed out"
    assert ("plan", "OK") in found
    assert [what for what, level in found if level == "FAIL"] == ["model"]
    assert done.returncode == 4


def test_the_doctor_tells_that_the_broker_is_away(tmp_path: Path) -> None:
    """A broker that is not there is a FAIL with a hint."""
    write_toy(tmp_path, NOWHERE, sites=1, versions=1)
    done = call(tmp_path, "doctor")
    assert "FAIL broker       not reachable at 127.0.0.1:9" in done.stdout
    assert "-> check that it runs" in done.stdout


def test_the_doctor_looks_at_the_machine_where_there_is_no_configuration(tmp_path: Path) -> None:
    """In a folder without configuration only the machine is looked at, which is no failure."""
    done = call(tmp_path, "doctor")
    assert done.returncode == 0, done.stdout
    assert "OK   python" in done.stdout
    assert "WARN config       no coordinator.toml or site.toml in this folder" in done.stdout


def test_the_access_rules_name_the_federation(tmp_path: Path) -> None:
    """`broker acl` prints rules for the named federation, and refuses a name that could widen them."""
    assert "topic write mb/v1/north/announce" in call(tmp_path, "broker", "acl", "--federation", "north").stdout
    assert "cannot stand in an access list" in refused(tmp_path, "broker", "acl", "--federation", "#", status=2)
