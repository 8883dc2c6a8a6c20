"""Mailboat as the benchmarks start it: open or sealed, at its default settings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from bench.peers.frameworks import until
from bench.peers.site import tensor_name
from bench.peers.stage import Stage
from bench.peers.work import Work
from broker.config import local_config
from broker.launcher import find_mosquitto
from coordinator.journal import Journal
from coordinator.records import VersionCommitted
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.plan import SealedPlan
from tests.kits import Kits


class Mailboat:
    """Mosquitto, `mailboat coordinator run`, and sites whose training is the work's."""

    port = 1883

    def __init__(
        self, work: Work, stage: Stage, *, codec: str = "f32", quorum: int | None = None, sealed: bool = False
    ) -> None:
        self.name = f"mailboat {codec}{' sealed' * sealed}"
        self._work, self._stage, self._codec, self._sealed = work, stage, codec, sealed
        self._quorum = "" if quorum is None else f"quorum = {quorum}\n"
        self._root = Path(work.root)
        self._broker_started = False

    def start_server(self) -> None:
        """The broker once, then the coordinator; returns when it is connected."""
        if not self._broker_started:
            self._write()
            self._start_broker()
        log = self._root / "server.log"
        before = log.read_text().count("connected") if log.exists() else 0
        self._stage.start(
            "server",
            [sys.executable, "-m", "mailboat", "coordinator", "run", "-c", self._root / "coordinator.toml"],
            log="server",
        )
        until(lambda: log.read_text().count("connected") > before, "the coordinator to connect")

    def start_site(self, number: int, port: int) -> None:
        """One site with a configuration of its own."""
        path = self._root / f"site-{number}.toml"
        path.write_text(
            f'name = "site-{number}"\nfederation = "federation.toml"\nstorage = "site-{number}"\n'
            f'[broker]\nurl = "mqtt://127.0.0.1:{port}"\n[data]\nnotes = "none"\n{self._kit(f"site-{number}")}'
        )
        self._stage.start(f"site-{number}", [sys.executable, "-m", "bench.peers.site", path], log=f"site-{number}")

    def _kit(self, name: str) -> str:
        return f'[trust]\nkit = "{name}-kit"\n' if self._sealed else ""

    def begin(self) -> None:
        """A Mailboat run begins with its first site."""

    def verdict(self) -> str:
        """Finished when the last version is in the journal."""
        return "finished" if self.committed() and self.committed()[-1][0] >= self._work.rounds else "running"

    def committed(self) -> list[tuple[int, float]]:
        """Versions and when each was durable."""
        with Journal.open_read(self._root / "coordinator" / "journal.sqlite") as journal:
            return [(record.version, record.at) for record in journal.replay() if isinstance(record, VersionCommitted)]

    def kill_server(self) -> list[str]:
        """The coordinator; the broker is another machine."""
        return self._stage.kill("server")

    def kill_site(self, number: int) -> list[str]:
        """The agent."""
        return self._stage.kill(f"site-{number}")

    def is_unattended(self) -> bool:
        """A service manager would."""
        return False

    def final(self) -> list[float] | None:
        """From the newest master."""
        masters = sorted((self._root / "coordinator" / "masters").glob("v*.safetensors"))
        if not masters:
            return None
        with safe_open(masters[-1], framework="numpy") as tensors:
            return self._work.ledger(tensors.get_tensor(tensor_name(0)))

    def counted(self) -> list[int]:
        """From the journal."""
        with Journal.open_read(self._root / "coordinator" / "journal.sqlite") as journal:
            merged = [record for record in journal.replay() if isinstance(record, VersionCommitted)]
        sites = [each.site for record in merged for each in record.contributions]
        return [sites.count(f"site-{number}") for number in range(1, self._work.sites + 1)]

    def _start_broker(self) -> None:
        (self._root / "broker").mkdir()
        config = self._root / "broker" / "mosquitto.conf"
        config.write_text(local_config("127.0.0.1", self.port))
        program = find_mosquitto()
        assert program is not None
        self._stage.start("broker", [program, "-c", config], log="broker")
        until(lambda: " running" in (self._root / "broker.log").read_text(), "Mosquitto")
        self._broker_started = True

    def _write(self) -> None:
        work, root = self._work, self._root
        (root / "federation.toml").write_text(
            f'[federation]\nname = "bench"\nversions = {work.rounds}\n[model]\nbase = "none"\n'
            f'[codec]\nup = "{self._codec}"\ndown = "{self._codec}"\n[aggregation]\nmode = "sync"\n{self._quorum}'
            f'[trust]\nmode = "{"sealed" if self._sealed else "none"}"\n'
        )
        if self._sealed:
            kits = Kits(root, "bench")
            for number in range(1, work.sites + 1):
                kits.site(f"site-{number}")
        (root / "coordinator.toml").write_text(
            f'federation = "federation.toml"\nstorage = "coordinator"\nexit_when_done = true\n'
            f'[broker]\nurl = "mqtt://127.0.0.1:{self.port}"\n{self._kit("coordinator")}'
        )
        federation = load_config(root / "federation.toml", FederationConfig)
        initial = work.initial()
        plan = SealedPlan(
            architecture="Synthetic",
            depth=work.tensors,
            layers=tuple(range(work.tensors)),
            tensors={tensor_name(number): values.shape for number, values in enumerate(initial)},
            trained_parameters=initial.size,
            total_parameters=2 * initial.size,
            config_sha256=federation.config_sha256,
            frozen_sha256="0" * 64,
            tokenizer_sha256="0" * 64,
            labels=federation.task.labels,
        )
        storage = root / "coordinator"
        storage.mkdir()
        (storage / "plan.json").write_text(plan.model_dump_json())
        save_file(
            {tensor_name(number): np.ascontiguousarray(values) for number, values in enumerate(initial)},
            storage / "initial.safetensors",
        )
