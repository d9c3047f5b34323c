"""AdamW, its schedule, gradient clipping, and its state under logical names."""

import math

import torch
from torch import Tensor, nn

from neva.job import OptimConfig
from neva.parallel.wrap import logical_parameters, whole


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 1) of a stage of `steps`."""
    warmup = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters; weight decay for matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def clip(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest` (0 does not scale); gives the norm before."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if largest:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], largest, norm)
    return norm


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, sharded as the parameters are; made (as zeros) where no step was taken yet.

    The tensors are the optimiser's own: loading into them restores it.
    """
    tensors = {}
    for name, parameter in logical_parameters(model):
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors
