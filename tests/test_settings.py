"""Settings: files, layers and overrides; every mistake gets an answer that helps."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.config.known_names import KNOWN_ELSEWHERE
from trainer.config.presets import preset_path, prompts_path, shipped_folder
from trainer.config.reader import (
    Layer,
    Resolved,
    build_config,
    chosen,
    fill_unset,
    override_layer,
    parse_override,
    read_toml,
    to_toml,
)
from trainer.config.reference import render_settings
from trainer.config.settings import TrainConfig, section_models
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ALL_SETTINGS = [
    f"{section}.{name}"
    for section, model in section_models().items()
    for name in model.model_fields
]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def build(*overrides: str) -> TrainConfig:
    pairs = [parse_override(text) for text in overrides]
    return build_config([override_layer(pairs, "command line")]).config


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def value_of(config: TrainConfig, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return getattr(getattr(config, section), name)


# --- what is shipped


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_names_shipped_prompts(path: Path) -> None:
    config = build_config([read_toml(path, "preset")]).config
    assert path == preset_path(config.run.kind, embedded=path.stem.startswith("embedded-"))
    for name in (config.preview.prompts, config.objective.prior_prompts):
        assert prompts_path(name).parent == shipped_folder("prompts")


def test_there_is_a_preset_for_each_kind_and_base() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "face",
        "style",
        "embedded-face",
        "embedded-style",
    }


def test_the_settings_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == render_settings()


@pytest.mark.parametrize("dotted", ALL_SETTINGS)
def test_every_setting_has_a_sentence_and_stands_in_the_reference(dotted: str) -> None:
    section, _, name = dotted.partition(".")
    field = section_models()[section].model_fields[name]
    assert len(field.description or "") > 5
    assert f"| `{dotted}` |" in render_settings()


def test_the_sections_are_those_that_were_agreed() -> None:
    assert list(section_models()) == [
        "data",
        "caption",
        "model",
        "adapter",
        "optimizer",
        "objective",
        "run",
        "preview",
    ]


# --- layers


def test_later_layers_win_and_origins_are_told() -> None:
    layers = [
        Layer("preset face", {"adapter": {"rank": 8, "alpha": 4.0}, "run": {"seed": 1}}),
        Layer("mine.toml", {"adapter": {"rank": 12}}),
        override_layer([("run.seed", 3)], "command line"),
    ]
    resolved = build_config(layers)
    assert (resolved.config.adapter.rank, resolved.config.adapter.alpha) == (12, 4.0)
    assert resolved.config.run.seed == 3
    assert resolved.origins["adapter.rank"] == "mine.toml"
    assert resolved.origins["adapter.alpha"] == "preset face"
    assert resolved.origins["run.seed"] == "command line"
    assert resolved.origins["data.flip"] == "default"
    assert set(resolved.origins) == set(ALL_SETTINGS)


def test_of_two_overrides_of_one_setting_the_later_wins() -> None:
    assert build("run.seed=1", "run.seed=2").run.seed == 2


def test_only_what_nobody_set_is_filled_in() -> None:
    resolved = build_config([override_layer([("data.resolution", 128)], "command line")])
    filled = fill_unset(resolved, {"data.resolution": 512, "data.bucket_step_px": 64}, "by base")
    assert (filled.config.data.resolution, filled.config.data.bucket_step_px) == (128, 64)
    assert filled.origins["data.resolution"] == "command line"
    assert filled.origins["data.bucket_step_px"] == "by base"


def test_filling_in_says_what_does_not_fit() -> None:
    resolved = build("data.resolution=32")
    with pytest.raises(ConfigError, match="does not fit the base") as caught:
        fill_unset(
            Resolved(resolved, dict.fromkeys(ALL_SETTINGS, "default")),
            {"data.resolution": 32, "data.bucket_step_px": 64},
            "by base",
        )
    assert "data.resolution (32) is smaller than data.bucket_step_px (64)" in str(caught.value)


def test_the_kind_is_found_before_everything_is_checked() -> None:
    layers = [Layer("a", {"run": {"kind": "style"}}), Layer("b", {"run": "nonsense"})]
    assert chosen(layers, "run.kind", "face") == "style"
    assert chosen([], "run.kind", "face") == "face"
    assert chosen([Layer("a", {"run": {"kind": 3}})], "run.kind", "face") == "face"


# --- names that do not exist


def typos(dotted: str) -> Iterator[str]:
    """The setting's own name with one letter left out."""
    section, _, name = dotted.partition(".")
    for place in range(len(name)):
        yield f"{section}.{name[:place]}{name[place + 1 :]}"


