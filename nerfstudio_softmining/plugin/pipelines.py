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
