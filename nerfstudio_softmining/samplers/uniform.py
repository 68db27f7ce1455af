"""Uniform draws over all training pixels, as nerfstudio and the NeRF literature make them: the baseline."""

from __future__ import annotations

from nerfstudio_softmining.samplers.base import Sampler, SamplerConfig, Samples, Stateless
from nerfstudio_softmining.samplers.registry import register


@register
class Uniform(Sampler[SamplerConfig, Stateless]):
    """Draw uniformly; nerfstudio's own way."""

    config_class = SamplerConfig
    is_uniform = True

    def draw(self, state: Stateless, count: int) -> tuple[Samples, Stateless]:
        return Samples(self.images.uniform(count), count), state