def test_a_missing_letter_gets_the_right_suggestion() -> None:
    wrong = [
        (typo, message)
        for dotted in ALL_SETTINGS
        for typo in dict.fromkeys(typos(dotted))
        if typo not in ALL_SETTINGS
        if f"did you mean {dotted}?" not in (message := refusal(f"{typo}=1"))
    ]
    total = sum(len(dotted.partition(".")[2]) for dotted in ALL_SETTINGS)
    assert len(wrong) <= 0.05 * total, wrong


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimiser.learning_rate=1", "optimizer.learning_rate"),
        ("rank=8", "adapter.rank"),
        ("train.rank=8", "adapter.rank"),
        ("data.rank=8", "adapter.rank"),
        ("adapter.Rank=8", "adapter.rank"),
        ("adapter.rnak=8", "adapter.rank"),
        ("total_steps=8", "run.total_steps"),
    ],
)
def test_other_slips_get_a_suggestion_too(typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(typed)


def test_nonsense_gets_no_suggestion() -> None:
    message = refusal("qqqq.zzzz=1")
    assert "qqqq.zzzz (command line): no such setting" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(("foreign", "ours"), KNOWN_ELSEWHERE.items())
def test_names_of_other_trainers_lead_to_ours(foreign: str, ours: str) -> None:
    assert ours in ALL_SETTINGS
    assert foreign not in {dotted.partition(".")[2] for dotted in ALL_SETTINGS}
    for typed in (foreign, f"train.{foreign}"):
        assert f"here it is called {ours}" in refusal(f"{typed}=1")


# --- values that do not fit


def test_all_mistakes_come_at_once() -> None:
    message = refusal(
        "adapter.rnk=1",
        "adapter.rank=0",
        "run.seed=x",
        "data.flip=1",
        "optimizer.learning_rate=-1",
        "caption.trigger='two words'",
    )
    assert message.startswith("6 settings are wrong.")
    for name in ("adapter.rnk", "adapter.rank", "run.seed", "data.flip", "caption.trigger"):
        assert f"  {name} (command line): " in message
    assert "docs/settings.md" in message


def test_settings_that_contradict_each_other_are_all_named() -> None:
    message = refusal(
        "run.stop_at_step=9", "run.total_steps=8", "data.resolution=32", "data.bucket_step_px=64"
    )
    assert "run.stop_at_step (9) is beyond run.total_steps (8)" in message
    assert "data.resolution (32) is smaller than data.bucket_step_px (64)" in message


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("adapter.rank=true", "integer"),
        ("adapter.rank=8.0", "integer"),
        ("adapter.rank='8'", "integer"),
        ("adapter.rank=1e20", "integer"),
        ("adapter.rank=[8]", "integer"),
        ("adapter.rank={a=1}", "integer"),
        ("adapter.rank=2026-01-01", "integer"),
        ("adapter.rank=-3", "greater than or equal to 1"),
        ("adapter.rank=100000000000000000000", "less than or equal to 256"),
        ("adapter.rank=", "integer"),
        ("optimizer.learning_rate=nan", "finite"),
        ("optimizer.learning_rate=inf", "finite"),
        ("optimizer.learning_rate=1e20", "less than or equal to 1"),
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.learning_rate=true", "number"),
        ("optimizer.beta1=1", "less than 1"),
        ("data.flip=0", "boolean"),
        ("data.flip=yes", "boolean"),
        ("data.background=white", "a colour like '#ffffff'"),
        ("caption.trigger=a b", "one word without spaces"),
        ("caption.trigger=''", "at least 1 character"),
        ("run.name=a/b", "should be a file name"),
        ("run.name=../x", "should be a file name"),
        ("run.kind=cat", "'face' or 'style'"),
        ("model.precision=fp8", "'fp16'"),
        ("run.seed=-1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_refused_and_shown(typed: str, words: str) -> None:
    message = refusal(typed)
    assert message.startswith("A setting is wrong.")
    assert f"  {typed.partition('=')[0]} (command line): " in message
    assert words in message


def test_a_number_beyond_every_float_is_refused() -> None:
    assert "optimizer.learning_rate" in refusal(f"optimizer.learning_rate=1{'0' * 400}")


@pytest.mark.parametrize(
    "typed",
    [("data=3", "data.flip=true"), ("data.flip=true", "data=3"), ("data=3",), ("=3",), ("",)],
)
def test_an_override_that_names_a_section_or_nothing_is_refused(typed: tuple[str, ...]) -> None:
    refusal(*typed)


def test_an_override_without_a_value_says_how_to_write_it() -> None:
    assert "--set run.total_steps=800" in refusal("run.seed")


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("run.seed = 3", 3),
        ("adapter.alpha=8", 8.0),
        ("data.flip=true", True),
        ("caption.class_noun=old man", "old man"),
        ("caption.class_noun='true'", "true"),
        ("caption.class_noun=a=b", "a=b"),
        ('caption.class_noun="a # b"', "a # b"),
        (r"model.base=C:\models\sd15", r"C:\models\sd15"),
        ("optimizer.learning_rate=1e-4", 1e-4),
    ],
)
def test_overrides_are_toml_or_else_text(typed: str, value: object) -> None:
    assert value_of(build(typed), typed.partition("=")[0].strip()) == value


