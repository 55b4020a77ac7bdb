"""What both sides of the speed benchmark are asked to do: one description, the same for each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# The trigger and the class are in every caption, as sidecars beside the photos.
TRIGGER = "zqx"
CLASS_NOUN = "avatar"
RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Task:
    """A training, in plain values.

    base: folder in diffusers format. photos: of pictures that are all `resolution` pixels square,
    with captions beside them. output: where the LoRA file goes. steps: optimizer steps in all.
    precision: fp32, bf16 or fp16. device: cpu or cuda. min_snr_gamma: 0 is the plain mean squared
    error. settings: further `--set` of our side. started: `time.time()` when the process was
    asked for.
    """

    base: str
    photos: str
    output: str
    steps: int
    resolution: int
    batch: int = 1
    rank: int = 16
    targets: str = "attention"
    text_encoder: bool = False
    precision: str = "fp32"
    attention: str = "sdpa"
    checkpointing: bool = False
    threads: int = 1
    device: str = "cpu"
    min_snr_gamma: float = 0.0
    seed: int = 0
    settings: tuple[str, ...] = ()
    started: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        values = json.loads(text)
        return Task(**{**values, "settings": tuple(values["settings"])})

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def command(self) -> list[str]:
        """The words of our own command line for it: nothing beside the steps is done in it."""
        settings = {
            "model.device": self.device,
            "model.precision": self.precision,
            "model.attention": self.attention,
            "model.checkpointing": self.checkpointing,
            "data.resolution": self.resolution,
            "data.batch_size": self.batch,
            "data.face_detector": "none",
            "adapter.rank": self.rank,
            "adapter.alpha": float(self.rank),
            "adapter.targets": self.targets,
            "adapter.text_encoder": self.text_encoder,
            "optimizer.learning_rate": RATE,
            "optimizer.text_encoder_learning_rate": RATE,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 0,
            "objective.min_snr_gamma": self.min_snr_gamma,
            "objective.noise_offset": 0.0,
            "objective.prior_weight": 0.0,
            "preview.every_steps": 0,
            "run.total_steps": self.steps,
            "run.save_every_steps": self.steps,
            "run.seed": self.seed,
            "run.threads": self.threads,
        }
        words = ["train", self.photos, "--base", self.base, "--output", self.output]
        words += ["--trigger", TRIGGER, "--class", CLASS_NOUN]
        for name, value in settings.items():
            words += ["--set", f"{name}={json.dumps(value)}"]
        for setting in self.settings:
            words += ["--set", setting]
        return words
