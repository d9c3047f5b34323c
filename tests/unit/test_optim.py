"""What of the optimiser's settings reaches AdamW."""

import torch
from torch import nn

from neva.job import OptimConfig
from neva.training.optim import make_optimizer


def test_every_setting_reaches_the_optimiser() -> None:
    """Matrices decay, vectors do not, and what is frozen is not there."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    config = OptimConfig(lr=0.25, betas=(0.5, 0.75), eps=0.125, weight_decay=0.375)
    optimizer = make_optimizer(model, config)
    settings = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups]
    assert settings == [(0.25, (0.5, 0.75), 0.125, 0.375), (0.25, (0.5, 0.75), 0.125, 0.0)]
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert shapes == [[(4, 3)], [(4,), (4,), (4,)]]


def test_eps_bounds_the_step_of_a_tiny_gradient() -> None:
    """Adam's first step is lr * g / (|g| + eps)."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    holder = nn.ParameterList([parameter])
    optimizer = make_optimizer(holder, OptimConfig(lr=0.5, eps=1e-3, weight_decay=0.0))
    parameter.grad = torch.full((2, 2), 1e-3)
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((2, 2), -0.25), rtol=1e-3)
