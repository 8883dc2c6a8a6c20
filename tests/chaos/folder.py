"""The folder of one run: configuration of each process, the sealed plan, version 0, Mosquitto's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from broker.config import Setting, local_settings
from shared.config import FederationConfig
from shared.configfile import load_config
from tests.chaos.plan import COORDINATOR_NAME, Plan
from tests.kits import Kits
from tests.toys import INITIAL, toy_plan

NAME = "chaos"


def write_run(root: Path, plan: Plan, urls: Mapping[str, str]) -> None:
    """Write everything that the processes of a run start from; `urls` says where each of them finds the broker."""
    model = root / "model"
    model.mkdir()
    (root / "federation.toml").write_text(
        f'[federation]\nname = "{NAME}"\nversions = {plan.versions}\n[model]\nbase = "{model}"\n'
        f'[codec]\nup = "f32"\ndown = "f32"\nslice_kib = {plan.slice_kib}\n'
        f'[aggregation]\nmode = "{plan.mode}"\nquorum = 1\nbuffer = 2\ndeadline_s = 5.0\n'
        f"[aggregation.staleness]\nlimit = {plan.limit}\n"
        f'[trust]\nmode = "{"sealed" if plan.sealed else "none"}"\n'
    )
    if plan.sealed:
        kits = Kits(root, NAME)
        for name in plan.names[1:]:
            kits.site(name)
    for name in plan.names:
        (root / f"{name}.toml").write_text(_local(name, plan, urls[name]))
        (root / name).mkdir(exist_ok=True)
    federation = load_config(root / "federation.toml", FederationConfig)
    sealed = toy_plan(federation, plan.parameters)
    for folder in (model, root / COORDINATOR_NAME):
        (folder / "plan.json").write_text(sealed.model_dump_json())
    initial = {name: np.full(shape, INITIAL, np.float32) for name, shape in sealed.tensors.items()}
    save_file(initial, root / COORDINATOR_NAME / "initial.safetensors")


def write_broker(root: Path, plan: Plan, port: int) -> Path:
    """Write a Mosquitto configuration: the local one, with a persistence file.

    It is written now and then only: while Mosquitto syncs it, it serves nobody.
    """
    root.mkdir(exist_ok=True)
    changed = {
        "persistence": Setting("persistence", "true", "so that a restart without it forgets something"),
        "max_queued_messages": Setting("max_queued_messages", str(plan.queue_max), "drawn from the seed"),
    }
    lines = [changed.get(setting.key, setting) for setting in local_settings("127.0.0.1", port)]
    lines.append(Setting("persistence_location", f"{root}/", "below the run's folder"))
    lines.append(Setting("autosave_interval", "4", "the file is there to be lost, or to be old"))
    path = root / "mosquitto.conf"
    path.write_text("\n".join(map(str, lines)))
    return path


def _local(name: str, plan: Plan, url: str) -> str:
    lines = [f'federation = "federation.toml"\nstorage = "{name}"\nmin_free_mib = 1']
    if name != COORDINATOR_NAME:
        lines.insert(0, f'name = "{name}"')
    lines.append(f'[broker]\nurl = "{url}"')
    lines.append(
        f"[link]\nstall_s = {plan.patience.stall_s}\nbackoff_cap_s = {plan.patience.backoff_cap_s}\n"
        f"keepalive_s = {plan.patience.keepalive_s}\nwindow = {plan.window}"
    )
    if plan.sealed:
        lines.append(f'[trust]\nkit = "{name}-kit"')
    if name != COORDINATOR_NAME:
        lines.append('[data]\nnotes = "none"')
    return "\n".join(lines) + "\n"
