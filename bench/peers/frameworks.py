"""How each framework is started as its documentation says, what ends its run, and what it says of itself."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.peers.stage import Stage
from bench.peers.work import VARIABLE, Work, events

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".bench"
HERE = Path(__file__).parent
UNKNOWN = "unknown to the server"
READY_S, POLL_S = 120.0, 0.1


class Framework(Protocol):
    """One framework with one run of one work; ports are those of a network that nobody else uses."""

    name: str
    port: int
    """Where sites connect, directly or through a proxy."""

    def start_server(self) -> None:
        """Start it, or start it again with the same command, and return when it serves."""

    def start_site(self, number: int, port: int) -> None:
        """Start site 1, 2, ..., which connects to that port."""

    def begin(self) -> None:
        """Return once all sites are there and the run has been asked for."""

    def verdict(self) -> str:
        """'running', or how the run ended, in the framework's own word."""

    def kill_server(self) -> list[str]:
        """SIGKILL to every process of the server at once."""

    def kill_site(self, number: int) -> list[str]:
        """SIGKILL to every process of a site at once."""

    def is_unattended(self) -> bool:
        """Whether its own scripts start a killed process again."""

    def final(self) -> list[float] | None:
        """The ledger in the last global model that the server holds; None when it holds none."""

    def counted(self) -> list[int]:
        """How many updates of each site are in that model."""


def until(ready: object, what: str, seconds: float = READY_S) -> None:
    """Return when the callable is true; TimeoutError that names what was waited for."""
    assert callable(ready)
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(POLL_S)


def steps(work: Work, final: list[float] | None) -> list[int]:
    """How often each site's part of the ledger grew from one global model to the next."""
    seen = [event["ledger"] for event in events(Path(work.root)) if "ledger" in event]
    models = sorted([*seen, *([final] if final else [])], key=sum)
    pairs = list(itertools.pairwise(models))
    return [sum(later[site] > earlier[site] for earlier, later in pairs) for site in range(work.sites)]


def version_of(name: str) -> str:
    """The version of a peer in its environment."""
    package = {"flower": "flwr", "flare": "nvflare"}[name]
    (found,) = (ENVIRONMENTS / name).glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return found.name.removeprefix(f"{package}-").removesuffix(".dist-info")


