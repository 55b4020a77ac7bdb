"""Sets of photos: what folders mean, and how much each set counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.data.sets import PhotoSet, Role, balanced, find_sets
from trainer.errors import ConfigError, DataError


def a_set(
    folder: Path,
    *,
    role: Role = "subject",
    repeats: int = 1,
    weight: float | None = None,
    recursive: bool = False,
) -> PhotoSet:
    return PhotoSet(
        name=folder.name,
        folder=folder,
        role=role,
        repeats=repeats,
        weight=weight,
        recursive=recursive,
        flip=False,
        trigger="ohwx",
        class_noun="person",
        template="{trigger} {class}",
    )


def with_photo(folder: Path) -> Path:
    """A folder with a file that is named as a photo; nothing here looks into it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jpg").touch()
    return folder


def found(
    main: PhotoSet, *further: PhotoSet, trigger_given: bool = False, class_given: bool = False
) -> tuple[PhotoSet, ...]:
    return find_sets(main, further, trigger_given=trigger_given, class_given=class_given)


def words(sets: Sequence[PhotoSet]) -> list[tuple[str, int, str, str]]:
    return [(s.name, s.repeats, s.trigger, s.class_noun) for s in sets]


def test_a_flat_folder_is_one_set(tmp_path: Path) -> None:
    main = a_set(with_photo(tmp_path))
    assert found(main) == (main,)
    # Photos of its own: the numbered folder beside them is none of the training's business.
    with_photo(tmp_path / "10_sks dog")
    assert found(main) == (main,)


def test_numbered_folders_are_sets(tmp_path: Path) -> None:
    for name in ("10_sks dog", "2_my_cat Maine Coon", "3_zyx", "1000_größe 犬", "2024_summer"):
        (tmp_path / name).mkdir()
    for name in ("10_sks dog", "2_my_cat Maine Coon", "3_zyx", "1000_größe 犬"):
        with_photo(tmp_path / name)
    (tmp_path / "log").mkdir()
    (tmp_path / ".hidden").mkdir()
    with_photo(tmp_path / ".hidden")
    main = a_set(tmp_path)
    sets = found(main)
    assert words(sets) == [
        ("2_my_cat Maine Coon", 2, "my_cat", "Maine Coon"),
        ("3_zyx", 3, "zyx", "person"),
        ("10_sks dog", 10, "sks", "dog"),
        ("1000_größe 犬", 1000, "größe", "犬"),
    ]
    assert [s.folder for s in sets] == [tmp_path / s.name for s in sets]
    assert {s.template for s in sets} == {main.template}
    assert words(found(replace(main, repeats=2)))[2] == ("10_sks dog", 20, "sks", "dog")


def test_what_the_user_gave_is_kept(tmp_path: Path) -> None:
    with_photo(tmp_path / "4_sks dog")
    main = a_set(tmp_path)
    assert words(found(main, trigger_given=True)) == [("4_sks dog", 4, "ohwx", "dog")]
    assert words(found(main, class_given=True)) == [("4_sks dog", 4, "sks", "person")]


def test_a_recursive_set_takes_its_sub_folders_whatever_their_names(tmp_path: Path) -> None:
    with_photo(tmp_path / "4_sks dog")
    main = a_set(tmp_path, recursive=True)
    assert found(main) == (main,)


def test_names_that_are_not_numbered_leave_the_folder_as_it_is(tmp_path: Path) -> None:
    for name in ("summer", "0_sks dog", "2024_summer", "5_", "5_ ", "_sks", "x_5"):
        with_photo(tmp_path / name)
    main = a_set(tmp_path)
    assert found(main) == (main,)


