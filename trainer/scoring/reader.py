"""How well pictures follow their prompts: which of the looks that a prompt names do they show?

A small net, trained on drawings of which everything is known, reads every look of an avatar from
its picture. It knows the drawings of the embedded base and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from trainer.errors import ModelError
from trainer.scoring.avatar_net import FOLDER, AvatarNet, load_net, run_net
from trainer.scoring.words import Phrases, named_looks

NAME = "reader"


@dataclass(frozen=True, slots=True)
class Cover:
    """A look that is partly hidden when another has one of some values.

    Values of a group then look the same; a group of all values says that nothing is to be seen.
    """

    look: str
    by: str
    values: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the reader's heads stand for.

    Args:
        looks: every look with its possible values, in the order of the net's outputs.
        phrases: what prompts say, see `words.named_looks`.
        absent: a look that is not there when another has one of some values: the look, the
            other, the values.
        covers: looks that are hidden in part.
    """

    looks: Mapping[str, tuple[str, ...]]
    phrases: Phrases
    absent: tuple[tuple[str, str, tuple[str, ...]], ...]
    covers: tuple[Cover, ...]


class PromptReader:
    """Reads looks from pictures of the embedded base."""

    def __init__(self, net: AvatarNet, knowledge: Knowledge) -> None:
        self._net = net
        self._knowledge = knowledge

    @classmethod
    def load(cls, folder: Path | None = None) -> Self:
        """Read the weights from a folder; None takes those that come with the trainer.

        Raises:
            ModelError: a file is missing or damaged.
        """
        folder = folder or FOLDER
        net, facts = load_net(folder, NAME)
        try:
            knowledge = _knowledge(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"What the reader's outputs stand for cannot be read: {error}",
                where=str(folder / f"{NAME}.json"),
                fix="Install again, or make it: python -m pretraining.reader",
            ) from error
        outputs = sum(len(values) for values in knowledge.looks.values())
        if outputs != net.head.out_features:
            raise ModelError(
                f"The reader's net has {net.head.out_features} outputs and its description names "
                f"{outputs}.",
                where=str(folder),
                fix="Copy both files of one release.",
            )
        return cls(net, knowledge)

    def names(self, prompt: str) -> dict[str, str]:
        """The looks that a prompt names, with their values."""
        return named_looks(prompt, self._knowledge.phrases)

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """Every picture's looks; those that are not there (a missing hat's colour) are left out."""
        outputs = run_net(self._net, images, mirrored=True)
        looks = self._knowledge.looks
        chosen = [
            part.argmax(dim=1).tolist()
            for part in outputs.split([len(values) for values in looks.values()], dim=1)
        ]
        found = []
        for number in range(len(images)):
            seen = {
                look: values[chosen[k][number]] for k, (look, values) in enumerate(looks.items())
            }
            for look, other, values in self._knowledge.absent:
                if seen[other] in values:
                    del seen[look]
            found.append(seen)
        return found

    def follow(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """The share of the looks named in its prompt that each picture shows.

        None where the prompt names nothing, or nothing that is to be seen in the picture.

        Raises:
            ValueError: not one prompt for every picture.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures need as many prompts, got {len(prompts)}")
        shares: list[float | None] = []
        for seen, prompt in zip(self.read(images), prompts, strict=True):
            right = list(self.compare(seen, self.names(prompt)).values())
            shares.append(sum(right) / len(right) if right else None)
        return shares

    def compare(self, seen: Mapping[str, str], named: Mapping[str, str]) -> dict[str, bool]:
        """For every named look that can be seen, whether the picture shows it."""
        result = {}
        for look, value in named.items():
            alike = self._alike(look, value, seen)
            if len(alike) < len(self._knowledge.looks[look]):
                result[look] = seen.get(look) in alike
        return result

    def _alike(self, look: str, value: str, seen: Mapping[str, str]) -> tuple[str, ...]:
        """The values of a look that cannot be told apart in a picture."""
        for cover in self._knowledge.covers:
            if cover.look == look and seen.get(cover.by) in cover.values:
                for group in cover.groups:
                    if value in group:
                        return group
        return (value,)


def _knowledge(facts: Mapping[str, Any]) -> Knowledge:
    return Knowledge(
        looks={look: tuple(values) for look, values in facts["looks"].items()},
        phrases=facts["phrases"],
        absent=tuple((look, other, tuple(values)) for look, other, values in facts["absent"]),
        covers=tuple(
            Cover(
                cover["look"],
                cover["by"],
                tuple(cover["values"]),
                tuple(tuple(group) for group in cover["groups"]),
            )
            for cover in facts["covers"]
        ),
    )
