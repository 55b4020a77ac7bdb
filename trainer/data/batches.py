"""Which samples make up batch number n: a pure function of (seed, n).

Because nothing is drawn from a running generator, a resumed run, a run in two processes and a
test that asks for batch 1000 alone all see the same batches, and no sampler state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.types import Batch, CachedSample


@dataclass(frozen=True, slots=True)
class _Group:
    """The versions of one photo at one size, and how often one of them comes in an epoch."""

    name: str
    members: tuple[CachedSample, ...]
    times: int


class BatchPlan:
    """The batches of all epochs.

    In every epoch each group of samples (the versions of one photo at one size) occurs exactly
    `repeats` times its samples' own repeats, each time with one of its members: a mirrored or
    changed version takes the place of the plain one, it does not come in addition. All members
    have had their turn before one comes again. A batch holds samples of one shape (latents and
    prompt embeddings); the last batch of a shape may be smaller, so none is dropped. The batches
    of all shapes are shuffled together.

    The order follows from the seed and the names of samples and groups alone: it depends neither
    on the order of `samples` nor on the versions of Python and PyTorch, since it is that of SHA-256
    hashes.

    Args:
        samples: at least one, each with a key of its own; those of a group of one shape and with
            the same repeats.
        batch_size: samples per batch.
        seed: of the run.
        repeats: how many times each group occurs in an epoch, times its own repeats.

    Raises:
        ValueError: the arguments are not as said.
    """

    def __init__(
        self, samples: Sequence[CachedSample], batch_size: int, seed: int, repeats: int = 1
    ) -> None:
        if not samples or batch_size < 1 or repeats < 1:
            raise ValueError("a batch plan needs samples, a batch size and repeats of 1 or more")
        self._batch_size = batch_size
        self._seed = seed
        self._buckets: dict[str, list[_Group]] = {}
        for group in _groups(samples, repeats):
            self._buckets.setdefault(_shape_of(group.members[0]), []).append(group)
        self._epoch = -1
        self._order: list[list[CachedSample]] = []

    @property
    def batches_per_epoch(self) -> int:
        sizes = (sum(group.times for group in bucket) for bucket in self._buckets.values())
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
            order = self._ordered(epoch, bucket)
            for start in range(0, len(order), self._batch_size):
                rank = self._rank(epoch, shape, start)
                batches.append((rank, order[start : start + self._batch_size]))
        batches.sort(key=lambda item: item[0])
        return [samples for _, samples in batches]

    def _ordered(self, epoch: int, bucket: Sequence[_Group]) -> list[CachedSample]:
        """The samples of one shape in one epoch.

        The epoch goes over the bucket as often as its most repeated group comes, shuffled anew each
        time: that group comes again only after all others. The rarer ones are spread evenly.
        """
        passes = max(group.times for group in bucket)
        drawn = []
        for group in bucket:
            late = 0
            if group.times < passes:
                late = int(self._rank(epoch, "spread", group.name), 16) % passes
            for time in range(group.times):
                number = (time * passes + late) // group.times
                member = self._member(group, epoch * group.times + time)
                drawn.append((number, self._rank(epoch, number, group.name), member))
        drawn.sort(key=lambda item: item[:2])
        return [member for _, _, member in drawn]

    def _member(self, group: _Group, occurrence: int) -> CachedSample:
        """The version that a group shows at one of its occurrences, counted over all epochs."""
        cycle, place = divmod(occurrence, len(group.members))
        if len(group.members) == 1:
            return group.members[0]
        ranked = sorted(group.members, key=lambda s: self._rank(cycle, "version", s.key))
        return ranked[place]

    def _rank(self, *what: str | int) -> str:
        text = "/".join(str(part) for part in (self._seed, *what))
        return hashlib.sha256(text.encode()).hexdigest()


def _groups(samples: Iterable[CachedSample], repeats: int) -> list[_Group]:
    """The samples by group, sorted by name."""
    found: dict[str, dict[str, CachedSample]] = {}
    keys: set[str] = set()
    for sample in samples:
        if sample.key in keys:
            raise ValueError(f"two samples have the key {sample.key!r}")
        keys.add(sample.key)
        found.setdefault(sample.group or sample.key, {})[sample.key] = sample
    groups = []
    for name, by_key in sorted(found.items()):
        members = tuple(by_key[key] for key in sorted(by_key))
        if len({(_shape_of(member), member.repeats) for member in members}) > 1:
            raise ValueError(f"the samples of group {name!r} differ in shape or repeats")
        groups.append(_Group(name, members, repeats * members[0].repeats))
    return groups


def _shape_of(sample: CachedSample) -> str:
    prompt = None if sample.prompt_TD is None else tuple(sample.prompt_TD.shape)
    return f"{tuple(sample.latents_Chw.shape)} {prompt}"


def _stacked(samples: Sequence[CachedSample]) -> Batch:
    prompts: list[Tensor] = [s.prompt_TD for s in samples if s.prompt_TD is not None]
    pooled: list[Tensor] = [s.pooled_P for s in samples if s.pooled_P is not None]
    return Batch(
        latents_BChw=torch.stack([sample.latents_Chw for sample in samples]),
        samples=tuple(samples),
        prompt_BTD=torch.stack(prompts) if prompts else None,
        weights_Bhw=_weights(samples),
        pooled_BP=torch.stack(pooled) if pooled else None,
    )


def _weights(samples: Sequence[CachedSample]) -> Tensor | None:
    """[B, h, w] when any sample has weights; those without count alike everywhere."""
    if all(sample.weights_hw is None for sample in samples):
        return None
    return torch.stack(
        [
            torch.ones(s.latents_Chw.shape[1:]) if s.weights_hw is None else s.weights_hw
            for s in samples
        ]
    )
