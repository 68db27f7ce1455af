"""Adam in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig

from nerfstudio_softmining.plugin import compat


@dataclass
class FusedAdamOptimizerConfig(AdamOptimizerConfig):
    """Settings of Adam, which updates all parameters in one kernel where torch can."""

    def setup(self, params: Any) -> torch.optim.Optimizer:
        """Make the optimizer of some parameters."""
        settings = {name: value for name, value in vars(self).items() if name not in ("_target", "max_norm")}
        fused = all(compat.has_fused_adam(device) for device in {parameter.device for parameter in params})
        return self._target(params, fused=fused, **settings)
