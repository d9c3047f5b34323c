"""Sums of token losses: per group for reports, and which samples a non-finite one comes from."""

import torch
from jaxtyping import Float
from torch import Tensor

from neva.batch import Batch


def group_sums(losses: Float[Tensor, " l"], batch: Batch) -> Float[Tensor, "2 g"]:
    """Sum of losses and number of labelled tokens of each of the batch's groups."""
    if not batch.group_names:  # every sample of the micro-batch failed to decode
        return torch.zeros(2, 0, dtype=torch.float64, device=losses.device)
    at = batch.labelled.clamp_min(0)
    group = batch.groups.flatten().index_select(0, at)
    sums = torch.zeros(2, len(batch.group_names), dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, group, losses.detach().double())
    sums[1].index_add_(0, group, (batch.labelled >= 0).double())
    return sums


def not_finite(losses: Float[Tensor, " l"], batch: Batch) -> list[str]:
    """`source/id` of each sample with a loss that is not finite. The batch is on the CPU.

    keys are listed segment by segment, row by row: segment g of row r is key number (segments of earlier rows) + g - 1.
    """
    per_row = batch.segments.amax(1)
    first = per_row.cumsum(0) - per_row
    bad = batch.labelled[(~losses.detach().cpu().isfinite()) & (batch.labelled >= 0)]
    rows = bad // batch.segments.shape[1]
    numbers = first[rows] + batch.segments.flatten()[bad] - 1
    return ["/".join(batch.keys[number]) for number in numbers.unique().tolist()]
