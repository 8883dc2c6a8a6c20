"""Which published state a command is about, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.views import RunView, find_version, load_run
from edge_client.layout import check_layout
from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import ConfigError
from shared.manifest import Manifest, StateFacts
from shared.store import FrameStore


@dataclass(frozen=True, slots=True)
class Subject:
    """A published state and where it lies: in a coordinator's folder, or in a site's with what is that site's own."""

    storage: Path
    federation: FederationConfig
    state: Manifest
    """Or of the step that makes it."""
    parts: tuple[str, ...]
    """Transfers that make it up."""
    source: str | Path
    """The base model."""
    master_digest: str | None = None
    """Of the coordinator's float32 master."""
    run: RunView | None = None
    """What the coordinator's journal tells."""
    site: str | None = None

    @property
    def title(self) -> str:
        """What it is, for people."""
        at = f" at {self.site}" if self.site else ""
        return f"version {self.state.version}{at}"

    def detail(self, *, full_precision: bool) -> str:
        """Which file of it is meant, for people."""
        if full_precision and self.master_digest:
            return f" in full precision (master {self.master_digest[:12]})"
        return f" (state {self.state.leads_to[:12]})"


def of_coordinator(config: CoordinatorConfig, version: int | None) -> Subject:
    """Return a version of a coordinator's run, the newest for None; ConfigError when there is none."""
    federation = load_config(config.federation, FederationConfig)
    run = load_run(config.storage)
    found = find_version(run, version)
    source = federation.model.base
    return Subject(config.storage, federation, found.state, found.parts, source, found.master_digest, run)


def of_site(config: SiteConfig) -> Subject:
    """Return the newest state that a site holds; ConfigError when it holds none, RefusedError as `check_layout`."""
    check_layout(config.storage)
    folder = config.storage / "states"
    store = FrameStore(folder) if folder.is_dir() else None
    stored = [store.get(state_id) for state_id in store.ids()] if store else []
    states = [each.manifest for each in stored if each and isinstance(each.manifest.facts, StateFacts)]
    newest = max(states, key=lambda state: state.version, default=None)
    if newest is None:
        raise ConfigError(f"{config.storage}: no state was pulled yet", hint="run the site first: mailboat site run")
    federation = load_config(config.federation, FederationConfig)
    source = config.model_dir or federation.model.base
    parts = (newest.transfer_id,)
    return Subject(config.storage, federation, newest, parts, source, site=config.name)
