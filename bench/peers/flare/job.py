"""Writes the job folder: FedAvg over numpy arrays, the recipe's defaults."""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.fuel.utils.constants import FrameworkType
from nvflare.recipe.fedavg import FedAvgRecipe

from bench.peers import work
from bench.peers.flare.persistor import TensorsPersistor


def main(folder: str) -> None:
    """Export the job below `folder`."""
    task = work.load()
    recipe = FedAvgRecipe(
        name="peers",
        model_persistor=TensorsPersistor(str(Path(task.root) / "initial.npy")),
        framework=FrameworkType.NUMPY,
        min_clients=task.sites,
        num_rounds=task.rounds,
        train_script=str(Path(__file__).parent / "client.py"),
    )
    recipe.export(folder)


if __name__ == "__main__":
    main(sys.argv[1])
