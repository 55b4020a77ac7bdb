"""Names and shapes in a LoRA file, for every released family and target set, and who takes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest

from tests.loader_rules import LOADERS, PARTS, not_applied, unet_layers
from tests.models import RANK, components_of, golden_table, namings_of
from trainer.adapters.attach import attach
from trainer.adapters.naming import expected_shapes
from trainer.adapters.targets import TEXT_TARGETS, UNET_TARGETS, select_layers

FAMILIES = ("sd1", "sd2", "sdxl")
# The groups of the golden tables that a target set stands for.
UNET_GROUPS = {
    "attention": ("unet-attention",),
    "attention+ff": ("unet-attention", "unet-ff-proj"),
    "all": ("unet-attention", "unet-ff-proj", "unet-conv"),
}
TEXT_GROUPS = {"attention": ("attention",), "attention+mlp": ("attention", "mlp")}
CASES = [
    *((family, "unet", targets) for family, targets in product(FAMILIES, UNET_GROUPS)),
    *((family, "text_encoder", targets) for family, targets in product(FAMILIES, TEXT_TARGETS)),
    *(("sdxl", "text_encoder_2", targets) for targets in TEXT_TARGETS),
]
# Layers, and parameters at rank 4, that kohya's trainer adapts by default and with convolutions.
COUNTS = {
    ("sd1", "unet", "attention"): (128, 797_184),
    ("sd1", "unet", "attention+ff"): (192, 1_695_744),
    ("sd1", "unet", "all"): (192 + 86, 1_695_744 + 2_507_520),
    ("sd1", "text_encoder", "attention+mlp"): (72, 663_552),
    ("sd2", "unet", "attention"): (128, 829_952),
    ("sd2", "unet", "attention+ff"): (192, 1_728_512),
    ("sd2", "unet", "all"): (192 + 86, 1_728_512 + 2_507_520),
    ("sd2", "text_encoder", "attention+mlp"): (138, 1_695_744),
    ("sdxl", "unet", "attention"): (560, 5_806_080),
    ("sdxl", "unet", "attention+ff"): (722, 10_639_360),
    ("sdxl", "unet", "all"): (722 + 66, 10_639_360 + 1_657_600),
    ("sdxl", "text_encoder", "attention+mlp"): (72, 663_552),
    ("sdxl", "text_encoder_2", "attention+mlp"): (192, 2_949_120),
}


@cache
def shapes_of(family: str, component: str, targets: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the trainer would write."""
    components = components_of(family)
    model = components[component]
    paths = select_layers(model, component, targets)
    attached = attach(model, paths, rank=RANK, alpha=2.0, seed=0)
    try:
        return expected_shapes(attached, namings_of(family, components)[component])
    finally:
        attached.detach()


def golden_shapes(family: str, component: str, targets: str) -> dict[str, tuple[int, ...]]:
    """The same from the table on record."""
    kind = "te2" if component == "text_encoder_2" else "te"
    groups = (
        UNET_GROUPS[targets]
        if component == "unet"
        else tuple(f"{kind}-{group}" for group in TEXT_GROUPS[targets])
    )
    table = golden_table(family)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name, factors in table[group].items():
            for part, shape in zip(PARTS, factors, strict=False):
                shapes[f"{name}.{part}"] = tuple(int(n) for n in shape.split("x"))
            shapes[f"{name}.alpha"] = ()
    return shapes


