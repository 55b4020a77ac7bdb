"""A training that starts from a LoRA file: of any trainer, with its ranks, alphas and layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.learners import load_backbone
from tests.runs import Outcome, same_tensors, tensors_of
from trainer.adapters.attach import Attached
from trainer.adapters.convert import convert
from trainer.adapters.forms import Form
from trainer.adapters.plans import BlockRule
from trainer.adapters.start import put_start, read_start, start_settings
from trainer.errors import ConfigError, FileFormatError
from trainer.training.learner import AdapterPlan, attach_adapters

Train = Callable[..., Outcome]
# Layers of the tiny base: (name in kohya's form, output width, input width and kernel).
QUERY = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 16, (16,))
KEY = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 16, (16,))
VALUE = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v", 16, (16,))
WIDE = ("lora_unet_down_blocks_0_resnets_0_conv1", 16, (16, 3, 3))
TEXT = tuple(
    (f"lora_te_text_model_encoder_layers_{layer}_self_attn_{end}", 16, (16,))
    for layer in (0, 1)
    for end in ("q_proj", "k_proj", "v_proj", "out_proj")
)
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
Layer = tuple[str, int, tuple[int, ...]]


def write_kohya(path: Path, layers: Mapping[Layer, tuple[int, float]]) -> Path:
    """A file with random factors; by layer its rank and alpha."""
    draw = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for (name, out, inner), (rank, alpha) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *inner, generator=draw)
        one = (1,) * (len(inner) - 1)
        tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(out, rank, *one, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """The update of each layer, by its definition: alpha / rank * up down."""
    tensors = load_file(path)
    names = {key.partition(".")[0] for key in tensors}
    found = {}
    for name in names:
        down = tensors[f"{name}.lora_down.weight"].flatten(1)
        up = tensors[f"{name}.lora_up.weight"].flatten(1)
        found[name] = tensors[f"{name}.alpha"] / down.shape[0] * (up @ down)
    return found


def attached_like(path: Path, base: Path, **changes: Any) -> dict[str, Attached]:
    """Adapters on the tiny base with the settings that a file asks for."""
    found = start_settings(read_start(path)) | changes
    plan = AdapterPlan(
        kind="lora",
        rank=found.get("rank", 4),
        alpha=found.get("alpha", 4.0),
        targets=found.get("targets", "attention"),
        text_encoder=found["text_encoder"],
        seed=0,
        text_targets=found.get("text_encoder_targets", "attention"),
        text_rank=found.get("text_encoder_rank"),
        text_alpha=found.get("text_encoder_alpha"),
        rules=tuple(BlockRule(**rule) for rule in found.get("blocks", [])),
    )
    return attach_adapters(load_backbone(base), plan)


def updates(adapters: Mapping[str, Attached]) -> dict[str, Tensor]:
    """{kohya's name: update}, where there is one."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    return {
        prefixes[component] + path.removeprefix("text_model.").replace(".", "_"): layer.delta()
        for component, attached in adapters.items()
        for path, layer in attached.layers.items()
        if layer.up.any()
    }


MIXED: dict[Layer, tuple[int, float]] = {
    **{QUERY: (4, 2.0), KEY: (4, 2.0), VALUE: (4, 2.0), WIDE: (2, 1.0)},
    **{layer: (3 if "_0_" in layer[0] else 2, 1.5) for layer in TEXT},
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_kohya(tmp_path / "mixed.safetensors", MIXED)


def test_settings_are_the_files_own(mixed: Path) -> None:
    found = start_settings(read_start(mixed))
    assert (found["rank"], found["alpha"], found["targets"]) == (4, 2.0, "all")
    assert found["blocks"] == [{"pattern": "*.conv1", "rank": 2, "alpha": 1.0}]
    assert found["text_encoder"] is True
    assert (found["text_encoder_rank"], found["text_encoder_alpha"]) == (3, 1.5)
    assert found["text_encoder_targets"] == "attention"


@pytest.mark.parametrize(
    ("layers", "targets"),
    [
        ((KEY, VALUE), "cross-kv"),
        ((QUERY, KEY), "attention"),
        ((WIDE,), "all"),
    ],
)
def test_the_narrowest_targets_are_taken(
    layers: tuple[Layer, ...], targets: str, tmp_path: Path
) -> None:
    path = write_kohya(tmp_path / "a.safetensors", dict.fromkeys(layers, (2, 2.0)))
    found = start_settings(read_start(path))
    assert found["targets"] == targets
    assert found["text_encoder"] is False
    assert found["blocks"] == []


def test_layers_of_one_kind_with_many_ranks_have_a_rule_each(tmp_path: Path) -> None:
    other: Layer = (QUERY[0].replace("attn1_to_q", "attn2_to_q"), 16, (16,))
    ranks: dict[Layer, tuple[int, float]] = {
        QUERY: (2, 2.0),
        other: (3, 3.0),
        KEY: (4, 4.0),
        VALUE: (4, 4.0),
    }
    found = start_settings(read_start(write_kohya(tmp_path / "a.safetensors", ranks)))
    assert {rule["rank"] for rule in found["blocks"]} == {2, 3}
    assert all("*" not in rule["pattern"] for rule in found["blocks"])


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_a_training_starts_with_the_same_updates_whoever_wrote_the_file(
    form: Form, mixed: Path, base: Path, tmp_path: Path
) -> None:
    path = mixed
    if form != "kohya":
        path = tmp_path / ("folder" if form == "peft" else "other.safetensors")
        convert(mixed, path, to=form, family="sd1")
    adapters = attached_like(path, base)
    lacking = put_start(read_start(path), adapters)
    found, wanted = updates(adapters), deltas(mixed)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name].flatten(1), delta, rtol=1e-5, atol=1e-6)
    assert lacking == sum(len(a.layers) for a in adapters.values()) - len(wanted) > 0


def test_a_higher_rank_and_another_alpha_change_nothing_and_can_learn(
    mixed: Path, base: Path
) -> None:
    adapters = attached_like(mixed, base, rank=7, alpha=1.0, blocks=[])
    put_start(read_start(mixed), adapters)
    for name, delta in deltas(mixed).items():
        torch.testing.assert_close(updates(adapters)[name].flatten(1), delta, rtol=1e-5, atol=1e-6)
    layer = next(x for x in adapters["unet"].layers.values() if x.up.any())
    assert layer.rank == 7
    assert layer.down[4:].any()
    assert not layer.up[:, 4:].any()


@pytest.mark.parametrize(
    "changes", [{"rank": 3}, {"targets": "attention"}, {"text_encoder": False}]
)
def test_settings_that_leave_a_part_of_the_file_out_are_refused(
    changes: dict[str, Any], mixed: Path, base: Path
) -> None:
    if "targets" in changes:
        changes = {**changes, "blocks": []}
    adapters = attached_like(mixed, base, **changes)
    with pytest.raises(ConfigError, match="not trained, or of a lower rank"):
        put_start(read_start(mixed), adapters)
    assert updates(adapters) == {}


def test_zeros_that_fill_a_rank_up_are_left_out(tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", {QUERY: (4, 4.0), KEY: (4, 2.0)})
    tensors = load_file(path)
    tensors[f"{QUERY[0]}.lora_down.weight"][3] = 0
    tensors[f"{QUERY[0]}.lora_up.weight"][:, 3] = 0
    tensors[f"{KEY[0]}.lora_up.weight"][:] = 0  # a fresh layer: its down is not filled up
    save_file(tensors, path)
    ranks = {layer.path[-4:]: (layer.rank, layer.alpha) for layer in read_start(path).layers}
    assert ranks == {"to_q": (3, 3.0), "to_k": (4, 2.0)}


def test_an_alpha_of_nothing_and_a_huge_one_are_taken_as_they_act(tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", {QUERY: (4, 0.0), KEY: (2, 5000.0)})
    wanted = deltas(path)
    for layer in read_start(path).layers:
        assert layer.alpha == layer.rank
        delta = layer.up @ layer.down
        name = "lora_unet_" + layer.path.replace(".", "_")
        torch.testing.assert_close(delta, wanted[name], rtol=1e-4, atol=1e-3)


def changed(path: Path, changes: Mapping[str, Tensor | None]) -> Path:
    tensors: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{QUERY[0]}.dora_scale": torch.ones(16, 1)}, "DoRA"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}, "down without up"),
        ({"something.else.lora_A.nothing": torch.ones(2)}, "not understood"),
        ({"bundle_emb.word.string_to_param.*": torch.ones(1, 16)}, "embedding"),
        ({f"{QUERY[0]}.lora_up.weight": torch.full((16, 4), torch.nan)}, "not finite"),
        ({f"lora_unet_mid_block_attentions_0_proj_in.{n}": torch.ones(2, 2) for n in LOHA}, "loha"),
    ],
)
def test_what_no_training_can_start_from_is_named(
    changes: dict[str, Tensor], words: str, mixed: Path
) -> None:
    with pytest.raises(FileFormatError) as caught:
        read_start(changed(mixed, changes))
    assert words in str(caught.value)
    assert "mixed.safetensors" in str(caught.value)


def test_ranks_above_the_highest_and_strange_layers_are_refused(tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", {QUERY: (257, 1.0)})
    with pytest.raises(FileFormatError, match="above 256"):
        start_settings(read_start(path))
    strange = ("lora_unet_conv_in", 16, (4, 3, 3))
    path = write_kohya(tmp_path / "b.safetensors", {strange: (2, 1.0)})
    with pytest.raises(FileFormatError, match="not trained here") as caught:
        start_settings(read_start(path))
    assert "unet: conv_in" in str(caught.value)


def test_layers_of_another_shape_are_refused(base: Path, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", {(KEY[0], 16, (24,)): (2, 2.0)})
    with pytest.raises(FileFormatError, match="other shapes"):
        put_start(read_start(path), attached_like(path, base))


# --- whole runs


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_goes_on_without_it(
    train: Train, mixed: Path, tmp_path: Path
) -> None:
    """A rate of nearly nothing: what it ends with is what it started with."""
    still = ("optimizer.learning_rate=1e-12", "optimizer.text_encoder_learning_rate=1e-12")
    own = "adapter.save_precision=fp32"
    # The quick settings have a rank of their own, which the file's would be too high for.
    words = ("adapter.rank=4", own, *still)
    outcome = train(f"--init={mixed}", *words, "run.stop_at_step=2").done()
    assert "Starting from mixed.safetensors" in outcome.out
    mixed.rename(tmp_path / "away.safetensors")
    train("--resume").done()
    found = {
        name: delta
        for name, delta in deltas(next((tmp_path / "out").glob("anna.safetensors"))).items()
        if delta.abs().max() > 1e-6
    }
    wanted = deltas(tmp_path / "away.safetensors")
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-6)
    (tmp_path / "away.safetensors").rename(mixed)
    train(f"--init={mixed}", *words, output=tmp_path / "whole").done()
    assert same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


@pytest.mark.slow
def test_going_on_with_another_file_to_start_from_is_refused(
    train: Train, mixed: Path, tmp_path: Path
) -> None:
    train(f"--init={mixed}", "adapter.rank=4", "run.stop_at_step=2").done()
    write_kohya(mixed, {layer: (rank, 1.0) for layer, (rank, _) in MIXED.items()})
    outcome = train("--resume")
    assert outcome.code == 2
    assert "adapter.init: another LoRA file" in outcome.err


def test_a_file_that_is_not_there_is_named(train: Train, mixed: Path, tmp_path: Path) -> None:
    outcome = train(f"--init={tmp_path / 'missing.safetensors'}")
    assert outcome.code == 1
    assert "missing.safetensors" in outcome.err
    assert not (tmp_path / "out").exists()
    train(f"--init={mixed}", "adapter.rank=4", "run.total_steps=2").done()
    for name in ("settings.toml",):
        kept = (tmp_path / "out" / name).read_text(encoding="utf-8")
        place = tmp_path / "fresh" / name
        place.parent.mkdir()
        place.write_text(kept, encoding="utf-8")
    mixed.unlink()
    outcome = train("--resume", output=tmp_path / "fresh")
    assert outcome.code == 1
    assert "is to start from is not there" in outcome.err
