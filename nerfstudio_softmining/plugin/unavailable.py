"""What stands in for a method that cannot be imported in this environment."""

from __future__ import annotations

from dataclasses import dataclass

from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_softmining.errors import UserError


@dataclass
class UnavailableConfig(TrainerConfig):
    """Settings that only say why a method cannot be used."""

    reason: str = ""
    """Why the method cannot be used."""

    def set_timestamp(self) -> None:
        """Refuse to start; `ns-train` calls this before it writes anything.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.method_name} cannot be used in this environment ({self.reason}). Run `softmining doctor`, which "
            "says what to install. Other methods work."
        )


def unavailable_method(name: str, error: Exception) -> MethodSpecification:
    """Make a specification that `ns-train --help` lists with the reason, and that refuses to train."""
    reason = f"{type(error).__name__}: {error}"
    return MethodSpecification(
        UnavailableConfig(method_name=name, reason=reason),
        f"Cannot be used in this environment, see `softmining doctor`: {reason}",
    )
