"""A model of several arrays: the recipe's own numpy persistor holds one, which then travels in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor


class TensorsPersistor(ModelPersistor):
    """Begins with the rows of one array, keeps the newest model beside the job."""

    def __init__(self, initial: str) -> None:
        super().__init__()
        self.initial = initial

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """One entry for each tensor."""
        rows = np.load(self.initial)
        return make_model_learnable({f"{number:02d}": np.array(row) for number, row in enumerate(rows)}, {})

    def save_model(self, ml: ModelLearnable, fl_ctx: FLContext) -> None:
        """Written whole each round, as the recipe's persistor does."""
        folder = Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id())) / "models"
        folder.mkdir(exist_ok=True)
        np.savez(folder / "server.npz", **ml[ModelLearnableKey.WEIGHTS])
