"""Tiny captioners as other people publish theirs: one of each family, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trainer.captioners.asking import CHAT

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WORDS = ("a", "man", "woman", "in", "front", "of", "red", "blue", "house", "smiling", "-", ",")

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
IMAGE = "<image>"
# What captioners are asked is made of these, so that it can be read back from their tokens.
ASKED = ("USER:", "ASSISTANT:", "caption", "en", *CHAT.face.split(), *CHAT.style.split())
FLORENCE_ASKED = ("Describe", "in", "detail", "what", "is", "shown", "in", "the", "image.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# As JoyCaption's: the content is a text, and the picture is put before it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: <image> {{ message.content }} "
    "{% endfor %}ASSISTANT: "
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
SIZE = {"height": 32, "width": 32}


def save_tiny_captioner(folder: Path) -> Path:
    """BLIP with BERT's tokenizer; the same weights every time."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[DEC]")
    small = {**SMALL, "initializer_range": 0.5}
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
    BlipProcessor(BlipImageProcessorPil(size=SIZE), tokenizer).save_pretrained(folder)
    return folder


def word_tokenizer(image: str = "image_token", **special: str) -> Any:
    """A tokenizer of whole words; it knows its picture token by the name `image`."""
    begin = (PAD, BOS, EOS, UNK, IMAGE, *special.values())
    every = dict.fromkeys((*begin, *WORDS, *ASKED, *FLORENCE_ASKED))
    numbers = {word: number for number, word in enumerate(every)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=list(special.values()),
        extra_special_tokens={image: IMAGE},
        model_max_length=1000,
    )
    assert fast.convert_tokens_to_ids(IMAGE) == numbers[IMAGE]
    return fast


def _text(tokenizer: Any) -> dict[str, Any]:
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**SMALL, **numbers, "vocab_size": len(tokenizer), "max_position_embeddings": 600}


def save_blip_2(folder: Path) -> None:
    tokenizer = word_tokenizer("picture_token")  # its processor adds the usual one
    text = {
        **_text(tokenizer),
        "model_type": "opt",
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    }
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**SMALL, "vocab_size": 30, "encoder_hidden_size": 16},
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    Blip2Processor(BlipImageProcessorPil(size=SIZE), tokenizer, num_query_tokens=4).save_pretrained(
        folder
    )


def save_git(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = BertTokenizer(vocab=vocabulary)
    numbers = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = GitConfig(vision_config=VISION, **SMALL, **numbers, vocab_size=len(vocabulary))
    GitForCausalLM(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
    GitProcessor(processor, tokenizer).save_pretrained(folder)


def save_vit_gpt2(folder: Path) -> None:
    """No processor's class is named: picture and text have a file each."""
    tokenizer = word_tokenizer()
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=100,
        n_embd=16,
        n_layer=1,
        n_head=2,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION),
        decoder,
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
    )
    VisionEncoderDecoderModel(config=config).save_pretrained(folder)
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_florence_2(folder: Path) -> None:
    tokenizer = word_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 200,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
    vision = {
        "embed_dim": [16],
        "num_heads": [2],
        "num_groups": [2],
        "depths": [1],
        "patch_size": [4],
        "patch_stride": [4],
        "patch_padding": [0],
        "patch_prenorm": [False],
        "window_size": 4,
        "projection_dim": 16,
    }
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)
    pictures.image_seq_length = 65
    Florence2Processor(pictures, tokenizer).save_pretrained(folder)


def save_llava(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    tokenizer = word_tokenizer()
    text = {**_text(tokenizer), "model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        SiglipImageProcessorPil(size=SIZE),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
    ).save_pretrained(folder)


def save_joycaption(folder: Path) -> None:
    save_llava(folder, PLAIN_TEMPLATE)


def save_old_llava(folder: Path) -> None:
    save_llava(folder, None)


def save_paligemma(folder: Path) -> None:
    tokenizer = word_tokenizer()
    text = {**_text(tokenizer), "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        projection_dim=16,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    pictures = SiglipImageProcessorPil(size=SIZE)
    pictures.image_seq_length = 4
    PaliGemmaProcessor(pictures, tokenizer).save_pretrained(folder)


def save_idefics3(folder: Path) -> None:
    special = {"fake": "<fake_token_around_image>", "end": "<end_of_utterance>"}
    special["global"] = "<global-img>"
    tokenizer = word_tokenizer(**special)
    text = {**_text(tokenizer), "model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
    config = Idefics3Config(
        vision_config=VISION,
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    Idefics3Processor(
        pictures, tokenizer, image_seq_len=1, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], object]] = {
    "blip": save_tiny_captioner,
    "blip-2": save_blip_2,
    "git": save_git,
    "vision-encoder-decoder": save_vit_gpt2,
    "florence2": save_florence_2,
    "llava": save_llava,
    "joycaption": save_joycaption,
    "old llava": save_old_llava,
    "paligemma": save_paligemma,
    "idefics3": save_idefics3,
}


def save_family(name: str, folder: Path) -> Path:
    """A captioner of a family; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[name](folder)
    return folder
