"""Texts become prompt embeddings: chunks of tokens, padding, and the layer they are taken from.

CLIP reads 77 tokens at most, of which two are start and end. A longer text is cut into chunks of
75 tokens, each with a start and an end of its own, and the embeddings of the chunks follow one
another: so A1111, Forge and ComfyUI do it, which the files are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelError
from trainer.transfer import to_device
from trainer.untrusted import CONFIG_BYTES

# Start and end of a chunk.
_MARKS = 2
_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a family takes embeddings from its text encoders.

    layer: counted from the end, 1 is the last. norm: whether the encoder's last normalisation
    follows. chunks: as many as a text may have.
    """

    layer: int = 1
    norm: bool = True
    chunks: int = 1


def open_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from a folder, as one that keeps every "!" of a text.

    OpenCLIP's encoders are padded with token 0, the word "!". Tokenizers that are told so take any
    "!" for padding, which programs that draw do not: there it stays a word.
    """
    from transformers import CLIPTokenizer

    for path in folder.iterdir():
        if path.suffix in (".json", ".txt") and path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path.name} is far too large to be a part of a tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), pad_token=_END)
    if 0 not in tokenizer.added_tokens_decoder:
        return tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token=_END)


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, length: int, chunks: int, pad: int
) -> Tensor:
    """Tokens of each text, int64 [B, chunks of the longest text, length].

    Args:
        tokenizer: CLIP's.
        texts: of any length; what `chunks` have no room for is cut off.
        length: tokens that the encoder reads at once, with start and end.
        chunks: at most so many for each text.
        pad: the token that fills up a chunk behind its end.
    """
    room = length - _MARKS
    rows = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    longest = max(len(row) for row in rows)
    count = max(1, min(chunks, -(-longest // room)))
    return torch.tensor(
        [
            [_chunk(row[n * room : (n + 1) * room], length, tokenizer, pad) for n in range(count)]
            for row in rows
        ]
    )


def _chunk(tokens: list[int], length: int, tokenizer: Any, pad: int) -> list[int]:
    marked = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return marked + [pad] * (length - len(marked))


def embed(encoder: Any, ids_BnL: Tensor, prompting: Prompting) -> tuple[Tensor, Tensor | None]:
    """Embeddings [B, n * L, D] of token ids, and pooled ones [B, P] from an encoder with a
    projection: of the first chunk, as A1111 and ComfyUI take them."""
    shape = ids_BnL.shape[:2]
    last = prompting.layer == 1 and prompting.norm
    # No attention mask: Stable Diffusion was trained attending to the padding too.
    output = encoder(
        to_device(ids_BnL.flatten(0, 1), encoder.device), output_hidden_states=not last
    )
    hidden = output.last_hidden_state if last else output.hidden_states[-prompting.layer]
    if prompting.norm and not last:
        # Before transformers 5 the encoder stood in a `text_model`.
        hidden = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
    pooled = getattr(output, "text_embeds", None)
    return (
        hidden.unflatten(0, shape).flatten(1, 2),
        None if pooled is None else pooled.unflatten(0, shape)[:, 0],
    )


def require_layer(encoder: Any, prompting: Prompting) -> None:
    """The text encoder has the layer that prompts are to be taken from.

    Raises:
        ModelError: it has fewer layers.
    """
    layers = int(encoder.config.num_hidden_layers)
    if prompting.layer > layers:
        raise ModelError(
            f"Clip skip {prompting.layer} is more than the text encoder has layers ({layers}).",
            fix="1 is the last layer, 2 the one before; most models are used with one of these.",
        )


def counter(tokenizer: Any) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without start and end."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
