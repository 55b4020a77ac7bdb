"""TOML files and `section.name=value` overrides become a `TrainConfig`; every error is listed.

Layers, each over the one before: defaults, preset, the user's TOML, the command line.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.known_names import KNOWN_ELSEWHERE, PATTERN_WORDS
from trainer.config.settings import TrainConfig, section_models
from trainer.errors import ConfigError
from trainer.untrusted import read_text, shortened

# Of a line or value that is wrong, as much is shown.
_SHOWN_CHARACTERS = 200
_SHOWN_PROBLEMS = 30

# What pydantic puts into a place where a value may be of several types.
TYPE_MARKS = ("constrained-int", "list[")


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings from one place: `values[section][name]`, and what to call the place."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of a run and where each came from (`origins["run.seed"] == "--set"`)."""

    config: TrainConfig
    origins: Mapping[str, str]


def read_toml(path: Path, origin: str) -> Layer:
    """Read one TOML file.

    Raises:
        ConfigError: it does not exist or is not TOML (the line is shown).
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(
            "There is no such settings file.", where=str(path), fix="Check the path after --config."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The settings file cannot be read: {error}",
            where=str(path),
            fix="It has to be a text file in UTF-8.",
        ) from error
    try:
        return Layer(origin, _anchored(parse_toml(text), path.parent))
    except ValueError as error:
        raise ConfigError(
            f"The settings file is not valid TOML: {error}",
            where=f"{path}\n{_marked_line(text, str(error))}".rstrip(),
            fix="A line looks like: rank = 16   (texts in quotes, true and false in small letters)",
        ) from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: it is no TOML, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _anchored(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The folders of further sets are named as seen from the settings file."""
    data = values.get("data")
    sets = data.get("sets") if isinstance(data, dict) else None
    for further in sets if isinstance(sets, list) else []:
        if isinstance(further, dict) and isinstance(further.get("folder"), str):
            named = Path(further["folder"]).expanduser()
            further["folder"] = str((folder / named).absolute())
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """`"run.seed=3"` -> `("run.seed", 3)`; what is not a TOML value is taken as text."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name:
        raise ConfigError(
            "A setting on the command line has no value.",
            where=f"--set {text}",
            fix="Write it like this: --set run.total_steps=800",
        )
    try:
        return name, parse_toml(f"value = {value}")["value"]
    except ValueError:
        return name, value


def override_layer(overrides: Iterable[tuple[str, Any]], origin: str) -> Layer:
    """Dotted names and their values as a layer; a name without a section is kept for the check."""
    values: dict[str, Any] = {}
    for dotted, value in overrides:
        section, dot, name = dotted.partition(".")
        if not dot:
            values[dotted] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
    return Layer(origin, values)


def build_config(layers: Sequence[Layer]) -> Resolved:
    """Put the layers over each other and check everything at once.

    Raises:
        ConfigError: lists every unknown name (with a suggestion) and every wrong value.
    """
    sections = section_models()
    merged: dict[str, dict[str, Any]] = {section: {} for section in sections}
    origins = {
        f"{section}.{name}": "default"
        for section, model in sections.items()
        for name in model.model_fields
    }
    problems: list[str] = []
    for layer in layers:
        for dotted, value in _flatten(layer):
            if dotted not in origins:
                # Looking for what was meant takes a while, so not for a thousand names.
                reason = _unknown(dotted, origins) if len(problems) < _SHOWN_PROBLEMS else ""
                name = shortened(dotted, _SHOWN_CHARACTERS)
                problems.append(f"{name} ({layer.origin}): {reason}")
                continue
            section, _, name = dotted.partition(".")
            merged[section][name] = value
            origins[dotted] = layer.origin
    config = None
    try:
        config = TrainConfig.model_validate(merged)
    except ValidationError as error:
        for problem in filter(_of_the_type_meant, error.errors()):
            problems += _explain(problem, origins).splitlines()
    if problems or config is None:
        beyond = len(problems) - _SHOWN_PROBLEMS
        more = [f"and {beyond} more"] if beyond > 0 else []
        count = f"{len(problems)} settings are" if len(problems) > 1 else "A setting is"
        raise ConfigError(
            f"{count} wrong.",
            where="\n".join([*problems[:_SHOWN_PROBLEMS], *more]),
            fix="All settings with their meaning and range: docs/settings.md",
        )
    return Resolved(config, origins)


def fill_unset(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Give settings that nobody set a value; the rest stays.

    Args:
        values: dotted names of settings whose default is None, and what they become.
        origin: who decided ("by base").

    Raises:
        ConfigError: the settings do not fit together now.
    """
    filled = {name: value for name, value in values.items() if resolved.origins[name] == "default"}
    return replace_values(resolved, filled, origin)


