"""The text encoder, and its warm-up: telling which looks a caption states."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from pretraining.data import LABELS, TOKENS, label_fields
from pretraining.recipe import Recipe
from pretraining.tokenizer import FOLDER, load_tokenizer
from pretraining.training import generator, load_state, rate_share, save_state

STATE = "text.pt"


def new_text_encoder(recipe: Recipe, work: Path) -> CLIPTextModel:
    """An untrained text encoder for the vocabulary in the work folder."""
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(work / FOLDER)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=recipe.text_mlp,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_heads,
            max_position_embeddings=recipe.tokens,
            projection_dim=recipe.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class LookHeads(nn.Module):
    """One classifier per look on the pooled embeddings [B, P]; class 0 is "not stated"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Linear(width, 1 + len(options)) for _, options in label_fields()
        )

    def forward(self, pooled_BP: Tensor) -> list[Tensor]:
        """Logits, one tensor [B, classes] per look."""
        return [head(pooled_BP) for head in self.heads]


def train_text(recipe: Recipe, work: Path) -> None:
    """Teach the text encoder to read, before the denoiser listens to it."""
    tokens = np.load(work / TOKENS, mmap_mode="r")
    labels = np.load(work / LABELS, mmap_mode="r")
    encoder = new_text_encoder(recipe, work)
    heads = LookHeads(recipe.text_width)
    both = nn.ModuleList([encoder, heads])
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=recipe.text_rate, weight_decay=recipe.weight_decay
    )
    first = 0
    if state := load_state(work / STATE):
        both.load_state_dict(state["both"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.monotonic()
    # The last captions are kept to measure on.
    train_count = len(tokens) - len(tokens) // 50
    for step in range(first, recipe.text_steps):
        rng = generator(recipe.seed, STATE, step)
        rows = torch.randint(train_count, (recipe.text_batch,), generator=rng).numpy()
        columns = torch.randint(tokens.shape[1], (recipe.text_batch,), generator=rng).numpy()
        ids = torch.from_numpy(tokens[rows, columns].astype(np.int64))
        truth = torch.from_numpy(labels[rows, columns].astype(np.int64))
        logits = heads(encoder(ids).pooler_output)
        loss = torch.stack([F.cross_entropy(x, truth[:, i]) for i, x in enumerate(logits)]).mean()
        for group in optimizer.param_groups:
            group["lr"] = recipe.text_rate * rate_share(step, recipe.text_steps, 100, 0.5, 0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), recipe.clip_norm)
        optimizer.step()
        if (step + 1) % recipe.save_every_steps == 0 or step + 1 == recipe.text_steps:
            rate = recipe.text_batch * (step + 1 - first) / (time.monotonic() - started)
            held_out = (tokens[train_count:, 0], labels[train_count:, 0])
            scores = reading_scores(encoder, heads, *held_out)
            lowest = sorted(scores, key=lambda name: scores[name])[:5]
            worst = ", ".join(f"{name} {scores[name]:.2f}" for name in lowest)
            print(
                f"text step {step + 1}/{recipe.text_steps} loss {loss.item():.4f} "
                f"{rate:.0f} captions/s, lowest: {worst}",
                flush=True,
            )
            save_state(
                work / STATE,
                {
                    "model": encoder.state_dict(),
                    "both": both.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )


@torch.no_grad()
def reading_scores(
    encoder: CLIPTextModel, heads: LookHeads, tokens: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Share of stated looks read correctly, by look."""
    logits = heads(encoder(torch.from_numpy(tokens.astype(np.int64))).pooler_output)
    truth = torch.from_numpy(labels.astype(np.int64))
    scores = {}
    for i, (name, _) in enumerate(label_fields()):
        stated = truth[:, i] > 0
        scores[name] = float((logits[i].argmax(1) == truth[:, i])[stated].float().mean())
    return scores
