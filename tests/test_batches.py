"""The batch plan: a pure function of (seed, index) that drops and repeats nothing unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.data.batches import BatchPlan
from trainer.types import Batch, CachedSample

SHAPES = ((4, 2, 2), (4, 2, 3), (4, 3, 2))


def sample(name: str, shape: Sequence[int] = SHAPES[0], tokens: int | None = None) -> CachedSample:
    prompt = None if tokens is None else torch.full((tokens, 3), float(len(name)))
    latents = torch.full(tuple(shape), float(sum(name.encode())))
    return CachedSample(name, latents, f"caption of {name}", prompt)


def epoch(plan: BatchPlan, number: int) -> list[Batch]:
    count = plan.batches_per_epoch
    return [plan.batch(index) for index in range(number * count, (number + 1) * count)]


def keys_of(plan: BatchPlan, number: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in epoch(plan, number)]


plans = st.tuples(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=14),
    st.integers(1, 5),
    st.integers(0, 2**63),
    st.integers(1, 3),
)


@unhurried
@given(plans, st.integers(0, 1000))
def test_each_sample_occurs_exactly_as_often_as_asked(
    drawn: tuple[list[tuple[int, int, int]], int, int, int], number: int
) -> None:
    shapes, batch_size, seed, repeats = drawn
    samples = [sample(f"s{n}", shape) for n, shape in enumerate(shapes)]
    plan = BatchPlan(samples, batch_size, seed, repeats)
    batches = epoch(plan, number)
    counts = Counter(key for batch in batches for key in batch.keys)
    assert counts == {s.key: repeats for s in samples}
    by_key = {s.key: s for s in samples}
    partial: Counter[torch.Size] = Counter()
    for batch in batches:
        assert 1 <= len(batch.keys) <= batch_size
        partial[batch.latents_BChw.shape[1:]] += len(batch.keys) < batch_size
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.latents_BChw[row], by_key[key].latents_Chw)
            assert batch.texts[row] == by_key[key].text
    assert max(partial.values()) <= 1
    assert {plan.epoch_of(number * len(batches) + n) for n in range(len(batches))} == {number}


@unhurried
@given(plans, st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_index_alone(
    drawn: tuple[list[tuple[int, int, int]], int, int, int], indexes: list[int]
) -> None:
    shapes, batch_size, seed, repeats = drawn
    samples = [sample(f"s{n}", shape) for n, shape in enumerate(shapes)]
    used = BatchPlan(samples, batch_size, seed, repeats)
    for index in indexes:
        fresh = BatchPlan(samples[::-1], batch_size, seed, repeats)
        assert used.batch(index).keys == fresh.batch(index).keys


def test_the_order_is_the_same_for_ever() -> None:
    """A change here would break the resuming of every run begun before it."""
    samples = [sample(name, SHAPES[name > "d"]) for name in "abcdefg"]
    order = ["".join(keys) for keys in keys_of(BatchPlan(samples, 2, seed=7, repeats=2), 3)]
    assert order == ["gf", "da", "ab", "dc", "ee", "cb", "fg"]


def test_epochs_and_seeds_differ() -> None:
    samples = [sample(f"s{n}") for n in range(12)]
    plan = BatchPlan(samples, 2, seed=1)
    orders = [keys_of(plan, n) for n in range(4)]
    orders.append(keys_of(BatchPlan(samples, 2, seed=2), 0))
    assert all(left != right for n, left in enumerate(orders) for right in orders[:n])


def test_every_place_in_an_epoch_is_equally_likely() -> None:
    plan = BatchPlan([sample(name) for name in "abcd"], 1, seed=3)
    first = Counter(plan.batch(4 * number).keys[0] for number in range(2000))
    assert all(abs(first[name] - 500) < 100 for name in "abcd")


def test_batches_of_different_shapes_are_mixed() -> None:
    samples = [sample(f"s{n}", SHAPES[n % 2]) for n in range(40)]
    plan = BatchPlan(samples, 2, seed=5)
    widths = [batch.latents_BChw.shape[-1] for batch in epoch(plan, 0)]
    changes = sum(left != right for left, right in zip(widths, widths[1:], strict=False))
    assert changes >= 4


def test_a_repeated_sample_waits_for_all_others() -> None:
    plan = BatchPlan([sample(f"s{n}") for n in range(6)], 3, seed=1, repeats=4)
    assert all(len(set(batch.keys)) == 3 for batch in epoch(plan, 0))


def test_equal_photos_both_take_part() -> None:
    plan = BatchPlan([sample("same"), sample("same"), sample("other")], 4, seed=0)
    assert sorted(plan.batch(0).keys) == ["other", "same", "same"]


def test_prompt_embeddings_are_stacked_with_their_samples() -> None:
    samples = [sample("a", tokens=7), sample("bb", tokens=7), sample("ccc", tokens=14)]
    batches = epoch(BatchPlan(samples, 4, seed=0), 0)
    assert sorted(len(batch.keys) for batch in batches) == [1, 2]
    for batch in batches:
        assert batch.prompt_BTD is not None
        assert batch.prompt_BTD[:, 0, 0].tolist() == [len(key) for key in batch.keys]
    assert BatchPlan([sample("a")], 1, seed=0).batch(0).prompt_BTD is None


def test_nonsense_is_refused() -> None:
    for samples, batch_size, repeats in (([], 1, 1), ([sample("a")], 0, 1), ([sample("a")], 1, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            BatchPlan(samples, batch_size, 0, repeats)
    with pytest.raises(IndexError, match="not -1"):
        BatchPlan([sample("a")], 1, seed=0).batch(-1)
