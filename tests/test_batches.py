"""The batch plan: a pure function of (seed, index) that drops and repeats nothing unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.data.batches import BatchPlan
from trainer.types import Batch, CachedSample

SHAPES = ((4, 2, 2), (4, 2, 3), (4, 3, 2))


def sample(
    name: str,
    shape: Sequence[int] = SHAPES[0],
    *,
    tokens: int | None = None,
    group: str = "",
    repeats: int = 1,
) -> CachedSample:
    prompt = None if tokens is None else torch.full((tokens, 3), float(len(name)))
    latents = torch.full(tuple(shape), float(sum(name.encode())))
    texts = (f"caption of {name}",)
    return CachedSample(name, latents, texts, prompt, group=group, repeats=repeats)


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
            assert batch.samples[row] is by_key[key]
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


def test_two_samples_of_one_name_are_refused() -> None:
    """They would share every random draw, and one would be lost in its group."""
    with pytest.raises(ValueError, match="two samples have the key 'same'"):
        BatchPlan([sample("same"), sample("other"), sample("same")], 4, seed=0)


def test_prompt_embeddings_are_stacked_with_their_samples() -> None:
    samples = [sample("a", tokens=7), sample("bb", tokens=7), sample("ccc", tokens=14)]
    batches = epoch(BatchPlan(samples, 4, seed=0), 0)
    assert sorted(len(batch.keys) for batch in batches) == [1, 2]
    for batch in batches:
        assert batch.prompt_BTD is not None
        assert batch.prompt_BTD[:, 0, 0].tolist() == [len(key) for key in batch.keys]
    assert BatchPlan([sample("a")], 1, seed=0).batch(0).prompt_BTD is None


def test_weights_are_stacked_where_any_sample_has_them() -> None:
    weights = torch.tensor([[0.5, 1.5], [2.0, 0.0]])
    masked = replace(sample("a"), weights_hw=weights)
    batch = BatchPlan([masked, sample("b")], 2, seed=0).batch(0)
    assert batch.weights_Bhw is not None
    by_key = dict(zip(batch.keys, batch.weights_Bhw, strict=True))
    assert torch.equal(by_key["a"], weights)
    assert torch.equal(by_key["b"], torch.ones(2, 2))
    assert BatchPlan([sample("a"), sample("b")], 2, seed=0).batch(0).weights_Bhw is None


groups = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(SHAPES), st.integers(1, 4), st.integers(1, 5)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 5),
    st.integers(0, 2**63),
    st.integers(1, 3),
)


@unhurried
@given(groups)
def test_each_group_occurs_as_often_as_asked_and_its_members_in_turn(
    drawn: tuple[list[tuple[tuple[int, int, int], int, int]], int, int, int],
) -> None:
    described, batch_size, seed, repeats = drawn
    samples = [
        sample(f"g{n}-{m}", shape, group=f"g{n}", repeats=own)
        for n, (shape, members, own) in enumerate(described)
        for m in range(members)
    ]
    plan = BatchPlan(samples, batch_size, seed, repeats)
    seen: dict[str, list[str]] = {f"g{n}": [] for n in range(len(described))}
    for number in range(5):
        batches = epoch(plan, number)
        chosen = [item for batch in batches for item in batch.samples]
        counts = Counter(item.group for item in chosen)
        assert counts == {f"g{n}": own * repeats for n, (_, _, own) in enumerate(described)}
        for item in chosen:
            seen[item.group].append(item.key)
        for batch in batches:
            assert len({item.latents_Chw.shape for item in batch.samples}) == 1
        for n, (_, members, _) in enumerate(described):
            used = Counter({f"g{n}-{m}": 0 for m in range(members)})
            used.update(seen[f"g{n}"])
            assert max(used.values()) - min(used.values()) <= 1
    again = BatchPlan(samples[::-1], batch_size, seed, repeats)
    assert keys_of(again, 4) == keys_of(plan, 4)


def test_versions_take_turns_in_another_order_each_time() -> None:
    samples = [sample(f"v{n}", group="photo") for n in range(4)]
    plan = BatchPlan(samples, 1, seed=0)
    assert plan.batches_per_epoch == 1
    cycles = [tuple(plan.batch(4 * c + n).keys[0] for n in range(4)) for c in range(30)]
    assert all(sorted(cycle) == ["v0", "v1", "v2", "v3"] for cycle in cycles)
    assert len(set(cycles)) > 10
    first = Counter(cycle[0] for cycle in cycles)
    assert set(first) == {"v0", "v1", "v2", "v3"}


def test_groups_take_their_turns_apart_from_each_other() -> None:
    """Not all photos are mirrored in the same epoch."""
    samples = [sample(key, group=f"g{n}") for n in range(12) for key in (f"g{n}", f"g{n}+flip")]
    mirrored = [
        sum(
            key.endswith("+flip")
            for keys in keys_of(BatchPlan(samples, 4, seed=2), number)
            for key in keys
        )
        for number in range(4)
    ]
    assert all(2 <= count <= 10 for count in mirrored)
    assert mirrored[0] + mirrored[1] == mirrored[2] + mirrored[3] == 12


def test_a_name_for_the_group_changes_nothing_for_single_versions() -> None:
    plain = [sample(name, SHAPES[name > "d"]) for name in "abcdefg"]
    grouped = [replace(item, group=item.key) for item in plain]
    for number in range(3):
        one, two = (BatchPlan(samples, 2, seed=7, repeats=2) for samples in (plain, grouped))
        assert keys_of(one, number) == keys_of(two, number)
    own = [replace(item, repeats=2) for item in plain]
    assert keys_of(BatchPlan(own, 2, seed=7), 3) == keys_of(one, 3)


def test_rare_photos_are_spread_among_the_repeated_ones() -> None:
    samples = [sample(f"often{n}", repeats=10) for n in range(3)]
    samples += [sample(f"rare{n}") for n in range(10)]
    places = []
    for seed in range(20):
        plan = BatchPlan(samples, 40, seed)
        (batch,) = epoch(plan, 0)
        places += [n for n, key in enumerate(batch.keys) if key.startswith("rare")]
    assert abs(sum(places) / len(places) - 19.5) < 3
    # Of four in a row, no photo comes three times.
    keys = batch.keys
    assert all(max(Counter(keys[n : n + 4]).values()) <= 2 for n in range(len(keys)))


def test_nonsense_is_refused() -> None:
    for samples, batch_size, repeats in (([], 1, 1), ([sample("a")], 0, 1), ([sample("a")], 1, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            BatchPlan(samples, batch_size, 0, repeats)
    with pytest.raises(IndexError, match="not -1"):
        BatchPlan([sample("a")], 1, seed=0).batch(-1)
    for other in (sample("b", SHAPES[1], group="g"), sample("b", group="g", repeats=2)):
        with pytest.raises(ValueError, match="group 'g' differ"):
            BatchPlan([sample("a", group="g"), other], 1, seed=0)
