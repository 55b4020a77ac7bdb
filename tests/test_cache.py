"""The tensor cache: keys, whole entries or none, and folders that cannot be written."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.strategies import unhurried
from trainer.data.cache import TensorCache, cache_root, fingerprint

KEY = fingerprint("a sample")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 8, 8, generator=generator),
        "prompt": torch.randn(7, 6, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "nothing": torch.zeros(0, 4),
    }


def same(left: dict[str, Tensor] | None, right: dict[str, Tensor]) -> bool:
    return (
        left is not None
        and left.keys() == right.keys()
        and all(
            left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
            for name in right
        )
    )


# --- the place


def test_the_environment_names_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x"
    monkeypatch.setenv("LIKENESS_CACHE", "~/x")
    assert cache_root() == Path.home() / "x"


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "{tmp}/xdg", "{tmp}/xdg/likeness"),
        ("linux", "XDG_CACHE_HOME", "relative", "{tmp}/home/.cache/likeness"),
        ("linux", "LIKENESS_CACHE", "", "{tmp}/home/.cache/likeness"),
        ("darwin", "XDG_CACHE_HOME", "{tmp}/xdg", "{tmp}/home/Library/Caches/likeness"),
        ("win32", "LOCALAPPDATA", "{tmp}/local", "{tmp}/local/likeness/cache"),
        ("win32", "LOCALAPPDATA", "", "{tmp}/home/AppData/Local/likeness/cache"),
    ],
)
def test_each_platform_has_its_cache_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    variable: str,
    value: str,
    expected: str,
) -> None:
    for name in ("LIKENESS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value.format(tmp=tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_root() == Path(expected.format(tmp=tmp_path))


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("LIKENESS_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_root().name == "likeness-cache"


# --- the keys


def test_fingerprints_tell_types_and_nesting_apart() -> None:
    inputs = [(1,), (1.0,), (True,), ("1",), (None,), (), ([],), ([1],), (1, 1), ("1,1",), ({},)]
    assert len({fingerprint(*parts) for parts in inputs}) == len(inputs)


def test_fingerprints_are_the_same_for_ever() -> None:
    """A change here would make every user's cache useless."""
    key = "d6d52fd15a78a5335bc1d606c363205cc1deb94dce02341f13cd38260c048b70"
    assert fingerprint("a", 1, 0.5, None, True, [1, "é"], {"b": 2, "a": 1}) == key


@unhurried
@given(PLAIN, PLAIN)
def test_fingerprints_depend_on_the_value_alone(left: object, right: object) -> None:
    assert fingerprint(left) == fingerprint(left)
    assert (fingerprint(left) == fingerprint(right)) == (repr(left) == repr(right)) or (
        sorted_repr(left) == sorted_repr(right)
    )


def sorted_repr(value: object) -> str:
    if isinstance(value, dict):
        return repr(sorted((key, sorted_repr(item)) for key, item in value.items()))
    if isinstance(value, list):
        return repr([sorted_repr(item) for item in value])
    return repr(value)


@pytest.mark.parametrize(
    "value", [Path("a"), b"a", {1: 2}, {"a": [object()]}, {1, 2}, torch.ones(1)]
)
def test_what_is_not_plain_has_no_fingerprint(value: object) -> None:
    with pytest.raises(TypeError, match="a fingerprint takes"):
        fingerprint("a", value)


@pytest.mark.parametrize("key", ["", "../x", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_only_fingerprints_are_keys(tmp_path: Path, key: str) -> None:
    cache = TensorCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="a cache key is a fingerprint"):
        cache.get(key)
    with pytest.raises(ValueError, match="a cache key is a fingerprint"):
        cache.put(key, sample())
    assert not (tmp_path / "cache").exists()


# --- the entries


def test_an_entry_comes_back_as_it_was_in_another_run(tmp_path: Path) -> None:
    first = TensorCache(tmp_path / "new" / "cache")
    assert first.get(KEY) is None
    first.put(KEY, sample())
    assert (first.hits, first.misses, first.notice) == (0, 1, "")
    second = TensorCache(tmp_path / "new" / "cache")
    assert same(second.get(KEY), sample())
    assert (second.hits, second.misses) == (1, 0)
    folder = tmp_path / "new" / "cache"
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.safetensors"]
    assert load_file(folder / f"{KEY}.safetensors").keys() == sample().keys()


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.ones(2, 3, requires_grad=True)[:, :2]}

    cache = TensorCache(tmp_path)
    first, second = cache.get_or_make(KEY, make), cache.get_or_make(KEY, make)
    assert (len(made), cache.hits, cache.misses) == (1, 1, 1)
    assert same(first, second)
    assert not first["x"].requires_grad
    assert first["x"].is_contiguous()


def test_tensors_that_share_memory_can_be_kept(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": base, "b": base[2:4], "c": base[:1].expand(5)})
    assert same(cache.get(KEY), {"a": base, "b": base[2:4], "c": torch.zeros(5)})


def test_changing_what_was_read_does_not_change_the_entry(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "cache", tmp_path / "file" / "cache"):
        cache = TensorCache(folder)
        cache.get_or_make(KEY, sample)["latents"].zero_()
        found = cache.get(KEY)
        assert found is not None
        found["latents"].zero_()
        assert same(cache.get(KEY), sample())


def test_a_cut_entry_is_made_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    path = tmp_path / f"{KEY}.safetensors"
    cache.put(KEY, sample())
    whole = path.read_bytes()
    lengths = [0, 1, 7, 8, 9, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert cache.get(KEY) is None
        assert same(cache.get_or_make(KEY, sample), sample())
        assert path.read_bytes() == whole


def test_an_altered_entry_is_made_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    path = tmp_path / f"{KEY}.safetensors"
    cache.put(KEY, sample())
    whole = path.read_bytes()
    draw = random.Random(1)
    for position in [*range(40), *draw.sample(range(len(whole)), 150)]:
        altered = bytearray(whole)
        altered[position] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        found = cache.get(KEY)
        assert found is None or same(found, sample())


def test_an_entry_of_other_origin_is_not_believed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / f"{KEY}.safetensors")
    assert TensorCache(tmp_path).get(KEY) is None


def test_an_interrupted_write_leaves_the_old_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, sample())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.put(KEY, {"x": torch.ones(2)})
    assert cache.notice == (
        f"The cache folder {tmp_path} cannot be written (No space left on device): what it would "
        "hold is kept in memory for this run. LIKENESS_CACHE can name another folder."
    )
    assert same(cache.get(KEY), {"x": torch.ones(2)})
    assert same(TensorCache(tmp_path).get(KEY), sample())
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"]


def test_a_folder_that_cannot_be_made_falls_back_to_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = TensorCache(tmp_path / "file" / "cache")
    assert cache.get(KEY) is None
    assert cache.notice == ""
    cache.put(KEY, sample())
    assert cache.notice.startswith(f"The cache folder {tmp_path / 'file' / 'cache'} cannot be")
    assert same(cache.get(KEY), sample())
    assert (cache.hits, cache.misses) == (1, 1)
    assert (tmp_path / "file").read_bytes() == b""
