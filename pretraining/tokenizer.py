"""A small byte-level BPE vocabulary in CLIP's format."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from pretraining.recipe import Recipe

START, END = "<|startoftext|>", "<|endoftext|>"
FOLDER = "tokenizer"
# CLIP splits text into contractions, words, single digits and runs of other signs.
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def build_tokenizer(recipe: Recipe, texts: list[str], folder: Path) -> CLIPTokenizer:
    """Learn merges from captions and write `vocab.json`, `merges.txt` and the settings.

    The 512 byte tokens come first as in CLIP; end-of-text gets the highest id, because that is
    how text encoders find the pooled position.
    """
    learner = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary - len(byte_tokens) - 2,
            initial_alphabet=byte_tokens,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = json.loads(learner.to_str())["model"]["merges"]
    tokens = byte_tokens + [token + "</w>" for token in byte_tokens]
    known = set(tokens)
    for left, right in merges:
        if left + right not in known:
            tokens.append(left + right)
            known.add(left + right)
    tokens += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": recipe.tokens,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {
        name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read the tokenizer as the pipeline will."""
    return CLIPTokenizer.from_pretrained(folder)
