"""The pipeline of methods that march through an occupancy grid."""

from __future__ import annotations

from typing import Any

from nerfstudio.pipelines.dynamic_batch import DynamicBatchPipeline

from nerfstudio_softmining.plugin import compat


class RayMarchingPipeline(DynamicBatchPipeline):
    """nerfstudio's pipeline of instant-ngp, which says first what is missing, before it loads data.

    Args:
        args, kwargs: as nerfstudio's trainer gives them.

    Raises:
        UserError: if nerfacc's CUDA kernels are missing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.require_ray_marching()
        super().__init__(*args, **kwargs)

    def get_extra_state(self) -> dict[str, int]:
        """Return the size of the next batch, which nerfstudio's checkpoints lack."""
        return {"num_rays": self.dynamic_num_rays_per_batch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.dynamic_num_rays_per_batch = state["num_rays"]
        self._update_pixel_samplers()
