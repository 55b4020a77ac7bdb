"""Which samples make up batch number n: a pure function of (seed, n).

Because nothing is drawn from a running generator, a resumed run, a run in two processes and a
test that asks for batch 1000 alone all see the same batches, and no sampler state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.types import Batch, CachedSample


class BatchPlan:
    """The batches of all epochs.

    In every epoch each sample occurs exactly `repeats` times. A batch holds samples of one shape
    (latents and prompt embeddings); the last batch of a shape may be smaller, so none is dropped.
    The batches of all shapes are shuffled together.

    The order follows from the seed and the samples' keys alone: it depends neither on the order
    of `samples` nor on the versions of Python and PyTorch, since it is that of SHA-256 hashes.

    Args:
        samples: at least one.
        batch_size: samples per batch.
        seed: of the run.
        repeats: how many times each sample occurs in an epoch.
    """

    def __init__(
        self, samples: Sequence[CachedSample], batch_size: int, seed: int, repeats: int = 1
    ) -> None:
        if not samples or batch_size < 1 or repeats < 1:
            raise ValueError("a batch plan needs samples, a batch size and repeats of 1 or more")
        self._batch_size = batch_size
        self._seed = seed
        self._repeats = repeats
        self._buckets: dict[str, list[CachedSample]] = {}
        for sample in sorted(samples, key=lambda s: (s.key, s.text)):
            self._buckets.setdefault(_shape_of(sample), []).append(sample)
        self._epoch = -1
        self._order: list[list[CachedSample]] = []

    @property
    def batches_per_epoch(self) -> int:
        sizes = (len(bucket) * self._repeats for bucket in self._buckets.values())
        return sum(-(-size // self._batch_size) for size in sizes)

    def epoch_of(self, index: int) -> int:
        """The epoch, from 0, that batch `index` belongs to."""
        if index < 0:
            raise IndexError(f"batches are counted from 0, not {index}")
        return index // self.batches_per_epoch

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0 through all epochs; there is no last one."""
        epoch = self.epoch_of(index)
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
            self._epoch = epoch
        return _stacked(self._order[index % self.batches_per_epoch])

    def _shuffled(self, epoch: int) -> list[list[CachedSample]]:
        batches: list[tuple[str, list[CachedSample]]] = []
        for shape, bucket in sorted(self._buckets.items()):
            # One shuffle per repeat: a sample comes again only after all others of its bucket.
            order = [
                sample
                for repeat in range(self._repeats)
                for sample in sorted(bucket, key=lambda s: self._rank(epoch, repeat, s.key))
            ]
            for start in range(0, len(order), self._batch_size):
                rank = self._rank(epoch, shape, start)
                batches.append((rank, order[start : start + self._batch_size]))
        batches.sort(key=lambda item: item[0])
        return [samples for _, samples in batches]

    def _rank(self, epoch: int, *what: str | int) -> str:
        text = "/".join(str(part) for part in (self._seed, epoch, *what))
        return hashlib.sha256(text.encode()).hexdigest()


def _shape_of(sample: CachedSample) -> str:
    prompt = None if sample.prompt_TD is None else tuple(sample.prompt_TD.shape)
    return f"{tuple(sample.latents_Chw.shape)} {prompt}"


def _stacked(samples: list[CachedSample]) -> Batch:
    prompts: list[Tensor] = [s.prompt_TD for s in samples if s.prompt_TD is not None]
    return Batch(
        latents_BChw=torch.stack([sample.latents_Chw for sample in samples]),
        texts=tuple(sample.text for sample in samples),
        keys=tuple(sample.key for sample in samples),
        prompt_BTD=torch.stack(prompts) if prompts else None,
    )
