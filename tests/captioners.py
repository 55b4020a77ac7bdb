"""A tiny captioner as other people publish theirs: BLIP with BERT's tokenizer, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WORDS = ("a", "man", "woman", "in", "front", "of", "red", "blue", "house", "smiling", "-", ",")


def save_tiny_captioner(folder: Path) -> Path:
    """Write the captioner in the format of transformers; the same weights every time."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[DEC]")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(
            BlipConfig(
                text_config={
                    **small,
                    "vocab_size": len(vocabulary),
                    "max_position_embeddings": 80,
                    "pad_token_id": vocabulary["[PAD]"],
                    "bos_token_id": vocabulary["[DEC]"],
                    "eos_token_id": vocabulary["[SEP]"],
                    "sep_token_id": vocabulary["[SEP]"],
                },
                vision_config={**small, "image_size": 32, "patch_size": 8},
                initializer_range=0.5,
            )
        )
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder
