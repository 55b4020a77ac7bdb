"""What each program takes of files of all trainers, as it was found by running the programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import tiny_sdxl_pipeline
from trainer.adapters.file import LoraFile
from trainer.adapters.foreign import family_of, read_names
from trainer.adapters.foreign_names import kohya_name
from trainer.adapters.ldm_names import ldm_blocks, to_diffusers
from trainer.adapters.loaders import LoaderVerdict, verdicts

GOLDEN = Path(__file__).parent / "golden"
TABLES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
SDXL_BLOCKS = ldm_blocks(
    {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
    }
)
SD1_BLOCKS = ldm_blocks(
    {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
    }
)
ALL = {"ComfyUI", "Forge", "A1111", "diffusers", "sd-scripts"}


def golden(family: str, *, conv: bool = False) -> dict[str, Tensor]:
    """A whole file as kohya's trainer writes it, of tensors without content."""
    text = (GOLDEN / f"{TABLES[family]}_lora_keys.txt").read_text(encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        group, name, *shapes = line.split()
        if group != "unet-conv" or conv:
            for part, shape in zip(("down", "up"), shapes, strict=True):
                size = [int(n) for n in shape.split("x")]
                tensors[f"{name}.lora_{part}.weight"] = torch.empty(size, device="meta")
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


def verdict(tensors: Mapping[str, Tensor], **metadata: str) -> dict[str, LoaderVerdict]:
    return {v.loader: v for v in verdicts(LoraFile(Path("x"), tensors, metadata))}


def outcomes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """{program: (outcome, how many tensors it takes)}."""
    return {name: (v.outcome, len(v.taken)) for name, v in verdict(tensors).items()}


def renamed(tensors: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    made = {change(key): tensor for key, tensor in tensors.items()}
    assert len(made) == len(tensors)
    assert made.keys() != tensors.keys()
    return made


def as_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same layers under diffusers' names of today; without alpha, as it has none."""
    names = read_names(LoraFile(Path("x"), tensors, {}))
    made = {}
    for layer in names.layers:
        for part, letter in (("down", "A"), ("up", "B")):
            key = f"{layer.component}.{layer.path}.lora_{letter}.weight"
            made[key] = tensors[layer.parts[part]]
    return made


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("conv", [False, True])
def test_kohyas_own_files_are_taken_whole_by_all(family: str, conv: bool) -> None:
    tensors = golden(family, conv=conv)
    assert family_of(read_names(LoraFile(Path("x"), tensors, {}))) == family
    count = len(tensors)
    assert (
        count
        == {
            ("sd1", False): 792,
            ("sd1", True): 792 + 258,
            ("sd2", False): 990,
            ("sd2", True): 990 + 258,
            ("sdxl", False): 2958,
            ("sdxl", True): 2958 + 198,
        }[family, conv]
    )
    found = verdict(tensors)
    assert found.keys() == ALL
    for loader in found.values():
        assert (loader.outcome, len(loader.taken), loader.dropped) == ("all", count, ())
        assert loader.reason == ""


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_names_of_every_layer_there_and_back(family: str) -> None:
    names = read_names(LoraFile(Path("x"), golden(family, conv=True), {}))
    assert names.unknown == ()
    for layer in names.layers:
        assert kohya_name(layer.component, layer.path, family, 2) == layer.name


def test_sd1_under_ldm_names() -> None:
    tensors = golden("sd1", conv=True)

    def change(key: str) -> str:
        layers = {layer.name: layer for layer in names.layers}
        layer = layers[key.partition(".")[0]]
        path = next(
            (ldm + layer.path[len(d) :] for d, ldm in SD1_BLOCKS if layer.path.startswith(d)), ""
        )
        unet = f"lora_unet_{path.replace('.', '_')}" if path else layer.name
        return key.replace(layer.name, unet)

    names = read_names(LoraFile(Path("x"), tensors, {}))
    made = renamed(tensors, change)
    found = outcomes(made)
    count = len(tensors)
    for loader in ("ComfyUI", "Forge", "A1111"):
        assert found[loader] == ("all", count)
    assert found["diffusers"] == ("refused", 0)
    assert found["sd-scripts"] == ("partly", 216)
    back = {layer.path for layer in read_names(LoraFile(Path("x"), made, {})).layers}
    assert back == {layer.path for layer in names.layers}


def in_diffusers_names(key: str) -> str:
    """A tensor of SDXL's UNet under the name of the layer in diffusers."""
    name, _, part = key.partition(".")
    if not name.startswith("lora_unet_"):
        return key
    path = to_diffusers(name.removeprefix("lora_unet_"), SDXL_BLOCKS, "_")
    return f"lora_unet_{path}.{part}"


def test_sdxl_under_diffusers_names() -> None:
    plain = renamed(golden("sdxl"), in_diffusers_names)
    assert set(outcomes(plain).values()) == {("all", 2958)}
    conv = verdict(renamed(golden("sdxl", conv=True), in_diffusers_names))
    for loader in ALL - {"A1111"}:
        assert conv[loader].outcome == "all"
    assert conv["A1111"].dropped == tuple(
        f"lora_unet_up_blocks_0_upsamplers_0_conv.{part}"
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    )


def test_sdxl_with_both_styles_of_names() -> None:
    tensors = golden("sdxl")
    mixed = renamed(tensors, lambda k: in_diffusers_names(k) if "_attn1_" in k else k)
    found = verdict(mixed)
    assert found["diffusers"].outcome == "partly"
    ldm = ("lora_unet_input", "lora_unet_middle", "lora_unet_output")
    assert found["diffusers"].dropped == tuple(key for key in mixed if key.startswith(ldm))
    assert found["ComfyUI"].outcome == "all"


def test_te1_in_a_file_for_one_text_encoder() -> None:
    def te1(key: str) -> str:
        return key.replace("lora_te_", "lora_te1_")

    first = outcomes(renamed(golden("sd1"), te1))
    for loader in ("ComfyUI", "Forge", "A1111", "diffusers"):
        assert first[loader] == ("all", 792)
    assert first["sd-scripts"] == ("partly", 576)
    second = outcomes(renamed(golden("sd2"), te1))
    for loader in ("ComfyUI", "Forge", "diffusers"):
        assert second[loader] == ("all", 990)
    assert second["A1111"] == second["sd-scripts"] == ("partly", 576)


def test_names_without_text_model() -> None:
    found = outcomes(renamed(golden("sd1"), lambda key: key.replace("text_model_", "")))
    assert found == {
        "ComfyUI": ("partly", 576),
        "Forge": ("refused", 0),
        "A1111": ("partly", 576),
        "diffusers": ("all", 792),
        "sd-scripts": ("partly", 576),
    }


def test_diffusers_own_names() -> None:
    tensors = as_diffusers({k: v for k, v in golden("sd1").items() if "lora_unet" in k})
    assert outcomes(tensors) == {
        "ComfyUI": ("partly", 2 * 64),
        "Forge": ("refused", 0),
        "A1111": ("refused", 0),
        "diffusers": ("all", 384),
        "sd-scripts": ("refused", 0),
    }
    first = next(iter(tensors)).removesuffix(".lora_A.weight")
    with_alpha = {**tensors, f"{first}.alpha": torch.tensor(1.0)}
    assert outcomes(with_alpha)["diffusers"] == ("refused", 0)


@pytest.mark.parametrize(
    "parts", [("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2")]
)
def test_lycoris(parts: tuple[str, ...]) -> None:
    names = dict.fromkeys(key.partition(".")[0] for key in golden("sd1"))
    tensors = {f"{n}.{p}": torch.empty(4, 4, device="meta") for n in names for p in parts}
    found = outcomes(tensors)
    for loader in ("ComfyUI", "Forge", "A1111"):
        assert found[loader] == ("all", len(tensors))
    assert found["diffusers"] == found["sd-scripts"] == ("refused", 0)


def test_forge_takes_twelve_strange_tensors_and_no_more() -> None:
    tensors = golden("sd1")
    for count, outcome in ((12, "partly"), (13, "refused")):
        strange = {f"lora_unet_strange_{i}.alpha": torch.tensor(1.0) for i in range(count)}
        found = verdict({**tensors, **strange})
        assert found["Forge"].outcome == outcome
        assert found["ComfyUI"].dropped == tuple(strange)
        assert found["diffusers"].outcome == "partly"  # names of no layer are passed over
        assert "not understood" in found["A1111"].reason


def test_openclip_needs_all_four_of_an_attention_in_a1111() -> None:
    for family, layers, prefix in (("sd2", 23, "lora_te_"), ("sdxl", 32, "lora_te2_")):
        tensors = {k: v for k, v in golden(family).items() if "out_proj" not in k}
        dropped = verdict(tensors)["A1111"].dropped
        assert len(dropped) == layers * 3 * 3
        assert all(key.startswith(prefix) and "self_attn" in key for key in dropped)
    sd1 = {k: v for k, v in golden("sd1").items() if "out_proj" not in k}
    assert verdict(sd1)["A1111"].outcome == "all"


def test_embeddings_in_the_file() -> None:
    tensors = {**golden("sd1"), "bundle_emb.anna.string_to_param.*": torch.empty(2, 768)}
    assert outcomes(tensors) == {
        "ComfyUI": ("partly", 792),
        "Forge": ("partly", 792),
        "A1111": ("all", 793),
        "diffusers": ("refused", 0),
        "sd-scripts": ("partly", 792),
    }


BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0"


@pytest.mark.parametrize(
    ("missing", "refusing"),
    [
        ("lora_down.weight", {"ComfyUI", "Forge", "A1111", "diffusers"}),
        ("lora_up.weight", {"A1111", "diffusers"}),
    ],
)
def test_half_a_layer(missing: str, refusing: set[str]) -> None:
    tensors = golden("sd1")
    del tensors[f"{BLOCK}_attn1_to_q.{missing}"]
    found = verdict(tensors)
    assert {name for name, v in found.items() if v.outcome == "refused"} == refusing
    assert all(f"{BLOCK}_attn1_to_q" in found[name].reason for name in refusing)


class TestDifferences:
    def test_alphas_that_diffusers_does_not_honour(self) -> None:
        tensors = golden("sd1")
        tensors[f"{BLOCK}_attn1_to_q.alpha"] = torch.tensor(1.0)
        found = verdict(tensors)
        assert found["diffusers"].outcome == "all"
        assert found["diffusers"].reason.startswith("1 layers get another strength")
        assert found["ComfyUI"].reason == ""
        projection = golden("sd1")
        projection["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(1.0)
        assert verdict(projection)["diffusers"].reason == ""

    def test_attention_of_another_rank(self) -> None:
        tensors = golden("sd1")
        tensors[f"{BLOCK}_attn1_to_q.lora_down.weight"] = torch.empty(8, 1280, device="meta")
        tensors[f"{BLOCK}_attn1_to_q.lora_up.weight"] = torch.empty(1280, 8, device="meta")
        found = verdict(tensors)
        assert found["diffusers"].outcome == "refused"
        assert found["Forge"].outcome == "all"

    def test_dora(self) -> None:
        tensors = golden("sd1")
        tensors[f"{BLOCK}_attn1_to_q.dora_scale"] = torch.empty(1, 1280, device="meta")
        found = verdict(tensors)
        for loader in ("diffusers", "sd-scripts"):
            assert found[loader].dropped == (f"{BLOCK}_attn1_to_q.dora_scale",)
        assert found["ComfyUI"].outcome == "all"

    def test_oft_of_kohya(self) -> None:
        key = f"{BLOCK}_attn1_to_q".replace("lora_unet", "oft_unet")
        found = outcomes({f"{key}.oft_blocks": torch.empty(4, 8, 8), f"{key}.alpha": torch.ones(1)})
        taking = {name for name, (outcome, _) in found.items() if outcome == "all"}
        assert taking == {"A1111", "sd-scripts"}


TINY = "encoder_layers_0_self_attn_"
LAYERS = [
    ("lora_te1_text_model_", ("q_proj", "out_proj"), 2),
    ("lora_te1_", ("q_proj", "out_proj"), 2),
    ("lora_te1_text_model_", ("q_proj", "mlp_fc1"), 1),
    ("lora_te1_text_model_", ("q_proj",), 0),
    ("lora_te2_text_model_", ("q_proj", "out_proj"), 2),
    ("lora_te2_", ("q_proj", "out_proj"), 0),
]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize(("prefix", "layers", "count"), LAYERS)
def test_diffusers_itself_says_so(
    sdxl: Any, prefix: str, layers: tuple[str, ...], count: int
) -> None:
    """How many of a text encoder's layers diffusers applies, and how many the verdict says."""
    encoder = sdxl.text_encoder_2 if "te2" in prefix else sdxl.text_encoder
    width = encoder.config.hidden_size
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        name = f"{prefix}{TINY}{layer}".replace("self_attn_mlp", "mlp")
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, width)
        tensors[f"{name}.lora_up.weight"] = torch.ones(32 if "fc1" in name else width, 2)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    found = verdict(tensors)["diffusers"]
    assert len(found.taken) == 3 * count
    assert found.reason if count < len(layers) else not found.reason
    if found.outcome == "refused":
        with pytest.raises((ValueError, IndexError)):
            sdxl.load_lora_weights(dict(tensors))
    else:
        sdxl.load_lora_weights(dict(tensors))
        applied = [n for n, p in encoder.named_parameters() if "lora_B" in n and p.any()]
        assert len(applied) == count
    sdxl.unload_lora_weights()


@given(
    st.lists(
        st.sampled_from(
            ["lora_unet_", "lora_te1_", "unet.", "mid_block_attentions_0_", "proj_in", ".lora_up"]
            + [".weight", ".alpha", "bundle_emb.", ".hada_w1_a", "text_model_", ".lora_A", "oft_"]
        ),
        max_size=6,
    ),
    st.sampled_from([(), (2,), (0, 2), (2, 3), (2, 3, 1, 1)]),
)
@settings(max_examples=150, deadline=None)
def test_any_names_get_a_verdict(words: list[str], shape: tuple[int, ...]) -> None:
    tensors = {"".join(words) + end: torch.zeros(shape) for end in ("", ".weight", ".alpha")}
    for loader in verdicts(LoraFile(Path("x"), tensors, {})):
        assert set(loader.taken) | set(loader.dropped) == set(tensors)
        assert not set(loader.taken) & set(loader.dropped)
        assert (loader.outcome == "all") == (not loader.dropped)
        assert loader.reason or loader.outcome == "all"
