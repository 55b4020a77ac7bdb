"""Number formats and kinds of attention against plain fp32: losses, gradients, what is chosen.

How far each may be off is in `LIMITS`, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from tests.learners import Recipe, load_backbone, make_learner, make_plan
from tests.models import configuration
from tests.runs import Outcome, checkpoint_of, lora_of, same_tensors
from tests.tiny import save_tiny
from trainer.errors import DeviceError
from trainer.families import AttentionFacts, quantize
from trainer.families import attention as attention_module
from trainer.families.attention import (
    KERNELS,
    NAMES,
    AttentionShape,
    attend,
    milliseconds,
    why_not,
    widest,
)
from trainer.families.backbone import set_attention
from trainer.families.detect import first_attention, inspect_base
from trainer.training import device as device_module
from trainer.training import processor, trials
from trainer.training import session as session_module
from trainer.training.device import (
    Device,
    Kept,
    choose_device,
    finish_for,
    measured_attention,
)
from trainer.training.learner import Learner
from trainer.training.loop import train
from trainer.training.state import newest_checkpoint, restore, save_checkpoint
from trainer.types import Size

Train = Callable[..., Outcome]
CPU = torch.device("cpu")
SHAPE = AttentionShape(pictures=2, heads=2, tokens=16, head_width=8)
FAMILIES = ("sd1", "sd2-v", "sdxl")


# --- losses and gradients


@dataclass(frozen=True, slots=True)
class Limit:
    """How far something may be from eager fp32.

    loss: relative error. angle: 1 - cosine of the gradients. length: relative error of their norm.
    """

    loss: float
    angle: float
    length: float


# Each is 1.5 to 3 times what was found on the widest family (SDXL), as another processor adds up in
# another order and with other units.
# The same numbers in another order: some rounding of fp32 (6e-8), grown in the layers after it.
ORDER = Limit(1e-5, 1e-6, 1e-5)
LIMITS: dict[str, tuple[dict[str, Any], Limit]] = {
    "sdpa": ({"attention": "sdpa"}, ORDER),
    "sdpa-flash": ({"attention": "sdpa-flash"}, ORDER),
    "sdpa-math": ({"attention": "sdpa-math"}, ORDER),
    "blockwise": ({"attention": "blockwise"}, ORDER),
    "checkpointing": ({"attention": "sdpa", "checkpointing": True}, ORDER),
    # bf16 rounds by up to 2^-9 = 0.2 %, some hundred times on the way, in both directions: the
    # gradients are off by 1.5 %, which turns them by half its square.
    "bf16": ({"dtype": torch.bfloat16}, Limit(2e-3, 1e-3, 2e-2)),
    # fp16 by 2^-12; the rest are gradients that are too small for it in spite of loss scaling.
    "fp16": ({"dtype": torch.float16}, Limit(2e-4, 2e-5, 2e-3)),
    # Codes are 1/127 of a row's largest number apart: weights are off by 0.5 %.
    "int8": ({"weights": "int8"}, Limit(2e-3, 2e-3, 2e-2)),
    "bf16 int8": ({"dtype": torch.bfloat16, "weights": "int8"}, Limit(4e-3, 3e-3, 4e-2)),
    # Three bits after the point: weights are off by 2.5 %, the gradients by 10 %.
    "fp8": ({"weights": "fp8"}, Limit(1e-2, 3e-2, 1e-1)),
    "bf16 fp8": ({"dtype": torch.bfloat16, "weights": "fp8"}, Limit(1e-2, 3e-2, 1e-1)),
    # 16 levels: weights are off by 9 %, the gradients by 30 to 50 %.
    "nf4": ({"weights": "nf4"}, Limit(2e-2, 2.5e-1, 2e-1)),
    "bf16 nf4": ({"dtype": torch.bfloat16, "weights": "nf4"}, Limit(2e-2, 2.5e-1, 2e-1)),
}
# Loss scaling as fp16 trains with.
SCALED = 1024.0


@dataclass(frozen=True, slots=True)
class Measured:
    loss: float
    gradient: Tensor


def measure(base: Path, **options: Any) -> Measured:
    """The loss of a batch and the gradients of UNet and text encoder adapters, on trained ones."""
    learner = make_learner(load_backbone(base, **options))
    factor = SCALED if options.get("dtype") == torch.float16 else 1.0
    draw = torch.Generator().manual_seed(1)
    for parameter in learner.parameters:
        if not parameter.any():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    loss = learner.loss(0)
    (loss * factor).backward()
    # The last layer of SDXL's text encoders has no part in the prompt, so no gradient.
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters]
    gradient = torch.cat([part.flatten() for part in parts]).double() / factor
    assert gradient.dtype == torch.float64
    return Measured(loss.item(), gradient)


def check(found: Measured, wanted: Measured, limit: Limit) -> None:
    cosine = torch.cosine_similarity(found.gradient, wanted.gradient, dim=0).item()
    assert abs(found.loss / wanted.loss - 1) <= limit.loss
    assert 1 - cosine <= limit.angle
    assert abs(found.gradient.norm() / wanted.gradient.norm() - 1) <= limit.length


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Measured]]:
    """A tiny base of a family, and what eager fp32 makes of it; each made once."""
    home = tmp_path_factory.mktemp("bases")
    made: dict[str, tuple[Path, Measured]] = {}

    def get(family: str) -> tuple[Path, Measured]:
        if family not in made:
            base = save_tiny(home / family, family)
            made[family] = base, measure(base, attention="eager")
        return made[family]

    return get


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    "family", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_loss_and_gradients_are_those_of_eager_fp32(
    family: str, name: str, plain: Callable[[str], tuple[Path, Measured]]
) -> None:
    base, wanted = plain(family)
    options, limit = LIMITS[name]
    found = measure(base, **options)
    check(found, wanted, limit)
    if "dtype" in options or "weights" in options:
        assert found.loss != wanted.loss


def test_the_comparison_sees_a_gradient_that_is_wrong() -> None:
    wanted = Measured(1.0, torch.tensor([1.0, 0.0]).double())
    limit = Limit(0.01, 0.01, 0.01)
    check(wanted, wanted, limit)
    for wrong in (
        replace(wanted, loss=1.02),
        replace(wanted, gradient=1.02 * wanted.gradient),
        replace(wanted, gradient=torch.tensor([0.98, 0.2]).double()),
        replace(wanted, gradient=-wanted.gradient),
    ):
        with pytest.raises(AssertionError):
            check(wrong, wanted, limit)


# --- attention


@pytest.mark.parametrize(
    "name", ["sdpa", "sdpa-flash", "sdpa-math", "sdpa-fp32", "blockwise", "eager"]
)
def test_every_attention_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    sizes = (SHAPE.pictures, SHAPE.heads, SHAPE.tokens, SHAPE.head_width)
    q, k, v = (torch.randn(sizes) for _ in range(3))
    scores = torch.einsum("bhte,bhse->bhts", q, k) * SHAPE.head_width**-0.5
    wanted = torch.einsum("bhts,bhse->bhte", scores.exp() / scores.exp().sum(-1, True), v)
    torch.testing.assert_close(attend(name, q, k, v), wanted)
    assert why_not(name, SHAPE, CPU, torch.float32) == ""
    assert milliseconds(name, SHAPE, CPU, torch.float32) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_kernel_is_taken_in_both_passes(
    checkpointing: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that are computed again in the backward pass take the same kernel."""
    plain_attention = torch.nn.functional.scaled_dot_product_attention
    allowed: list[tuple[bool, bool]] = []

    def watched(*args: Any, **options: Any) -> Tensor:
        switches = torch.backends.cuda
        allowed.append((switches.math_sdp_enabled(), switches.flash_sdp_enabled()))
        return plain_attention(*args, **options)

    backbone = load_backbone(base, checkpointing=checkpointing, attention="sdpa-math")
    unet = backbone.components["unet"].train()
    learner = make_learner(backbone, Recipe(text_encoder=False))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    learner.loss(0).backward()
    count = len([name for name, _ in unet.named_modules() if name.endswith(("attn1", "attn2"))])
    assert allowed == [(True, False)] * count * (2 if checkpointing else 1)
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("blocks", ["plain", "direct", "lean"])
def test_attention_in_float32_computes_in_it(
    blocks: Literal["plain", "direct", "lean"], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_attention = torch.nn.functional.scaled_dot_product_attention
    taken: set[torch.dtype] = set()

    def watched(*args: Any, **options: Any) -> Tensor:
        taken.update(x.dtype for x in args)
        return plain_attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    half = torch.bfloat16
    for name, wanted in (("sdpa-fp32", torch.float32), ("sdpa", half)):
        taken.clear()
        backbone = load_backbone(base, dtype=half, attention=name, blocks=blocks)
        unet: Any = backbone.components["unet"]
        words_BSD = torch.ones(1, 5, unet.config.cross_attention_dim, dtype=half)
        unet(torch.ones(1, 4, 8, 8, dtype=half), 1, words_BSD)
        assert taken == {wanted}


@pytest.mark.skipif(torch.cuda.is_available(), reason="these may work there")
@pytest.mark.parametrize("name", ["xformers", "sdpa-cudnn", "sdpa-efficient"])
def test_an_attention_that_does_not_work_is_said_and_replaced(name: str) -> None:
    chosen = choose_device("cpu", "fp32", name, shape=SHAPE)
    assert chosen.attention == "sdpa"
    (notice,) = chosen.notices
    reason = why_not(name, SHAPE, CPU, torch.float32)
    assert reason
    assert "\n" not in reason
    assert notice == f"{name} was asked for but cannot be used ({reason}); using sdpa."


def test_xformers_that_is_not_installed_is_said(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.is_xformers_available", lambda: False)
    with pytest.raises(DeviceError, match="not installed"):
        set_attention(load_backbone(base).components["unet"], "xformers")


def test_the_reason_is_taken_from_what_pytorch_warns_of() -> None:
    error = RuntimeError("No available kernel. Aborting execution.")
    warned = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:2.)",
        "Expected query to be of dtype Half. Got float. (Triggered internally at x.h:3.)",
    ]
    assert attention_module._reason(error, warned) == (
        "Expected query to be of dtype Half. Got float."
    )
    assert attention_module._reason(error, []) == "No available kernel. Aborting execution."
    assert attention_module._reason(NotImplementedError(), []) == "NotImplementedError"


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing was tried out on this machine yet."""
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "untried"))
    monkeypatch.setattr(trials, "_known", {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, untried: None) -> dict[str, float | str]:
    """A GPU that only says how long each attention takes, or why it does not work."""
    times: dict[str, float | str] = {}
    monkeypatch.setattr(device_module, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("trainer.training.trials.hardware", lambda device: "a GPU")

    def why(name: str, *_: object) -> str:
        value = times[name]
        return value if isinstance(value, str) else ""

    monkeypatch.setattr(device_module, "why_not", why)
    monkeypatch.setattr(device_module, "milliseconds", lambda name, *_: times[name])
    return times


def test_on_a_gpu_the_fastest_that_works_is_taken_and_said(gpu: dict[str, float | str]) -> None:
    gpu |= {"sdpa-flash": 3.0, "sdpa-cudnn": 2.0, "sdpa-efficient": 4.0, "xformers": "missing"}
    chosen = choose_device("auto", "bf16", "auto", shape=SHAPE)
    assert (chosen.attention, chosen.notices) == ("sdpa-cudnn", ())
    assert chosen.attention_words == (
        "Attention sdpa-cudnn; forward and backward over 16 tokens in 2 heads of 8: sdpa-flash "
        "3.00 ms, sdpa-cudnn 2.00 ms, sdpa-efficient 4.00 ms; not usable: xformers (missing)"
    )
    gpu["sdpa-flash"] = 2.05  # as fast, as far as one can measure: the first is kept to
    assert measured_attention(SHAPE, torch.device("cuda"), torch.bfloat16)[0] == "sdpa-flash"
    gpu |= dict.fromkeys(device_module.MEASURED, "too old")
    name, words = measured_attention(SHAPE, torch.device("cuda"), torch.bfloat16)
    assert name == "sdpa"
    assert words.count("(too old)") == len(device_module.MEASURED)


def test_on_a_gpu_what_was_measured_first_is_kept_to(gpu: dict[str, float | str]) -> None:
    gpu |= {"sdpa-flash": 3.0, "sdpa-cudnn": 2.0, "sdpa-efficient": 4.0, "xformers": "missing"}
    assert choose_device("auto", "bf16", "auto", shape=SHAPE).attention == "sdpa-cudnn"
    gpu["sdpa-flash"] = 1.0
    again = choose_device("auto", "bf16", "auto", shape=SHAPE)
    assert again.attention == "sdpa-cudnn"
    assert again.attention_words == "Attention sdpa-cudnn, the fastest when that was measured"
    # Of other numbers, or over other tokens, nothing is known yet.
    assert choose_device("auto", "fp16", "auto", shape=SHAPE).attention == "sdpa-flash"
    longer = replace(SHAPE, tokens=2 * SHAPE.tokens)
    assert choose_device("auto", "bf16", "auto", shape=longer).attention == "sdpa-flash"


def test_what_another_driver_lacks_is_measured_anew_and_kept(
    gpu: dict[str, float | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu |= {"sdpa-flash": 3.0, "sdpa-cudnn": 2.0, "sdpa-efficient": 4.0, "xformers": "missing"}
    assert choose_device("auto", "bf16", "auto", shape=SHAPE).attention == "sdpa-cudnn"
    gpu["sdpa-cudnn"] = "another driver"
    monkeypatch.setattr(trials, "_known", {})
    other = choose_device("auto", "bf16", "auto", shape=SHAPE)
    assert other.attention == "sdpa-flash"
    assert "sdpa-cudnn (another driver)" in other.attention_words
    gpu["sdpa-efficient"] = 1.0
    monkeypatch.setattr(trials, "_known", {})
    assert choose_device("auto", "bf16", "auto", shape=SHAPE).attention == "sdpa-flash"


def test_a_gpu_that_is_full_says_nothing_about_an_attention(
    gpu: dict[str, float | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu |= {"sdpa-flash": 3.0, "sdpa-cudnn": 2.0, "sdpa-efficient": 4.0, "xformers": "missing"}
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "why_not", full)
        chosen = choose_device("auto", "bf16", "auto", shape=SHAPE)
        assert chosen.attention == "sdpa"
        assert "too little memory free" in chosen.attention_words
        (notice,) = choose_device("auto", "bf16", "sdpa-flash", shape=SHAPE).notices
        assert "memory does not suffice" in notice
    assert choose_device("auto", "bf16", "auto", shape=SHAPE).attention == "sdpa-cudnn"
    monkeypatch.setattr(trials, "_known", {})
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "why_not", full)
        chosen = choose_device("auto", "bf16", "auto", shape=SHAPE)
    assert chosen.attention_words == "Attention sdpa-cudnn, the fastest when that was measured"


def test_a_run_that_goes_on_keeps_its_attention(gpu: dict[str, float | str]) -> None:
    gpu |= {"sdpa-flash": 3.0, "sdpa-cudnn": 2.0, "sdpa-efficient": 4.0, "xformers": 5.0}
    chosen = choose_device("auto", "bf16", "auto", kept=Kept("xformers"))
    assert (chosen.attention, chosen.attention_words, chosen.notices) == ("xformers", "", ())
    assert choose_device("auto", "bf16", "auto", kept=Kept("eager")).attention == "eager"
    assert choose_device("auto", "bf16", "auto", kept=Kept("unheard of")).attention == "sdpa-cudnn"
    assert choose_device("auto", "bf16", "sdpa-efficient", kept=Kept("xformers")).attention == (
        "sdpa-efficient"
    )
    gpu["xformers"] = "another GPU"
    chosen = choose_device("auto", "bf16", "auto", kept=Kept("xformers"))
    assert chosen.attention == "sdpa-cudnn"
    assert "begun with the attention xformers" in chosen.notices[0]
    assert "another GPU" in chosen.notices[0]


def test_on_the_processor_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(device_module, "milliseconds")
    chosen = choose_device("cpu", "auto", "auto", shape=SHAPE)
    assert (chosen.precision, chosen.attention) == ("fp32", "sdpa")
    assert (chosen.attention_words, chosen.notices) == ("", ())


SD_WIDTH = 320


@pytest.mark.parametrize(
    ("quicker", "able", "width", "wanted"),
    [
        (2.0, True, SD_WIDTH, "bf16"),
        (1.1, True, SD_WIDTH, "fp32"),
        (2.0, False, SD_WIDTH, "fp32"),
        (2.0, True, 64, "fp32"),  # of the embedded base's kind
        (2.0, True, 0, "fp32"),  # nothing is known of the base
    ],
)
def test_a_processor_computes_in_bfloat16_where_that_is_quicker(
    quicker: float,
    able: bool,
    width: int,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    untried: None,
) -> None:
    # PyTorch's own library is the quicker one here in float32.
    seconds = {(torch.float32, True): quicker + 1, (torch.float32, False): quicker}
    seconds[torch.bfloat16, True] = 1.0
    measured = lambda dtype, width, onednn: seconds[dtype, onednn]  # noqa: E731
    monkeypatch.setattr(processor, "product_seconds", measured)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert choose_device("cpu", "auto", "sdpa", width=width).precision == wanted
    assert choose_device("cpu", "fp32", "sdpa", width=width).precision == "fp32"
    for kept in ("fp32", "bf16"):  # also where the run was begun elsewhere
        chosen = choose_device("cpu", "auto", "sdpa", width=width, kept=Kept("sdpa", kept))
        assert chosen.precision == kept


@pytest.mark.parametrize(
    ("own_takes", "able", "wanted"),
    [
        (2.0, True, "onednn"),
        (1.1, True, "pytorch"),
        (0.9, True, "pytorch"),
        (2.0, False, "pytorch"),
    ],
)
def test_a_processor_takes_the_products_of_the_quicker_library(
    own_takes: float, able: bool, wanted: str, monkeypatch: pytest.MonkeyPatch, untried: None
) -> None:
    measured = lambda dtype, width, onednn: 1.0 if onednn else own_takes  # noqa: E731
    monkeypatch.setattr(processor, "product_seconds", measured)
    monkeypatch.setattr(processor, "onednn_computes", lambda dtype: able)
    chosen = choose_device("cpu", "fp32", "sdpa")
    assert chosen.products == wanted
    assert Kept.of({"attention": "sdpa", "precision": "fp32", "products": wanted}) == chosen.kept
    for kept in ("onednn", "pytorch"):
        again = choose_device("cpu", "fp32", "sdpa", kept=Kept("sdpa", "fp32", kept))
        assert again.products == kept
    # There PyTorch asks oneDNN itself.
    assert choose_device("cpu", "bf16", "sdpa").products == "onednn"


@pytest.mark.parametrize(
    ("bf16_takes", "able", "width", "wanted"),
    [
        (2.0, True, SD_WIDTH, "wide-pytorch"),
        (1.2, True, SD_WIDTH, "onednn"),
        (0.5, True, SD_WIDTH, "onednn"),
        (2.0, True, 64, "onednn"),
        (2.0, False, SD_WIDTH, "onednn"),
    ],
)
def test_bfloat16_takes_products_of_float32_where_these_are_quicker(
    bf16_takes: float,
    able: bool,
    width: int,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    untried: None,
) -> None:
    def measured(dtype: torch.dtype, width: int, onednn: bool) -> float:
        return bf16_takes if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(processor, "product_seconds", measured)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    chosen = choose_device("cpu", "bf16", "sdpa", width=width)
    assert chosen.products == wanted
    for kept in ("onednn", "wide-pytorch", "wide-onednn"):
        again = choose_device("cpu", "bf16", "sdpa", width=width, kept=Kept("sdpa", "bf16", kept))
        assert again.products == kept
    wide = wanted.startswith(processor.WIDE)
    compiled = replace(chosen, compiling=True)
    for fast, device, widens in (
        ("on", chosen, wide),
        ("on", compiled, False),
        ("lean", chosen, False),
    ):
        model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 3)).requires_grad_(False)
        finish = finish_for(fast, device)
        assert finish is not None
        finish(model)
        assert [layer.widens for layer in model] == [widens, widens]
        assert [layer.onednn for layer in model] == [not wide, not wide]


def test_runs_of_earlier_versions_had_the_products_of_onednn() -> None:
    assert Kept.of({"attention": "sdpa", "precision": "fp32"}) == Kept("sdpa", "fp32", "onednn")


def test_the_trial_of_number_formats_leaves_the_threads_as_they_are() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert processor.product_seconds(torch.float32, 320, True) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("able", "kept", "wanted"),
    [
        (True, "", "bf16"),
        (False, "", "fp16"),
        (True, "fp32", "fp32"),  # begun on a processor
        (False, "fp16", "fp16"),
        (False, "bf16", "fp16"),
    ],
)
def test_on_a_gpu_the_number_format_is_kept_where_it_can_be(
    able: bool, kept: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    assert choose_device("auto", "auto", "sdpa", kept=Kept("sdpa", kept)).precision == wanted


@pytest.mark.parametrize(
    ("sdpa_takes", "wide_takes", "quickest"),
    [
        (2.0, 2.0, "blockwise"),
        (0.9, 0.9, "blockwise"),
        (0.5, 0.6, "sdpa"),
        (0.9, 0.5, "sdpa-fp32"),
    ],
)
def test_a_processor_with_bfloat16_takes_the_quicker_attention(
    sdpa_takes: float,
    wide_takes: float,
    quickest: str,
    monkeypatch: pytest.MonkeyPatch,
    untried: None,
) -> None:
    takes = {"blockwise": 1.0, "sdpa": sdpa_takes, "sdpa-fp32": wide_takes}

    def measured(name: str, *_: object) -> float:
        return takes[name]

    monkeypatch.setattr(processor, "milliseconds", measured)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert choose_device("cpu", "bf16", "auto", shape=SHAPE).attention == quickest
    assert (
        choose_device("cpu", "bf16", "auto", shape=SHAPE, kept=Kept("eager")).attention == "eager"
    )
    assert choose_device("cpu", "fp32", "auto", shape=SHAPE).attention == "sdpa"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert choose_device("cpu", "bf16", "auto", shape=SHAPE).attention == "sdpa"


def test_the_settings_know_every_attention() -> None:
    from trainer.config.settings import ModelSettings

    named = ModelSettings.model_fields["attention"].annotation
    assert set(named.__args__) == {"auto", *NAMES}  # type: ignore[union-attr]
    assert set(device_module.MEASURED) < set(NAMES)
    weights = ModelSettings.model_fields["weights"].annotation
    assert set(weights.__args__) == {"same", *quantize.FORMATS}  # type: ignore[union-attr]


def test_what_is_measured_is_the_attention_over_the_most_tokens(base: Path) -> None:
    facts = inspect_base(base)  # four pixels a latent
    shape = widest(facts, [Size(32, 32), Size(40, 32), Size(16, 64)], 3)
    assert shape == AttentionShape(pictures=3, heads=2, tokens=80, head_width=8)
    released = {name: first_attention(configuration(name, "unet")) for name in ("sd1", "sdxl")}
    assert released == {"sd1": AttentionFacts(8, 40, 1), "sdxl": AttentionFacts(10, 64, 2)}
    deep = replace(facts, attention=released["sdxl"], pixels_per_latent=8)
    assert widest(deep, [Size(1024, 1024)], 1).tokens == 4096
    # As in models with several heads a level and no attention above the last one.
    tuple_of_heads = {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "block_out_channels": [32, 64],
        "attention_head_dim": [2, 4],
    }
    assert first_attention(tuple_of_heads) == AttentionFacts(4, 16, 2)
    assert first_attention({"num_attention_heads": 5}) == AttentionFacts(5, 64, 1)


# --- runs


def test_a_run_says_and_keeps_what_was_measured(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: Any = ("sdpa-math", "Attention sdpa-math; it was measured.", [])
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "_best_attention", lambda *_: measured)
        outcome = train("run.stop_at_step=2").done()
    assert outcome.out.count("Attention sdpa-math; it was measured.") == 1
    outcome = train("--resume", "run.stop_at_step=0").done()
    assert "Attention" not in outcome.out
    checkpoint, _ = newest_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts["attention"]) == (4, "sdpa-math")
    with safe_open(lora_of(tmp_path / "out"), "pt") as file:
        metadata = file.metadata()
    assert metadata["likeness.attention"] == "sdpa-math"
    assert metadata["likeness.frozen_weights"] == "same"


def test_a_run_keeps_its_number_format(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(device_module, "_LARGE", 1)
        patch.setattr(processor, "quicker_format", lambda: "bf16")
        train("run.stop_at_step=2", "model.precision=auto").done()
    train("--resume", "run.stop_at_step=0").done()
    checkpoint, _ = newest_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts["precision"]) == (4, "bf16")
    with safe_open(lora_of(tmp_path / "out"), "pt") as file:
        assert file.metadata()["ss_mixed_precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "fp8", "nf4"])
def test_a_run_on_packed_weights_draws_and_goes_on_as_if_it_had_not_stopped(
    weights: str, train: Train, tmp_path: Path
) -> None:
    words = (f"model.weights={weights}", "preview.every_steps=4", "objective.prior_weight=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*words, output=whole).done()
    assert list((whole / "previews").rglob("*.png"))
    train(*words, "run.stop_at_step=2", output=parts).done()
    refused = train("--resume", "model.weights=same", output=parts)
    assert refused.code == 2
    assert f"model.weights: was '{weights}', now 'same'" in refused.err
    train("--resume", "run.stop_at_step=0", output=parts).done()
    assert same_tensors(checkpoint_of(parts, 4), checkpoint_of(whole, 4))


def test_weights_that_cannot_be_packed_are_refused_before_anything_is_loaded(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "why_not", lambda *_: "this GPU has no such numbers")
    outcome = train("model.weights=fp8")
    assert outcome.code == 1
    assert "Frozen weights in fp8 cannot be used on 'cpu': this GPU has no such numbers" in (
        outcome.err
    )
    assert not (tmp_path / "out").exists()


def test_number_formats_name_what_depends_on_them() -> None:
    plain_device = Device(CPU, "bf16", "sdpa")
    assert plain_device.numbers == "bf16"
    assert replace(plain_device, weights="int8").numbers == "bf16 int8"


# --- what is on the device


class Places:
    """A device that is none: which parts were moved to it and off it, in order, and what is there.

    The weights stay where they are.
    """

    def __init__(self) -> None:
        self.moves: list[tuple[str, str]] = []
        self.there: set[str] = set()

    def to(self, module: nn.Module, place: object) -> nn.Module:
        name = type(module).__name__
        self.moves.append((name, str(place)))
        (self.there.discard if str(place) == "cpu" else self.there.add)(name)
        return module


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    device = Places()
    monkeypatch.setattr(nn.Module, "to", lambda module, place: device.to(module, place))
    gpu = Device(torch.device("cuda"), "fp32", "sdpa")
    monkeypatch.setattr(session_module, "choose_device", lambda *_, **__: gpu)
    return device


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processor plays the GPU's part")
@pytest.mark.parametrize(
    ("text_encoder", "drawn"),
    [
        (False, 0),
        pytest.param(True, 0, marks=pytest.mark.slow),
        pytest.param(False, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_has_on_its_gpu_what_it_needs(
    text_encoder: bool, drawn: int, train: Train, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos are encoded before the UNet comes; VAE and frozen text encoders go before it trains,
    and come back to draw."""
    seen: dict[str, list[set[str]]] = {"vae": [], "train": [], "draw": [], "picture": []}
    encode, loss = AutoencoderKL.encode, Learner.loss
    denoise, picture = StableDiffusionPipeline.__call__, AutoencoderKL.decode

    def encoding(vae: AutoencoderKL, pixels: Tensor) -> Any:
        seen["vae"].append(set(places.there))
        return encode(vae, pixels)

    def training(learner: Learner, index: int) -> Tensor:
        result = loss(learner, index)
        seen["train"].append(set(places.there))
        return result

    def drawing(pipeline: StableDiffusionPipeline, **named: Any) -> Any:
        seen["draw"].append(set(places.there))
        return denoise(pipeline, **named)

    def developing(vae: AutoencoderKL, latents: Tensor, **named: Any) -> Any:
        seen["picture"].append(set(places.there))
        return picture(vae, latents, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", drawing)
    monkeypatch.setattr(AutoencoderKL, "decode", developing)
    monkeypatch.setattr(AutoencoderKL, "encode", encoding)
    monkeypatch.setattr(Learner, "loss", training)
    words = (f"preview.every_steps={drawn}", "preview.scorer=plain", "data.cache=false")
    train("run.total_steps=2", *words, f"adapter.text_encoder={str(text_encoder).lower()}").done()
    vae, unet, words_model = "AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel"
    assert seen["vae"]
    assert all(there == {vae} for there in seen["vae"])
    kept = {unet, words_model} if text_encoder else {unet}
    assert seen["train"] == [kept] * 2
    # Samples are drawn in no more room than training takes, and a VAE's.
    assert bool(seen["draw"]) == bool(drawn)
    assert [there for there in seen["draw"] if there != kept] == []
    assert all(there <= kept | {vae} for there in seen["picture"])
    assert places.moves.count((unet, "cuda")) == 1
    assert (unet, "cpu") not in places.moves
    # To encode, for the class pictures that scores compare with, and for two rounds of samples.
    assert places.moves.count((vae, "cuda")) >= (4 if drawn else 1)


# --- fp16


def scaled_learner(base: Path, patch: pytest.MonkeyPatch, start: float) -> Learner:
    """A learner as fp16 trains on a GPU: loss scaling that begins at `start`."""
    learner = make_learner(base, Recipe(text_encoder=False))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=2)
    accelerator.native_amp = True
    # accelerate takes fp16 on a GPU only.
    patch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    return Learner(
        learner.backbone,
        learner.adapters,
        learner.optimizer.optimizer,
        learner.batches,
        learner.prior,
        learner.objective,
        accelerator,
    )


