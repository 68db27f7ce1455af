"""What the methods set up: optimizers and schedules."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from nerfstudio_softmining.plugin import compat, methods
from nerfstudio_softmining.plugin.optimizer import FusedAdamOptimizerConfig

LITE = [
    methods.softmining_nerfacto_lite,
    methods.softmining_nerfacto_lite_blender,
    methods.softmining_nerfacto_lite_llff,
]


@pytest.mark.parametrize("method", LITE, ids=lambda method: method.config.method_name)
@pytest.mark.parametrize("iterations", [40, 3000])
def test_learning_rates_of_lite_methods_fall_over_the_whole_training(method, iterations):
    config = deepcopy(method.config)
    config.max_num_iterations = iterations
    config._target = lambda config, **kwargs: config
    config = config.setup(local_rank=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    for group in ("fields", "proposal_networks"):
        optimizer = config.optimizers[group]["optimizer"].setup([parameter])
        scheduler = config.optimizers[group]["scheduler"].setup().get_scheduler(optimizer, lr_init=1e-2)
        rates = []
        for _ in range(iterations + 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates[0] == pytest.approx(1e-2) and rates[-1] == pytest.approx(4e-3)
        assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_fused_adam_is_adam():
    trained = []
    for make in (FusedAdamOptimizerConfig(lr=1e-2, eps=1e-15).setup, lambda p: torch.optim.Adam(p, 1e-2, eps=1e-15)):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(50))
        optimizer = make([parameter])
        for _ in range(20):
            optimizer.zero_grad()
            (parameter - 1).square().square().sum().backward()
            optimizer.step()
        trained.append((parameter.detach(), optimizer))
    torch.testing.assert_close(trained[0][0], trained[1][0])
    assert trained[0][1].param_groups[0]["fused"] == compat.has_fused_adam("cpu")
