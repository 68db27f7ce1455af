"""The registry of samplers: whatever module of this package registers one is found."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import TypeVar

from nerfstudio_softmining import samplers as package
from nerfstudio_softmining.samplers.base import Sampler, SamplerConfig

SamplerClass = TypeVar("SamplerClass", bound=type[Sampler])

ALIASES = {"uniform-weighted": "uniform,weight_by=importance"}
"""Samplers with settings that have a name of their own. Uniform draws with the weights of soft mining: the control."""


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler as the command line, `bench`, `image` and the tests see it."""

    name: str
    """Its name: that of its file, with hyphens."""
    sampler: type[Sampler]
    """Its class."""
    summary: str
    """First line of its class's docstring."""

    @property
    def field(self) -> str:
        """Name of the field that groups its settings."""
        return self.name.replace("-", "_")

    @property
    def config(self) -> type[SamplerConfig]:
        """Class of its settings."""
        return self.sampler.config_class


_specs: dict[str, SamplerSpec] = {}


def register(sampler: SamplerClass) -> SamplerClass:
    """Register a sampler under the name of its file. A class decorator."""
    name = sampler.__module__.rpartition(".")[2].replace("_", "-")
    summary = (inspect.getdoc(sampler) or name).partition("\n")[0]
    _specs[name] = SamplerSpec(name, sampler, summary)
    return sampler


@functools.cache
def samplers(scenes: bool = False) -> dict[str, SamplerSpec]:
    """Return all samplers by name, in alphabetical order.

    Args:
        scenes: leave out those that need the residual of a whole image.
    """
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {name: spec for name, spec in sorted(_specs.items()) if not (scenes and spec.sampler.needs_residual)}


def parse(text: str) -> tuple[str, list[str]]:
    """Split a sampler with settings of its own, as in langevin,drift=0, into its name and settings.

    >>> parse("uniform-weighted,alpha=1")
    ('uniform', ['weight_by=importance', 'alpha=1'])
    """
    name, *settings = text.split(",")
    name, *implied = ALIASES.get(name, name).split(",")
    return name, implied + settings