def test_photos_beside_numbered_folders_are_not_passed_over(tmp_path: Path) -> None:
    with_photo(tmp_path / "4_sks dog")
    with_photo(tmp_path / "holiday" / "beach")
    with pytest.raises(DataError) as caught:
        found(a_set(tmp_path))
    assert str(caught.value) == (
        "Some sub-folders have a number of repeats in their name ('10_ohwx person'), and some that "
        "hold photos do not.\n"
        f"  {tmp_path / 'holiday'}\n"
        "Rename these alike (such as '1_ohwx person') or move them elsewhere, or run with "
        "--set data.recursive=true to take all photos as one set."
    )


def test_a_trigger_that_would_mean_something_else_is_refused(tmp_path: Path) -> None:
    with_photo(tmp_path / "4_(sks) dog")
    with pytest.raises(DataError, match=r"trigger word '\(sks\)'"):
        found(a_set(tmp_path))
    assert words(found(a_set(tmp_path), trigger_given=True)) == [("4_(sks) dog", 4, "ohwx", "dog")]


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    with_photo(tmp_path / "photos" / "2_sks dog")
    try:
        (tmp_path / "photos" / "3_sks dog").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    assert [s.name for s in found(a_set(tmp_path / "photos"))] == ["2_sks dog"]


def test_further_sets_come_after_the_main_one(tmp_path: Path) -> None:
    main = a_set(with_photo(tmp_path / "photos"))
    other = a_set(with_photo(tmp_path / "other"), repeats=3)
    general = a_set(with_photo(tmp_path / "class"), role="class")
    assert found(main, other, general) == (main, other, general)


def test_a_folder_that_the_settings_name_is_no_numbered_set(tmp_path: Path) -> None:
    with_photo(tmp_path / "4_sks dog")
    general = a_set(with_photo(tmp_path / "1_dog"), role="class")
    sets = found(a_set(tmp_path), general)
    assert [(s.name, s.role) for s in sets] == [("4_sks dog", "subject"), ("1_dog", "class")]


def test_a_main_folder_that_only_holds_other_sets_is_none(tmp_path: Path) -> None:
    one, two = a_set(with_photo(tmp_path / "one")), a_set(with_photo(tmp_path / "two"))
    assert found(a_set(tmp_path), one, two) == (one, two)
    with_photo(tmp_path / "three")  # of no set: reading the main folder will say so
    assert found(a_set(tmp_path), one, two)[0].folder == tmp_path


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [with_photo(tmp_path / str(n) / "summer") for n in range(3)]
    main, *further = (a_set(folder) for folder in folders)
    assert [s.name for s in found(main, *further)] == ["summer", "summer (2)", "summer (3)"]


def test_no_photo_is_in_two_sets(tmp_path: Path) -> None:
    inner = with_photo(with_photo(tmp_path / "photos") / "inner")
    photos = tmp_path / "photos"
    same = a_set(photos / ".." / "photos")
    with pytest.raises(ConfigError, match="is used for two sets of photos"):
        found(a_set(photos), same)
    for main, other in ((photos, inner), (inner, photos)):
        sets = [a_set(main, recursive=True), a_set(other, recursive=True)]
        with pytest.raises(ConfigError) as caught:
            found(*sets)
        assert str(caught.value) == (
            f"The folder '{inner}' is inside the folder of another set, which takes its "
            "sub-folders too: its photos would count twice.\n"
            f"  data.sets: {photos}, {inner}\n"
            "Leave one of them out, or set recursive = false for the outer one."
        )
        assert len(found(*(replace(s, recursive=False) for s in sets))) == 2


