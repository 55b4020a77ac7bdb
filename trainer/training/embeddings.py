"""Prompt embeddings of several texts put together, whatever their length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.types import Prompts


def filled(prompts: Prompts, tokens: int, empty: Prompts) -> Prompts:
    """As long as `tokens`, the rest being chunks of the empty text.

    Args:
        prompts: of B texts, T tokens each.
        tokens: a multiple of the length of a chunk, at least T.
        empty: of one empty text: a chunk [1, L, D].
    """
    embeddings_BTD, chunk_1LD = prompts.embeddings_BTD, empty.embeddings_BTD
    batch, length, _ = embeddings_BTD.shape
    missing = (tokens - length) // chunk_1LD.shape[1]
    if missing == 0:
        return prompts
    rest_BRD = chunk_1LD.to(embeddings_BTD).repeat(batch, missing, 1)
    return Prompts(torch.cat([embeddings_BTD, rest_BRD], dim=1), prompts.pooled_BP)


def together(parts: Sequence[Prompts], empty: Prompts) -> Prompts:
    """All texts of the parts, in their order, each filled up to the longest; see `filled`."""
    tokens = max(part.embeddings_BTD.shape[1] for part in parts)
    full = [filled(part, tokens, empty) for part in parts]
    pooled = [part.pooled_BP for part in full if part.pooled_BP is not None]
    return Prompts(
        torch.cat([part.embeddings_BTD for part in full]), torch.cat(pooled) if pooled else None
    )


def with_dropped(prompts: Prompts, keep: Sequence[bool], empty: Prompts) -> Prompts:
    """The texts, those that are not kept being the empty one; see `filled`."""
    keep_B = torch.tensor(keep)
    none = filled(empty, prompts.embeddings_BTD.shape[1], empty)
    pooled_BP = prompts.pooled_BP
    if pooled_BP is not None and none.pooled_BP is not None:
        pooled_BP = torch.where(keep_B[:, None], pooled_BP, none.pooled_BP)
    embeddings_BTD = torch.where(keep_B[:, None, None], prompts.embeddings_BTD, none.embeddings_BTD)
    return Prompts(embeddings_BTD, pooled_BP)
