"""How each family of models that turn a picture into text is asked, and what.

For a face the questions leave out who is shown, which the trigger word shall mean; for a style
they leave out how the picture is made. What is asked can always be given instead (`--prompt`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_CHAT_FACE = (
    "Describe this photo in one sentence, to train an image generator: expression, pose, clothing, "
    "what the person does, background, light and framing. Do not describe the person's face, hair, "
    "skin, age or name. Start directly."
)
_CHAT_STYLE = (
    "Describe in one sentence what this picture shows: who or what is in it, what they do, and "
    "where. Do not say how it is made: nothing about style, technique, medium or mood. Start "
    "directly."
)


@dataclass(frozen=True, slots=True)
class Family:
    """How models of a family are asked.

    way: `chat` by the chat template that comes with the model; `text` by a text beside the
        picture, none if it is empty; `begin` by tokens that the caption goes on from; `image` by
        the picture alone.
    face, style: what is asked, by kind.
    around: what stands around the question, in the place of `{prompt}`.
    tokens: a caption's length at most; CLIP reads 75 tokens of it, and other models' tokens are
        rarely shorter.
    """

    way: str
    face: str = ""
    style: str = ""
    around: str = "{prompt}"
    tokens: int = 60

    def prompt(self, kind: str) -> str:
        return self.face if kind == "face" else self.style


CHAT = Family("chat", _CHAT_FACE, _CHAT_STYLE, tokens=75)
_PLAIN = Family("text")
# LLaVA 1.5, whose first processors came without a chat template.
_OLD_CHAT = replace(CHAT, way="text", around="USER: <image>\n{prompt} ASSISTANT:")
# The tasks a model was trained on are all it understands.
_FLORENCE = Family("text", "<DETAILED_CAPTION>", "<DETAILED_CAPTION>", tokens=75)

FAMILIES = {
    "blip": _PLAIN,
    "blip-2": _PLAIN,
    "instructblip": replace(CHAT, way="text"),
    "git": Family("begin"),
    "vision-encoder-decoder": Family("image"),
    "florence2": _FLORENCE,
    "paligemma": Family("text", "caption en", "caption en", around="<image>{prompt}"),
    "kosmos-2": Family("text", "An image of", "An image of"),
    "llava": _OLD_CHAT,
    "vipllava": _OLD_CHAT,
}


def family_of(model_type: str, *, chat_template: bool) -> Family:
    """How a model is asked: as its chat template says, else as its family is, else by nothing."""
    return CHAT if chat_template else FAMILIES.get(model_type, _PLAIN)