def test_missing_folders_are_named(tmp_path: Path) -> None:
    main = a_set(with_photo(tmp_path / "photos"))
    with pytest.raises(DataError, match=r"(?s)no folder.*Did you mean.*photos"):
        found(a_set(tmp_path / "photo"))
    with pytest.raises(DataError, match="no folder"):
        found(a_set(tmp_path / "photo", recursive=True))
    with pytest.raises(DataError, match="no folder"):
        found(main, a_set(tmp_path / "other"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="is a file, not a folder"):
        found(main, a_set(tmp_path / "a.txt"))


def test_class_sets_alone_are_refused(tmp_path: Path) -> None:
    inside = a_set(with_photo(tmp_path / "1_dog"), role="class")
    with pytest.raises(ConfigError, match="only class sets"):
        found(a_set(tmp_path), inside)
    with pytest.raises(ConfigError, match="only class sets"):
        found(replace(inside, folder=with_photo(tmp_path / "x")))


def weighed(*sets: tuple[int, int, float | None], role: Role = "subject") -> list[float]:
    """Repeats and loss weights, flat, of sets given as (photos, repeats, weight)."""
    made = [a_set(Path("x"), role=role, repeats=r, weight=w) for _, r, w in sets]
    return [number for pair in balanced(made, [count for count, _, _ in sets]) for number in pair]


def test_without_weights_each_photo_counts_alike() -> None:
    assert weighed((10, 1, None), (200, 3, None)) == [1, 1.0, 3, 1.0]
    assert balanced((), ()) == ()


def test_weights_are_met_by_repeats_where_whole_numbers_can() -> None:
    assert weighed((10, 1, 1.0), (40, 1, 1.0)) == [4, 1.0, 1, 1.0]
    assert weighed((10, 1, 3.0), (10, 1, 1.0)) == [3, 1.0, 1, 1.0]
    assert weighed((10, 1, None), (10, 1, 0.5)) == [2, 1.0, 1, 1.0]
    assert weighed((10, 6, None), (10, 1, 0.5)) == [6, 1.0, 3, 1.0]
    assert weighed((1, 1, 7.0)) == [1, 1.0]


def test_the_loss_weight_makes_the_rest_exact() -> None:
    repeats, weight, others, rest = weighed((10, 1, 1.0), (14, 1, 1.0))
    assert (repeats, others) == (1, 1)
    assert 10 * weight == pytest.approx(14 * rest)
    assert 10 * weight + 14 * rest == pytest.approx(24)
    # 5 to 2.5 times: a whole number near it, and the loss for the remainder.
    repeats, weight, others, rest = weighed((10, 5, None), (10, 1, 0.5))
    assert (repeats, others) == (5, 2)
    assert 5 * weight == pytest.approx(2 * 2 * rest)


def test_an_epoch_stays_finite() -> None:
    repeats, weight, others, rest = weighed((1, 1, 1000.0), (100_000, 1, 0.001))
    assert (repeats, others) == (1000, 1)
    assert repeats * weight / (100_000 * others * rest) == pytest.approx(1e6)


def test_sets_are_balanced_within_their_role() -> None:
    subject = a_set(Path("a"))
    general = a_set(Path("b"), role="class")
    sets = [subject, replace(general, weight=2.0), subject, replace(general, weight=1.0)]
    assert balanced(sets, [5, 10, 7, 10]) == ((1, 1.0), (2, 1.0), (1, 1.0), (1, 1.0))


def test_a_set_without_photos_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="without photos"):
        weighed((0, 1, None))


@unhurried
@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(1, 20), st.none() | st.floats(0.05, 20)),
        min_size=1,
        max_size=5,
    )
)
def test_shares_follow_the_weights_exactly(sets: list[tuple[int, int, float | None]]) -> None:
    numbers = weighed(*sets)
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    assert all(
        isinstance(repeats, int) and repeats >= own
        for (repeats, _), (_, own, _) in zip(pairs, sets, strict=True)
    )
    trained = [
        count * repeats * weight
        for (count, _, _), (repeats, weight) in zip(sets, pairs, strict=True)
    ]
    if all(weight is None for _, _, weight in sets):
        assert {weight for _, weight in pairs} == {1.0}
        return
    shares = [1.0 if weight is None else weight for _, _, weight in sets]
    for amount, share in zip(trained, shares, strict=True):
        assert amount / sum(trained) == pytest.approx(share / sum(shares))
    counted = sum(c * r for (c, _, _), (r, _) in zip(sets, pairs, strict=True))
    assert sum(trained) == pytest.approx(counted)
