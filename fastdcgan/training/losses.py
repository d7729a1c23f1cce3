"""The adversarial losses, on logits and in at least float32 whatever the nets' dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against one target for all (Goodfellow et al. 2014).

    Equal to BCELoss(sigmoid(logits), target), but finite for every finite logit.

    Args:
        logits: (B,), any floating dtype.
        target: 1.0 for "real", 0.0 for "fake".

    Returns:
        The mean over B: a scalar in float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
