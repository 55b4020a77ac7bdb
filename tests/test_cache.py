"""The tensor cache: keys, whole entries or none, sharing a folder, looking at it and pruning it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runs import Outcome
from tests.strategies import unhurried
from trainer import __version__
from trainer.data.cache import TensorCache, fingerprint
from trainer.data.cache_folder import (
    LEFT_OVER_SECONDS,
    beyond_limit,
    cache_root,
    left_overs,
    list_entries,
    unused_for,
)

KEY = fingerprint("a sample")
DAY = 24 * 60 * 60
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
        assert same(TensorCache(tmp_path).get(KEY), sample())


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


@settings(unhurried, max_examples=40)
@given(data=st.data())
def test_whatever_happens_to_a_file_an_entry_is_whole_or_none(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes turned, cut out and put in, in any place."""
    folder = tmp_path_factory.getbasetemp() / "hurt"
    cache, path = TensorCache(folder), folder / f"{KEY}.safetensors"
    cache.put(KEY, sample(), kind="latents", source="a.jpg")
    hurt = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(hurt[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # The header is where damage could be misread; it gets half of it.
        end = data.draw(st.sampled_from([header, len(hurt)]))
        place = data.draw(st.integers(0, max(end - 1, 0)))
        cut = data.draw(st.integers(0, 12))
        hurt[place : place + cut] = data.draw(st.binary(max_size=12))
    path.write_bytes(hurt)
    found = TensorCache(folder).get(KEY)
    assert found is None or same(found, sample())
    list_entries(folder)  # says what it can and raises nothing
    assert same(cache.get_or_make(KEY, sample), sample())


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":null,"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"sha256":"00"},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[]",
        b"[" * 60_000,
        b"",
    ],
)
def test_foreign_files_under_our_names_are_not_believed(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"{KEY}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert TensorCache(tmp_path).get(KEY) is None
    assert list_entries(tmp_path).entries == ()
    assert list_entries(tmp_path).strangers == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_believed(value: float, tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        cache = TensorCache(folder)
        cache.put(KEY, {"x": torch.tensor([1.0, value])})
        assert cache.get(KEY) is None
        assert (cache.hits, cache.misses) == (0, 1)


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ({"x": (2, 3)}, True),
        ({"x": (-1, 3)}, True),
        ({"x": (3, 2)}, False),
        ({"x": (2,)}, False),
        ({"x": (2, 3, 1)}, False),
        ({"y": (2, 3)}, False),
        ({"x": (2, 3), "y": (1,)}, False),
        ({}, False),
        (None, True),
    ],
)
def test_an_entry_of_another_shape_is_made_again(
    shapes: dict[str, tuple[int, ...]] | None, fits: bool, tmp_path: Path
) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"x": torch.zeros(2, 3)})
    assert (cache.get(KEY, shapes) is not None) == fits
    made = cache.get_or_make(KEY, lambda: {"x": torch.ones(2, 3)}, shapes=shapes)
    assert made["x"].sum() == (0 if fits else 6)


# --- a folder that is shared

WRITER = """
import sys, torch
from pathlib import Path
from trainer.data.cache import TensorCache, fingerprint
torch.set_num_threads(1)
for round_ in range(30):
    cache = TensorCache(Path(sys.argv[1]))
    for number in range(4):
        key = fingerprint(number)
        cache.put(key, {"x": torch.full((64, 64), float(number))}, kind="latents")
        assert not cache.notice, cache.notice
        print(number, flush=True)
"""


def test_threads_write_and_read_the_same_entries(tmp_path: Path) -> None:
    expected = [{"x": torch.full((64, 64), float(number))} for number in range(3)]

    def work(_: int) -> int:
        cache, found = TensorCache(tmp_path), 0
        for number in (0, 1, 2) * 4:
            got = cache.get(fingerprint(number))
            assert got is None or same(got, expected[number])
            found += got is not None
            cache.put(fingerprint(number), expected[number])
        assert cache.notice == ""
        return found

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) >= 4 * 9  # from the second round on
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{fingerprint(number)}.safetensors" for number in range(3))


