"""Attention in float32 whatever the number format: quicker on processors slow in others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend_in_float32(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
    """softmax(q k / sqrt(E)) v in PyTorch's own way, [B, H, T, E], given in the number format that
    was given."""
    mixed = F.scaled_dot_product_attention(q_BHTE.float(), k_BHTE.float(), v_BHTE.float())
    return mixed.to(q_BHTE.dtype)