def replace_values(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Give settings another value; the rest stays. Arguments and errors as in `fill_unset`."""
    merged = resolved.config.model_dump()
    for dotted, value in values.items():
        section, _, name = dotted.partition(".")
        merged[section][name] = value
    origins = {**resolved.origins, **dict.fromkeys(values, origin)}
    try:
        return Resolved(TrainConfig.model_validate(merged), origins)
    except ValidationError as error:
        problems = [_explain(problem, origins) for problem in error.errors()]
        place = "the base" if origin == "by base" else f"what else is set (it is from {origin})"
        raise ConfigError(f"A setting does not fit {place}.", where="\n".join(problems)) from error


def chosen(layers: Sequence[Layer], dotted: str, default: str) -> str:
    """The value that a text setting will have, before everything is checked.

    The preset depends on `run.kind` and `model.base`, which may stand in any layer above it.
    """
    section, _, name = dotted.partition(".")
    for layer in reversed(layers):
        values = layer.values.get(section)
        if isinstance(values, Mapping) and isinstance(values.get(name), str):
            return str(values[name])
    return default


def to_toml(config: TrainConfig, origins: Mapping[str, str] | None = None) -> str:
    """The settings as TOML, each with its origin as a comment when `origins` is given."""
    blocks = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines = [f"[{section}]"]
        tables = []
        for name, value in values.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                tables += [_table(f"{section}.{name}", row) for row in value]
                continue
            comment = f"  # {origins[f'{section}.{name}']}" if origins else ""
            lines.append(f"{name} = {_toml_value(value)}{comment}")
        blocks += ["\n".join(lines), *tables]
    return "\n\n".join(blocks) + "\n"


def _table(name: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join([f"[[{name}]]", *lines])


def _toml_value(value: object) -> str:
    # JSON's texts, numbers, true and false are TOML's too, but for the character "delete".
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flatten(layer: Layer) -> Iterable[tuple[str, Any]]:
    for section, values in layer.values.items():
        if isinstance(values, Mapping):
            for name, value in values.items():
                yield f"{section}.{name}", value
        else:
            yield section, values


def _unknown(dotted: str, known: Mapping[str, str]) -> str:
    name = dotted.rpartition(".")[2]
    if name in KNOWN_ELSEWHERE:
        return f"no such setting; here it is called {KNOWN_ELSEWHERE[name]}"
    same_name = [setting for setting in known if setting.rpartition(".")[2] == name]
    near = (
        same_name
        or difflib.get_close_matches(dotted, known, n=1, cutoff=0.7)
        or [
            setting
            for setting in known
            if difflib.get_close_matches(name, [setting.rpartition(".")[2]], cutoff=0.75)
        ]
    )
    return f"no such setting; did you mean {near[0]}?" if near else "no such setting"


def _of_the_type_meant(problem: Any) -> bool:
    """False for what pydantic says of the other type where a value may be of two."""
    of_two = any(str(part).startswith(TYPE_MARKS) for part in problem["loc"])
    kind = "int_type" if isinstance(problem["input"], list) else "list_type"
    return not (of_two and problem["type"] == kind)


def _explain(problem: Any, origins: Mapping[str, str]) -> str:
    place = [str(part) for part in problem["loc"] if not str(part).startswith(TYPE_MARKS)]
    dotted = ".".join(place[:2])
    inside = ".".join(place[2:])  # of a further set: its number and the setting
    if problem["type"] == "extra_forbidden" and inside:
        return f"{dotted}.{inside} ({origins.get(dotted, '')}): no such setting of a set"
    if not dotted:
        return str(problem["msg"]).removeprefix("Value error, ")
    message = str(problem["msg"])
    if problem["type"] == "string_pattern_mismatch":
        message = PATTERN_WORDS["caption.trigger" if inside else dotted]
    message = message[:1].lower() + message[1:]
    message = message.removeprefix("value error, ").replace("input should", "should")
    given = "" if isinstance(problem["input"], dict) else f", not {_repr(problem['input'])}"
    name = f"{dotted}.{inside}" if inside else dotted
    return f"{name} ({origins.get(dotted, '')}): {message}{given}"


def _repr(value: object) -> str:
    try:
        return shortened(repr(value), _SHOWN_CHARACTERS)
    except (RecursionError, ValueError):  # nested deeply; a number of thousands of digits
        return f"such a {type(value).__name__}"


def _marked_line(text: str, message: str) -> str:
    """The line that tomllib's message names, with a caret under the column."""
    words = message.replace(",", " ").replace(")", " ").split()
    if "line" not in words or "column" not in words:
        return ""
    line = int(words[words.index("line") + 1])
    column = int(words[words.index("column") + 1])
    lines = text.splitlines()
    if not 1 <= line <= len(lines):
        return ""
    if len(lines[line - 1]) > _SHOWN_CHARACTERS:
        return f"{line}: {shortened(lines[line - 1], _SHOWN_CHARACTERS)}"
    return f"{line}: {lines[line - 1]}\n{' ' * (len(str(line)) + 1 + column)}^"
