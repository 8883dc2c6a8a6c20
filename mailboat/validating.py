"""The coordinator's validator: its operator's notes, and beside it the process that has the model.

It is the worker that sites train with, which here measures and never trains: the coordinator's own process needs no
PyTorch and stays small, and what the kernel ends when memory runs out is the worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from shared.config import ComputeSection, CoordinatorConfig, DataSection, FederationConfig, SiteConfig
from shared.errors import ConfigError
from shared.plan import SealedPlan

if TYPE_CHECKING:
    from edge_client.worker_client import WorkerClient

NAME = "validation"


@contextlib.asynccontextmanager
async def validator_for(
    config: CoordinatorConfig, federation: FederationConfig, plan: SealedPlan
) -> AsyncIterator[WorkerClient | None]:
    """Start the worker that measures losses, load model and notes, and yield it; None where none are asked for.

    Raises ConfigError when PyTorch is missing, when model or notes cannot serve, or when the model is another than the
    sealed plan's; UnavailableError when the worker cannot be kept alive.
    """
    site = _as_site(config)
    if federation.aggregation.quality == "none" or site is None:
        yield None
        return
    if find_spec("torch") is None:
        raise ConfigError("the package torch is not installed here", hint="pip install 'mailboat[edge]'")
    from edge_client.worker_client import WorkerClient

    async with WorkerClient(site, federation, trains=False) as worker:
        loaded = await worker.load()
        if loaded.plan.fingerprint != plan.fingerprint:
            raise ConfigError(
                "the model that [validation] measures with is not the one of the sealed plan",
                hint="name the federation's base model in [validation] model_dir",
            )
        yield worker


def _as_site(config: CoordinatorConfig) -> SiteConfig | None:
    """What the worker needs to know, in the words of a site's file; None without notes."""
    section = config.validation
    if section.notes is None:
        return None
    return SiteConfig(
        name=NAME,
        federation=config.federation,
        storage=config.storage / NAME,
        data=DataSection(notes=section.notes, skip_bad=section.skip_bad, holdout=0.0),
        model_dir=section.model_dir,
        threads=section.threads,
        training=ComputeSection(device=section.device, precision=section.precision),
    )