@pytest.mark.slow
def test_two_runs_write_and_read_the_same_entries(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it is at work
        found = Counter[int]()
        while other.poll() is None:
            cache = TensorCache(tmp_path)
            for number in range(4):
                expected = {"x": torch.full((64, 64), float(number))}
                got = cache.get(fingerprint(number), {"x": (64, 64)})
                assert got is None or same(got, expected)
                found[number] += got is not None
                cache.put(fingerprint(number), expected, kind="latents")
            assert cache.notice == ""
        other.stdout.read()
    assert other.returncode == 0
    assert sum(found.values()) > 4
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{fingerprint(number)}.safetensors" for number in range(4))


def test_an_entry_that_another_run_reads_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to replace a file that is open."""
    TensorCache(tmp_path).put(KEY, sample())

    def in_use(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "replace", in_use)
    cache = TensorCache(tmp_path)
    cache.put(KEY, sample())
    assert cache.notice == ""
    (tmp_path / f"{KEY}.safetensors").write_bytes(b"damaged")
    cache.put(KEY, sample())
    assert "cannot be written (Permission denied)" in cache.notice
    assert same(cache.get(KEY), sample())
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"]


def test_left_overs_of_dead_runs_are_removed(tmp_path: Path) -> None:
    old, fresh = tmp_path / f".{KEY}.12-ab.tmp", tmp_path / f".{KEY}.13-ab.tmp"
    plain, foreign = tmp_path / f".{KEY}.14.tmp", tmp_path / ".notes.tmp"
    for path in (old, fresh, plain, foreign):
        path.write_bytes(b"half")
    for path in (old, plain, foreign):
        aged(path, LEFT_OVER_SECONDS + 60)
    assert set(left_overs(tmp_path)) == {old, plain}
    TensorCache(tmp_path).put(KEY, sample())
    assert {path.name for path in tmp_path.iterdir()} == {
        fresh.name,
        foreign.name,
        f"{KEY}.safetensors",
    }


def test_a_hit_renews_the_date_once_a_day(tmp_path: Path) -> None:
    cache, path = TensorCache(tmp_path), tmp_path / f"{KEY}.safetensors"
    cache.put(KEY, sample())
    for age, renewed in ((DAY // 2, False), (DAY * 2, True)):
        aged(path, age)
        before = path.stat().st_mtime
        assert cache.get(KEY) is not None
        assert (path.stat().st_mtime > before + 60) == renewed


# --- looking at it and pruning it


def aged(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def filled(folder: Path) -> list[Path]:
    """Four entries, last used 4, 3, 2 and 1 days ago, the doctor's facts, and strangers."""
    cache = TensorCache(folder)
    kinds = ("latents", "prompt", "weights", "prior")
    for number, kind in enumerate(kinds):
        tensors = {kind: torch.zeros(1000 * (number + 1))}
        cache.put(fingerprint(number), tensors, kind=kind, source=f"{number}.jpg")
    paths = [folder / f"{fingerprint(number)}.safetensors" for number in range(4)]
    for number, path in enumerate(paths):
        aged(path, (4 - number) * DAY)
    facts = folder / "facts" / KEY[:2] / f"{KEY}.json"
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"digest": KEY}), encoding="utf-8")
    aged(facts, DAY)
    for name in ("notes.txt", "lora.safetensors", f"{fingerprint(9)}.safetensors"):
        (folder / name).write_bytes(b"something else")
    (folder / "facts" / KEY[:2] / "notes.json").write_text("{}", encoding="utf-8")
    return [*paths, facts]


STRANGERS = 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(paths: list[Path]) -> list[int]:
    return [number for number, path in enumerate(paths) if path.exists()]


def test_entries_say_what_they_are(tmp_path: Path) -> None:
    TensorCache(tmp_path).put(KEY, sample(), kind="latents", source="\udc80Jos\u00e9" * 99)
    [entry] = list_entries(tmp_path).entries
    assert (entry.kind, entry.version) == ("latents", __version__)
    assert entry.source.startswith("?Jos\u00e9?")
    assert len(entry.source) == 200
    assert entry.made.startswith(time.strftime("%Y-", time.gmtime()))
    assert entry.size_bytes == entry.path.stat().st_size
    assert time.time() - entry.used < 60
    assert list_entries(tmp_path / "none").entries == ()


