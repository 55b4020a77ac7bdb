"""Adapters: small trained layers beside the frozen layers of a base model, and their files."""

from __future__ import annotations

from trainer.registry import Entry, Registry

ADAPTERS = Registry(
    "adapter",
    {
        "lora": Entry(
            "trainer.adapters.lora:LoRALayer",
            "low-rank update of a weight; what every Stable Diffusion program loads",
        ),
    },
)