# --- files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file") as caught:
        read_toml(tmp_path / "mine.toml", "mine.toml")
    assert "mine.toml" in str(caught.value)


def test_bad_toml_is_shown_with_its_line_and_a_caret(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[adapter]\nrank = 8\nalpha = = 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        read_toml(path, "mine.toml")
    lines = str(caught.value).splitlines()
    (number,) = [n for n, line in enumerate(lines) if "alpha = = 2" in line]
    assert lines[number].strip().startswith("3: ")
    caret = lines[number + 1].index("^")
    assert lines[number][caret] == "="
    assert lines[number][:caret].endswith("alpha = ")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a = \xe4"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_toml(path, "mine.toml")
    assert "UTF-8" in str(caught.value)


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path, "mine.toml")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nseed = 5\n", encoding="utf-8-sig")
    assert build_config([read_toml(path, "mine.toml")]).config.run.seed == 5


@pytest.mark.parametrize("text", ["", "[", "a", '"""', "[a]\n[a]", "x = '", "é = 1", "a = 1\r"])
def test_odd_files_end_in_an_explanation_or_a_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode())
    where = "the file is fine"
    try:
        build_config([read_toml(path, "mine.toml")])
    except ConfigError as error:
        where = error.where
    assert where


# --- written and read again

TEXTS = st.text(min_size=1, max_size=20)
SETTINGS = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries({"max_aspect": st.floats(1.0, 4.0), "flip": st.booleans()}),
        "caption": st.fixed_dictionaries(
            {
                "class_noun": TEXTS,
                "template": TEXTS,
                "trigger": st.text("aä顔🙂'\"\\#=%$", min_size=1, max_size=9),
            }
        ),
        "adapter": st.fixed_dictionaries(
            {"rank": st.integers(1, 256), "alpha": st.floats(1e-300, 1024)}
        ),
        "optimizer": st.fixed_dictionaries(
            {"learning_rate": st.floats(5e-324, 1), "weight_decay": st.floats(0, 1)}
        ),
        "run": st.fixed_dictionaries({"name": st.text("aBä9._-", max_size=99).map("x{}".format)}),
    }
)


@unhurried
@given(values=SETTINGS, with_origins=st.booleans())
def test_settings_come_back_as_they_were_written(
    values: dict[str, dict[str, Any]], with_origins: bool
) -> None:
    resolved = build_config([Layer("test", values)])
    text = to_toml(resolved.config, resolved.origins if with_origins else None)
    again = build_config([Layer("file", tomllib.loads(text))]).config
    assert again == resolved.config


def test_written_settings_tell_where_each_came_from() -> None:
    resolved = build_config([override_layer([("run.seed", 3)], "command line")])
    lines = to_toml(resolved.config, resolved.origins).splitlines()
    assert "seed = 3  # command line" in lines
    assert "flip = false  # default" in lines
    # What is not decided yet is left out: TOML has no null.
    assert not any(line.startswith("resolution") for line in lines)


def test_defaults_are_written_and_read() -> None:
    assert build_config([Layer("file", tomllib.loads(to_toml(TrainConfig())))]).config == (
        TrainConfig()
    )


def test_settings_cannot_be_changed_afterwards() -> None:
    config = TrainConfig()
    with pytest.raises(Exception, match="frozen"):
        config.adapter.rank = 3
    assert math.isclose(config.adapter.alpha, 16.0)


# --- prompts files by name


def test_a_prompts_file_is_a_path_or_a_shipped_name(tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("x", encoding="utf-8")
    assert prompts_path(str(own)) == own
    assert prompts_path("face") == shipped_folder("prompts") / "face.txt"
    with pytest.raises(ConfigError, match="no such prompts file") as caught:
        prompts_path("facs")
    assert "face" in caught.value.fix
