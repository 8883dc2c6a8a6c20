"""A Mailboat site without a language model: `python -m bench.peers.site SITE.toml`.

The real agent, outbox, link and disk; in the place of the training worker stands the work that every framework gets.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers import work
from edge_client.agent import Agent
from edge_client.outbox import Outbox
from edge_client.session import Identity
from edge_client.training import Standing
from shared import codec, durable, logs
from shared.config import CodecName, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.ids import new_session_id
from shared.plan import load_plan
from shared.tensorfile import NUMPY_DTYPES, F32Array, map_file


@dataclass(frozen=True, slots=True)
class Trained:
    """What the work reports."""

    examples: int
    metrics: dict[str, float]
    own: None = None


class KnownNoise:
    """Its delta is the noise of the work."""

    standing = Standing()

    def __init__(self, task: work.Work, name: str, down: CodecName) -> None:
        self._task = task
        self._name = name
        self._codec = down

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> Trained:
        """Write the delta; the state is decoded as for training, and looked at for its ledger only."""
        await asyncio.to_thread(self._train, state, base_version, delta)
        on_progress(1.0, 0.0)
        return Trained(10, {"loss": 1.0})

    def _train(self, state: Path, base_version: int, delta: Path) -> None:
        tensors = decoded(state, self._codec)
        self._task.note(self._name, "received", round=base_version, ledger=self._task.ledger(tensors[tensor_name(0)]))
        added = self._task.delta(int(self._name.rpartition("-")[2]))
        tensors = {tensor_name(number): values for number, values in enumerate(added)}
        durable.overwrite(delta, codec.encode_file(tensors, "f32", {}))
        self._task.note(self._name, "trained", round=base_version)


def decoded(path: Path, name: CodecName) -> dict[str, F32Array]:
    """The tensors of a state's file as float32; what a site's worker does, which would load torch."""
    header, data = map_file(path)
    parts = {
        spec.name: data[spec.begin : spec.end].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        for spec in header.specs
    }
    return {
        tensor: codec.decode_tensor([parts[part] for part, _, _ in codec.part_specs(tensor, shape, name)], name, shape)
        for tensor, shape in codec.tensor_shapes(header, name).items()
    }


def tensor_name(number: int) -> str:
    """The name of a tensor of the work."""
    return f"block.{number:02d}.weight"


async def run(path: Path) -> None:
    """Take part until the run is complete."""
    config = load_config(path, SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = load_plan(config.federation.parent / "coordinator" / "plan.json", federation)
    durable.make_folder(config.storage)
    identity = Identity(
        site=config.name,
        session=new_session_id(),
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        software="bench",
    )
    trainer = KnownNoise(work.load(), config.name, federation.codec.down)
    await Agent(config, federation, identity, Outbox(config.storage), trainer).run()


if __name__ == "__main__":
    logs.configure()
    asyncio.run(run(Path(sys.argv[1])))