def weights_of(learner: Learner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.parameters])


def test_loss_scaling_changes_no_step(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling by powers of two is exact in fp32, clipping comes after it is undone."""
    plain_learner = make_learner(base, Recipe(text_encoder=False))
    plan = make_plan(4, clip=0.01)
    losses = [report.loss for report in train_steps(plain_learner, plan)]
    scaled = scaled_learner(base, monkeypatch, 2.0**10)
    assert [report.loss for report in train_steps(scaled, plan)] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights_of(scaled), weights_of(plain_learner))
    assert scaled.accelerator.scaler.get_scale() == 2.0**12  # twice grown in four steps


def train_steps(learner: Learner, plan: Any, start: int = 0) -> list[Any]:
    return list(train(learner, plan, start))


def test_an_overflow_is_skipped_and_goes_on_after_a_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learner() -> Learner:
        made = scaled_learner(base, monkeypatch, 2.0**127)
        loss = made.loss
        # Gradients that this scale takes beyond fp32, and a few times half of it does not.
        monkeypatch.setattr(made, "loss", lambda index: 20 * loss(index))
        return made

    whole, parts = learner(), learner()
    before = weights_of(whole)
    plan = make_plan(10)
    train_steps(whole, replace(plan, last_step=1))
    assert torch.equal(weights_of(whole), before)
    assert whole.accelerator.scaler.get_scale() == 2.0**126
    train_steps(whole, plan, 1)
    assert not torch.equal(weights_of(whole), before)
    train_steps(parts, replace(plan, last_step=5))
    save_checkpoint(tmp_path, parts, 5, {}, keep=1)
    state = json.loads((tmp_path / "step-000005" / "state.json").read_text(encoding="utf-8"))
    assert state["scaler"]["scale"] == parts.accelerator.scaler.get_scale()
    resumed = learner()
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    restore(resumed, checkpoint)
    assert resumed.accelerator.scaler.state_dict() == parts.accelerator.scaler.state_dict()
    train_steps(resumed, plan, 5)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


# --- on a GPU

GPU_ATTENTION = ("sdpa", *KERNELS, "xformers")
# fp16 and bf16 hold what their rounding leaves; on a GPU sums are taken in another order as well,
# and TF32 may stand in for fp32 in convolutions (10 bits).
GPU_LIMITS = {
    torch.float32: Limit(1e-3, 1e-4, 5e-3),
    torch.bfloat16: Limit(5e-3, 2e-3, 2e-2),
    torch.float16: Limit(1e-3, 2e-4, 5e-3),
}


def on_gpu(base: Path, **options: Any) -> tuple[Measured, float]:
    """What is measured there, and the peak memory in MiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    AcceleratorState._reset_state(True)  # it would stay where it was first, on the processor
    try:
        found = measure(base, device=torch.device("cuda"), **options)
    finally:
        AcceleratorState._reset_state(True)
    peak = torch.cuda.max_memory_allocated() / 2**20
    return Measured(found.loss, found.gradient.cpu()), peak


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["same", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("dtype", GPU_LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_each_precision_is_eager_fp32(
    family: str,
    dtype: torch.dtype,
    weights: str,
    plain: Callable[[str], tuple[Path, Measured]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, wanted = plain(family)
    found, peak = on_gpu(base, dtype=dtype, weights=weights)
    with capsys.disabled():
        print(f"\n{family} {dtype} weights {weights}: peak {peak:.1f} MiB")
    limit = GPU_LIMITS[dtype]
    if weights != "same":
        own = LIMITS[weights][1]
        limit = Limit(own.loss + limit.loss, own.angle + limit.angle, own.length + limit.length)
    check(found, wanted, limit)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_each_attention_is_eager_fp32(
    dtype: torch.dtype,
    name: str,
    plain: Callable[[str], tuple[Path, Measured]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, wanted = plain("sd1")
    device = torch.device("cuda")
    for shape in (SHAPE, replace(SHAPE, head_width=40), replace(SHAPE, head_width=64)):
        if reason := why_not(name, shape, device, dtype):
            pytest.skip(f"{name} with heads of {shape.head_width} and {dtype}: {reason}")
    found, peak = on_gpu(base, dtype=dtype, attention=name)
    with capsys.disabled():
        print(f"\n{name} {dtype}: peak {peak:.1f} MiB")
    check(found, wanted, GPU_LIMITS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_choice_is_measured(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = AttentionShape(pictures=1, heads=8, tokens=4096, head_width=40)
    name, words = measured_attention(shape, torch.device("cuda"), dtype)
    with capsys.disabled():
        print(f"\n{dtype}: {words}")
    assert name in device_module.MEASURED
    assert all(other in words for other in device_module.MEASURED)
    assert why_not(name, shape, torch.device("cuda"), dtype) == ""