def environment(work: Work) -> dict[str, str]:
    """What every process of a run finds in its environment."""
    root = Path(work.root)
    (root / "home").mkdir(exist_ok=True)
    return {
        "HOME": str(root / "home"),
        "PYTHONPATH": str(ROOT),
        VARIABLE: str(root / "work.json"),
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(root / "home" / ".flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "NVFLARE_POC_WORKSPACE": str(root / "poc"),
        "NO_COLOR": "1",
    }


class Flower:
    """`flower-superlink`, `flower-supernode`, `flwr run`."""

    port = 8000

    def __init__(self, work: Work, stage: Stage, *, database: bool = False) -> None:
        self.name = "flower"
        self._work, self._stage = work, stage
        self._root = Path(work.root)
        self._bin = ENVIRONMENTS / "flower" / "bin"
        self._database = ["--database", str(self._root / "superlink.db")] if database else []
        self._path = {"PATH": f"{self._bin}:{os.environ['PATH']}"}
        self._run_id = ""

    def start_server(self) -> None:
        """The SuperLink, state in memory unless told otherwise."""
        command: list[str | Path] = [
            self._bin / "flower-superlink",
            "--insecure",
            "--disable-runtime-dependency-installation",
        ]
        self._stage.start("server", [*command, *self._database], log="server", extra=self._path)
        until(lambda: _listens(self.port), "the SuperLink")

    def start_site(self, number: int, port: int) -> None:
        """One SuperNode."""
        command: list[str | Path] = [self._bin / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        command += ["--port", str(9100 + number), "--node-config", f"site={number}"]
        self._stage.start(f"site-{number}", command, log=f"site-{number}", extra=self._path)

    def begin(self) -> None:
        """`flwr run` once all SuperNodes are online."""
        home = self._root / "home" / ".flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        until(lambda: self._online() >= self._work.sites, "all SuperNodes")
        shutil.copytree(HERE / "flower", self._root / "app")
        said = self._flwr("run", self._root / "app", "bench", "--format", "json")
        found = re.search(r'"run-id":\s*"?(\d+)', said)
        if found is None:
            raise AssertionError(said)
        self._run_id = found[1]

    def verdict(self) -> str:
        """From `flwr list`."""
        said = self._flwr("list", "bench", "--run-id", self._run_id, "--format", "json")
        found = re.search(r'"status":\s*"([^"]+)"', said)
        word = found[1] if found else f"{UNKNOWN}: {' '.join(said.split())[:200]}"
        return "running" if word in {"pending", "starting", "running"} else word

    def kill_server(self) -> list[str]:
        """SuperLink, SuperExec and ServerApp."""
        return self._stage.kill("server")

    def kill_site(self, number: int) -> list[str]:
        """SuperNode, SuperExec and ClientApp."""
        return self._stage.kill(f"site-{number}")

    def is_unattended(self) -> bool:
        """A service manager would."""
        return False

    def final(self) -> list[float] | None:
        """As the ServerApp noted it; Flower itself keeps no model."""
        committed = [event for event in events(self._root) if event["what"] == "committed"]
        return committed[-1]["ledger"] if committed else None

    def counted(self) -> list[int]:
        """From the steps of the ledger."""
        return steps(self._work, self.final())

    def _online(self) -> int:
        return self._flwr("supernode", "list", "bench", "--format", "json").count('"online"')

    def _flwr(self, *words: str | Path) -> str:
        return self._stage.ask([self._bin / "flwr", *words], extra=self._path)


class Flare:
    """`nvflare poc prepare`, the start-up kits' own scripts, `nvflare job submit`."""

    port = 8002

    def __init__(self, work: Work, stage: Stage) -> None:
        self.name = "flare"
        self._work, self._stage = work, stage
        self._root = Path(work.root)
        self._bin = ENVIRONMENTS / "flare" / "bin"
        self._kits = self._root / "poc" / "example_project" / "prod_00"
        self._path = {"PATH": f"{self._bin}:{os.environ['PATH']}"}
        self._job_id = ""

    def start_server(self) -> None:
        """The kit's own loop, which starts the server again whenever it has gone."""
        if not self._kits.exists():
            said = self._nvflare("poc", "prepare", "-n", str(self._work.sites))
            assert self._kits.exists(), said
            # The kits name the server by a host name that a network of its own cannot look up.
            for path in self._kits.glob("server/startup/fed_server.json"):
                path.write_text(path.read_text().replace("server:8002", "localhost:8002"))
            self._stage.start("server", [self._kits / "server/startup/sub_start.sh"], log="server", extra=self._path)
        until(lambda: _listens(self.port), "the server")

    def start_site(self, number: int, port: int) -> None:
        """The loop of one kit."""
        kit = self._kits / f"site-{number}" / "startup"
        config = kit / "fed_client.json"
        config.write_text(config.read_text().replace(f"localhost:{self.port}", f"localhost:{port}"))
        self._stage.start(f"site-{number}", [kit / "sub_start.sh"], log=f"site-{number}", extra=self._path)

    def begin(self) -> None:
        """`nvflare job submit` once all clients are registered."""
        log = self._kits / "server" / "log.txt"
        until(lambda: _count(log, "New client site-") >= self._work.sites, "all clients")
        said = self._stage.ask([self._bin / "python", HERE / "flare" / "job.py", self._root / "jobs"], extra=self._path)
        assert (self._root / "jobs" / "peers").is_dir(), said
        said = self._nvflare("job", "submit", "-j", self._root / "jobs" / "peers", *self._admin())
        found = re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", said)
        if found is None:
            raise AssertionError(said)
        self._job_id = found[0]

    def verdict(self) -> str:
        """From `nvflare job meta`."""
        said = self._nvflare("job", "meta", self._job_id, *self._admin())
        found = re.search(r"Status\s*│\s*([A-Z][A-Z_:]+)", said)
        word = found[1] if found else f"{UNKNOWN}: {' '.join(said.split())[:200]}"
        return "running" if word in {"RUNNING", "SUBMITTED", "DISPATCHED", "APPROVED"} else word

    def kill_server(self) -> list[str]:
        """Parent and job process; the loop that starts them lives."""
        return self._stage.kill("server", spare=["sub_start.sh", "sleep"])

    def kill_site(self, number: int) -> list[str]:
        """Parent and job process."""
        return self._stage.kill(f"site-{number}", spare=["sub_start.sh", "sleep"])

    def is_unattended(self) -> bool:
        """`sub_start.sh` does."""
        return True

    def final(self) -> list[float] | None:
        """From the file that the persistor saved; a job that has ended is in the server's store."""
        if not [*self._kits.glob("server/**/server.npz")]:
            self._nvflare("job", "download", self._job_id, "-o", self._kits / "server" / "ended", *self._admin())
        saved = sorted(self._kits.glob("server/**/server.npz"), key=lambda path: path.stat().st_mtime)
        return self._work.ledger(np.load(saved[-1])["00"]) if saved else None

    def counted(self) -> list[int]:
        """From the steps of the ledger."""
        return steps(self._work, self.final())

    def _admin(self) -> list[str]:
        return ["--startup-kit", str(self._kits / "admin@nvidia.com" / "startup")]

    def _nvflare(self, *words: str | Path) -> str:
        return self._stage.ask([self._bin / "nvflare", *words], extra=self._path)


def _count(path: Path, text: str) -> int:
    return path.read_text(errors="replace").count(text) if path.exists() else 0


def _listens(port: int) -> bool:
    wanted = f":{port:04X}"
    return any(
        line.split()[1].endswith(wanted) and line.split()[3] == "0A"
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    )