def numbers_in(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        total += 0 if name.endswith(".alpha") else count
    return total


@pytest.mark.parametrize(("family", "component", "targets"), CASES)
def test_names_shapes_and_counts_are_those_on_record(
    family: str, component: str, targets: str
) -> None:
    shapes = shapes_of(family, component, targets)
    assert shapes == golden_shapes(family, component, targets)
    found = (len(shapes) // 3, numbers_in(shapes))
    print(f"{family} {component} {targets}: {found[0]} layers, {len(shapes)} tensors")
    assert found == COUNTS.get((family, component, targets), found)


def test_kohyas_default_of_a_whole_file() -> None:
    totals = {}
    for family in FAMILIES:
        wanted = [c for c in CASES if c[0] == family and c[2] in ("attention+ff", "attention+mlp")]
        totals[family] = sum(len(shapes_of(*case)) for case in wanted)
    assert totals == {"sd1": 792, "sd2": 990, "sdxl": 2958}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_names_of_each_layer_are_read(family: str) -> None:
    components = components_of(family)
    unet, naming = components["unet"], namings_of(family, components)["unet"]
    found = {frozenset(naming.module_names(path)) for path in select_layers(unet, "unet", "all")}
    pairs = unet_layers(family).items()
    assert found == {frozenset((f"lora_unet_{a}", f"lora_unet_{b}")) for a, b in pairs}


# --- who takes them


def files_of(family: str) -> Iterator[tuple[str, set[str]]]:
    """Every file that the trainer may write, by what is trained."""
    encoders = [name for name in components_of(family) if name != "unet"]
    parts = {
        (component, targets): set(shapes_of(family, component, targets))
        for component in ("unet", *encoders)
        for targets in (UNET_TARGETS if component == "unet" else TEXT_TARGETS)
    }
    for targets in UNET_TARGETS:
        yield targets, parts["unet", targets]
        for texts in TEXT_TARGETS:
            whole = parts["unet", targets].union(*(parts[name, texts] for name in encoders))
            yield f"{targets}, texts {texts}", whole


@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_takes_every_tensor(family: str) -> None:
    for what, keys in files_of(family):
        for loader in LOADERS:
            assert not_applied(loader, family, keys) == set(), f"{loader}: {what}"


def golden_file(family: str, *groups: str) -> set[str]:
    table = golden_table(family)
    return {f"{name}.{part}" for group in groups for name in table[group] for part in PARTS}


def renamed(family: str, keys: set[str]) -> set[str]:
    """A file with the other style of UNet names."""
    pairs = unet_layers(family)
    other = pairs if family != "sdxl" else {ldm: ours for ours, ldm in pairs.items()}
    result = set()
    for key in keys:
        module, _, part = key.partition(".")
        result.add(f"lora_unet_{other[module.removeprefix('lora_unet_')]}.{part}")
    return result


class TestTheRulesThemselves:
    """What is known of files that are not taken: a rule that takes everything would fail here."""

    def test_ldm_names_of_stable_diffusion_1_are_not_for_diffusers(self) -> None:
        keys = renamed("sd1", golden_file("sd1", "unet-attention", "unet-ff-proj", "unet-conv"))
        for loader in ("comfyui", "forge", "a1111"):
            assert not_applied(loader, "sd1", keys) == set()
        assert not_applied("diffusers", "sd1", keys) == keys

    def test_one_convolution_of_xl_in_diffusers_names_is_lost_in_a1111(self) -> None:
        keys = renamed("sdxl", golden_file("sdxl", "unet-attention", "unet-ff-proj", "unet-conv"))
        for loader in ("comfyui", "forge", "diffusers"):
            assert not_applied(loader, "sdxl", keys) == set()
        lost = "lora_unet_up_blocks_0_upsamplers_0_conv"
        assert not_applied("a1111", "sdxl", keys) == {f"{lost}.{part}" for part in PARTS}

    def test_both_styles_in_one_file_of_xl(self) -> None:
        attention = golden_file("sdxl", "unet-attention")
        keys = attention | renamed("sdxl", golden_file("sdxl", "unet-ff-proj"))
        assert not_applied("diffusers", "sdxl", keys) == attention

    def test_te1_in_stable_diffusion_2(self) -> None:
        keys = golden_file("sd2", "te-attention", "te-mlp")
        keys = {key.replace("lora_te_", "lora_te1_") for key in keys}
        assert len(not_applied("a1111", "sd2", keys)) == 414
        assert not_applied("comfyui", "sd2", keys) == set()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_text_encoder_paths_of_transformers_5(self, family: str) -> None:
        text = {key.replace("_text_model_", "_") for key in golden_file(family, "te-attention")}
        keys = text | golden_file(family, "unet-attention")
        assert not_applied("comfyui", family, keys) == text
        assert not_applied("a1111", family, keys) == text
        assert not_applied("forge", family, keys) == keys
        assert not_applied("diffusers", family, keys) == set()

    def test_such_paths_of_the_second_text_encoder(self) -> None:
        text = {key.replace("_text_model_", "_") for key in golden_file("sdxl", "te2-attention")}
        keys = text | golden_file("sdxl", "unet-attention")
        assert not_applied("comfyui", "sdxl", keys) == text
        assert not_applied("diffusers", "sdxl", keys) == keys

    @pytest.mark.parametrize(
        ("family", "group", "layers"), [("sd2", "te", 23), ("sdxl", "te2", 32)]
    )
    def test_openclip_attention_in_parts(self, family: str, group: str, layers: int) -> None:
        whole = golden_file(family, f"{group}-attention", f"{group}-mlp")
        keys = {key for key in whole if "_out_proj" not in key}
        attention = {key for key in keys if "_self_attn_" in key}
        assert not_applied("a1111", family, keys) == attention
        assert len(attention) == layers * 3 * 3
        assert not_applied("comfyui", family, keys) == set()

    def test_peft_names_and_other_parts(self) -> None:
        keys = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"}
        assert all(not_applied(loader, "sd1", keys) == keys for loader in LOADERS)
        loha = {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"}
        assert not_applied("diffusers", "sd1", loha) == loha

    def test_forge_takes_a_file_with_few_strangers(self) -> None:
        keys = golden_file("sd1", "unet-attention")
        few, many = ({f"bundle_emb.x.{i}" for i in range(count)} for count in (12, 13))
        assert not_applied("forge", "sd1", keys | few) == few
        assert not_applied("forge", "sd1", keys | many) == keys | many