def test_what_was_used_last_is_kept_the_longest(tmp_path: Path) -> None:
    paths = filled(tmp_path)
    entries = list_entries(tmp_path).entries
    assert {entry.path for entry in unused_for(entries, 2.5)} == set(paths[:2])
    total = sum(entry.size_bytes for entry in entries)
    assert beyond_limit(entries, total) == []
    assert [entry.path for entry in beyond_limit(entries, total - 1)] == paths[:1]
    assert len(beyond_limit(entries, 0)) == len(entries) == 5


def test_the_command_shows_the_cache(cli: Callable[..., Outcome], folder: Path) -> None:
    assert cli("cache").done().out == f"Cache: {folder}\nIt is empty.\n"
    assert not folder.exists()
    paths = filled(folder)
    out = cli("cache").done().out
    today = time.strftime("%Y-%m-%d", time.gmtime())
    lines = out.splitlines()
    assert lines[0] == f"Cache: {folder}"
    assert lines[1].split() == ["entries", "size", "oldest", "newest"]
    rows = {line.strip().split("  ")[0]: line.split()[-5:] for line in lines[2:-1]}
    assert list(rows) == [
        "encoded photos",
        "weights of masks and faces",
        "encoded captions",
        "pictures of the class",
        "what was measured on photos",
        "in all",
    ]
    assert rows["encoded photos"] == ["1", "4.3", "kB", today, today]
    assert rows["in all"][0] == "5"
    assert lines[-1] == f"{STRANGERS} other files, damaged or not of this program: left alone."
    assert left(paths) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prune-days", "2.5"], [2, 3, 4]),
        (["--prune-days", "30"], [0, 1, 2, 3, 4]),
        (["--limit", "0.00004"], [1, 2, 3, 4]),
        (["--limit", "0"], []),
        (["--prune-days", "3.5", "--limit", "0.00002"], [3, 4]),
        (["--clear"], []),
    ],
)
def test_the_command_deletes_what_it_is_asked_to_and_nothing_else(
    flags: list[str], expected: list[int], cli: Callable[..., Outcome], folder: Path
) -> None:
    paths = filled(folder)
    sizes = [path.stat().st_size for path in paths]
    out = cli("cache", *flags).done().out
    assert left(paths) == expected
    gone = [size for number, size in enumerate(sizes) if number not in expected]
    entries = "1 entry" if len(gone) == 1 else f"{len(gone)} entries"
    assert out.startswith(f"Deleted {entries}, ")
    assert len(list_entries(folder).entries) == len(expected)
    assert list_entries(folder).strangers == STRANGERS
    assert (folder / "notes.txt").read_bytes() == b"something else"


def test_what_cannot_be_deleted_is_said(
    cli: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, unlink = filled(folder), Path.unlink

    def one_in_use(self: Path, missing_ok: bool = False) -> None:
        if self == paths[0]:
            raise PermissionError(13, "in use", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", one_in_use)
    out = cli("cache", "--clear").done().out
    assert "1 entry could not be deleted; another run may be reading it." in out
    assert left(paths) == [0]


@pytest.mark.parametrize("flag", ["--prune-days=-1", "--limit=nan", "--limit=inf", "--limit=-0.1"])
def test_numbers_without_sense_are_refused(
    flag: str, cli: Callable[..., Outcome], folder: Path
) -> None:
    paths = filled(folder)
    outcome = cli("cache", flag)
    assert outcome.code == 2
    assert "makes no sense" in outcome.err
    assert left(paths) == [0, 1, 2, 3, 4]


def test_links_are_not_followed_out_of_the_cache(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    filled(elsewhere)
    folder.mkdir()
    try:
        (folder / "facts").symlink_to(elsewhere / "facts", target_is_directory=True)
        (folder / f"{KEY}.safetensors").symlink_to(elsewhere / f"{fingerprint(0)}.safetensors")
    except OSError:
        pytest.skip("links need a privilege here")
    assert list_entries(folder).entries == ()
