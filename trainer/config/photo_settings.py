"""The settings of photos and captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.fields import TRIGGER, Section, setting

Resolution = Annotated[int, Field(ge=32, le=2048)]


class SetSettings(Section):
    """A further set of photos: `[[data.sets]]` in a settings file. Unset: as in the main set."""

    folder: str = setting(..., "folder of the set, from the settings file's own", min_length=1)
    role: Literal["subject", "class"] = setting(
        "subject",
        "subject = learned like the main set; class = pictures of the class in general, which take "
        "the place of those that the base draws",
    )
    repeats: int = setting(1, "how often each photo comes in an epoch", ge=1, le=1000)
    weight: float | None = setting(
        None,
        "the set's share of the training beside the other sets', whatever their numbers of photos; "
        "where any set has one, others count as 1; where none has, each photo counts alike",
        gt=0,
        le=1000,
    )
    recursive: bool | None = setting(None, "look for photos in sub-folders too")
    flip: bool | None = setting(None, "train on mirrored photos too")
    trigger: str | None = setting(
        None, "the trigger word of this set", min_length=1, max_length=64, pattern=TRIGGER
    )
    class_noun: str | None = setting(
        None, "what its photos show in general", min_length=1, max_length=64
    )
    template: str | None = setting(None, "caption of its photos that have no other", min_length=1)


class DataSettings(Section):
    """Which photos, and how they become training pictures."""

    resolution: Resolution | list[Resolution] | None = setting(
        None,
        "side of a square training picture; other shapes get the same area; a list such as "
        "[512, 768] trains every photo at each; default by base",
        "px",
    )
    bucket_step_px: int | None = setting(
        None,
        "sides of training pictures are multiples of this; default by base "
        "(64 for real bases, 16 for the embedded one)",
        "px",
        ge=8,
        le=256,
    )
    max_aspect: float = setting(
        2.0, "longest side over shortest side of a training picture at most", ge=1.0, le=4.0
    )
    enlarge: bool = setting(
        False,
        "enlarge photos that are smaller than the resolution; otherwise they are trained at the "
        "size they have",
    )
    recursive: bool = setting(False, "look for photos in sub-folders too")
    weight: float | None = setting(
        None,
        "the folder's share of the training beside data.sets, as a set's weight",
        gt=0,
        le=1000,
    )
    sets: list[SetSettings] = setting([], "further sets of photos, each a [[data.sets]] table")
    skip_bad: bool = setting(False, "train on the usable photos when some cannot be used")
    flip: bool = setting(
        False,
        "train on mirrored photos in turn with the photos as they are; leave off for a face that "
        "is not symmetric",
    )
    repeats: int = setting(1, "how often each photo comes in an epoch", ge=1, le=1000)
    batch_size: int = setting(1, "photos in one step", "photos", ge=1, le=64)
    background: str = setting(
        "#ffffff", "colour behind transparent pictures", pattern=r"^#[0-9a-fA-F]{6}$"
    )
    transparency: Literal["background", "mask"] = setting(
        "background",
        "transparent parts: shown on the background colour, or left out of the loss as well",
    )
    masks: bool = setting(
        True, "a picture NAME-mask.png beside a photo says what of it is trained (white: yes)"
    )
    maximum_megapixels: float = setting(
        100.0, "photos with more pixels are refused", "megapixels", gt=0, le=1000
    )
    variants: int = setting(
        0,
        "how many changed versions of each photo are made beside it, by zoom, shift and colour; "
        "each epoch takes one of them",
        ge=0,
        le=16,
    )
    zoom: float = setting(0.0, "a version cuts up to this share off width and height", ge=0, le=0.5)
    shift: float = setting(
        0.0, "a version's crop moves by up to this share of the room it has", ge=0, le=1
    )
    colour: float = setting(
        0.0,
        "brightness, contrast and saturation of a version change by up to this share",
        ge=0,
        le=0.5,
    )
    face_detector: Literal["auto", "yunet", "haar", "none"] = setting(
        "auto",
        "what finds faces: yunet needs its file; haar is OpenCV's basic detector; auto takes the "
        "best that is there",
    )
    face_detector_file: str = setting(
        "", "YuNet's .onnx file; unset: the copy that was downloaded, if any"
    )
    face_recognizer_file: str = setting(
        "", "SFace's .onnx file, which tells people apart; unset: the copy that was downloaded"
    )
    face_download: bool = setting(False, "download these two files once if they are missing")
    face_crop: bool = setting(True, "place the crop so that the face stays whole")
    face_weight: float = setting(
        1.0, "how much more the face counts in the loss than the rest; 1 = alike", ge=1, le=10
    )
    workers: int = setting(
        0,
        "photos read at the same time; 0 = as many as the processor has cores, up to 8",
        ge=0,
        le=64,
    )
    cache: bool = setting(True, "keep encoded photos on disk for the next run")

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The colour behind transparent pictures, RGB 0..255."""
        red, green, blue = bytes.fromhex(self.background.removeprefix("#"))
        return red, green, blue

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions, the smallest first; none while the base has not been asked."""
        if self.resolution is None:
            return ()
        sides = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return tuple(sorted(set(sides)))


class CaptionSettings(Section):
    """The texts that the photos are trained on."""

    trigger: str = setting(
        "ohwx",
        "the word that will call up what was learned; one that means nothing yet",
        min_length=1,
        max_length=64,
        pattern=TRIGGER,
    )
    class_noun: str = setting(
        "person",
        "what the photos show in general: 'person', 'dog', 'style'",
        min_length=1,
        max_length=64,
    )
    template: str = setting(
        "{trigger} {class}",
        "caption of a photo that has no .txt beside it, where there is no captioner",
        min_length=1,
    )
    use_sidecars: bool = setting(True, "use the .txt files beside the photos as captions")
    captioner: str = setting(
        "auto",
        "what describes photos that have no .txt beside them: 'none', 'own', 'transformers', "
        "'tagger', 'filename', or 'auto': what caption.captioner_folder holds, else ours on the "
        "embedded base, else none",
        min_length=1,
    )
    captioner_folder: str = setting(
        "own",
        "folder of a captioning model in transformers format (BLIP, Florence-2 and others) or of a "
        "WD14 tagger, or a model's name on the Hugging Face hub; 'own' for ours, which knows the "
        "embedded base's drawings only",
        min_length=1,
    )
    prefix: str = setting("", "text put before every caption", max_length=500)
    suffix: str = setting("", "text put after every caption", max_length=500)
    separator: str = setting(
        ",", "what stands between the tags of a caption", min_length=1, max_length=8
    )
    shuffle_tags: bool = setting(False, "put the tags of a caption in another order at every step")
    keep_tags: int = setting(
        1, "so many tags at the beginning are never moved or dropped", "tags", ge=0, le=100
    )
    tag_dropout: float = setting(
        0.0, "share of the tags that is left out at every step", ge=0.0, le=1.0
    )
    wildcards: bool = setting(False, "of '{red|blue}' in a caption one is taken at every step")
    several_lines: bool = setting(
        False, "each line of a .txt file is a caption of its own, one taken at every step"
    )
    dropout: float = setting(
        0.0, "share of steps in which a photo is trained without its caption", ge=0.0, le=1.0
    )
