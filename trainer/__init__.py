"""Likeness: train a Stable Diffusion LoRA of a face, an avatar or a style from a photo folder."""

__version__ = "0.1.0"
