"""Compiled blocks: what is chosen and said, and that they compute what the plain ones do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch._dynamo.utils import counters

from tests.learners import Recipe, load_backbone, make_learner
from tests.runs import Outcome, same_tensors, tensors_of
from tests.test_fast import (
    fast_learner,
    goes_on_bit_for_bit,
    have_the_losses_of_the_plain_path,
    quick,
    random_like,
)
from tests.test_memory_class import GPU, a_job
from tests.tiny import save_tiny
from trainer.adapters.attach import attach
from trainer.commands.fitting import fitted, require_gpu
from trainer.errors import ConfigError, ModelError
from trainer.families import Backbone
from trainer.families.compiling import CompiledBlock, compile_blocks, why_not
from trainer.families.lean import LeanGEGLU, LeanResnet
from trainer.training.device import choose_device
from trainer.training.learner import AdapterPlan, Learner, attach_adapters, disabled, scaled

CPU = torch.device("cpu")
ADAPT = partial(attach, names=["attn1.to_q", "attn2.to_v"], rank=2, alpha=2.0, seed=0)
# PyTorch looks at the gradients of what goes into a block, and hides from users that it warns.
# Whether it is one that PyTorch takes only a try tells, and that is what is tested.
COMPILES = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="there is no C++ compiler"
)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("compiling") / "sd1", "sd1")


def compiled_learner(folder: Path, recipe: Recipe, blocks: str = "direct") -> Learner:
    if blocks == "plain":  # as with model.fast=off, lean and on
        return make_learner(load_backbone(folder, compiling=True), recipe)
    return fast_learner(folder, recipe, pack=blocks == "direct", blocks=blocks, compiling=True)


def predicted(backbone: Backbone, size: int = 8) -> Tensor:
    result: Tensor = backbone.components["unet"](
        torch.ones(1, 4, size, size), 5, torch.ones(1, 77, 16), return_dict=False
    )[0]
    return result


# --- choosing and words


def failing(error: Exception) -> Callable[[], Callable[..., Tensor]]:
    def compute(*_: object, **__: object) -> Tensor:
        raise error

    return lambda: compute


def test_blocks_are_compiled_only_where_gradients_are_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_backbone(folder)
    ours = load_backbone(folder, compiling=True)
    unet = ours.components["unet"]
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    assert [type(block) for block in blocks] == [CompiledBlock] * 4
    assert compile_blocks(unet) == 0, "they are already"
    monkeypatch.setattr("trainer.families.compiling._compiled", failing(OSError("none")))
    with torch.no_grad():
        assert torch.equal(predicted(ours), predicted(plain))
    with pytest.raises(OSError, match="none"):
        predicted(ours)


def test_of_lean_blocks_a_compiler_is_left_the_gates(folder: Path) -> None:
    for compiling in (False, True):
        unet = load_backbone(folder, blocks="lean", compiling=compiling).components["unet"]
        kinds = {type(module) for module in unet.modules()}
        assert LeanResnet in kinds
        assert (LeanGEGLU in kinds) is not compiling


def test_without_a_compiler_it_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch._dynamo.exc.TorchDynamoException("No C++ compiler.\n\nSet TORCH_LOGS for more")
    monkeypatch.setattr("trainer.families.compiling._compiled", failing(error))
    chosen = choose_device("cpu", "fp32", "sdpa", compiling=True)
    assert not chosen.compiling
    assert chosen.notices == (
        "The UNet's blocks cannot be compiled here (No C++ compiler.); going on without.",
    )
    monkeypatch.setattr("trainer.families.compiling.why_not", lambda *_: "")
    chosen = choose_device("cpu", "fp32", "sdpa", compiling=True)
    assert chosen.compiling
    assert not chosen.notices
    assert not choose_device("cpu", "fp32", "sdpa").compiling


def test_code_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(block: BasicTransformerBlock, x_BTC: Tensor, **named: Any) -> Tensor:
        plain: Tensor = BasicTransformerBlock.forward(block, x_BTC, **named)
        return plain * factor + (1 - factor) * plain.detach()  # only its gradients differ

    monkeypatch.setattr("trainer.families.compiling._compiled", lambda: compute)
    factor = 1.0
    assert why_not("sdpa", CPU, torch.float32, ADAPT) == ""
    factor = 0.98
    assert why_not("sdpa", CPU, torch.float32, ADAPT) == (
        "what the compiled code computes is wrong: its gradients are 2.0% off"
    )


def test_a_size_that_cannot_be_compiled_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = compiled_learner(folder, Recipe())
    error = torch._dynamo.exc.TorchDynamoException("Too large.\n\nSet TORCH_LOGS for more")
    monkeypatch.setattr("trainer.families.compiling._compiled", failing(error))
    with pytest.raises(ModelError, match=r"for pictures of this size: Too large\.") as caught:
        learner.loss(0)
    assert "model.compile=false" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "int8"}, "cannot be combined with packed weights"),
        ({"checkpointing": True}, "cannot be combined with blocks that are computed twice"),
        ({"stream_blocks": True}, "cannot be combined with streamed blocks"),
    ],
)
def test_what_it_is_not_made_for_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    require_gpu(a_job(tmp_path, **settings).config, GPU)
    with pytest.raises(ConfigError, match=words):
        require_gpu(a_job(tmp_path, compile=True, **settings).config, GPU)


def test_a_memory_class_keeps_to_what_it_is_made_for(tmp_path: Path) -> None:
    job, words = fitted(a_job(tmp_path, memory="4gb", compile=True), GPU)
    assert job.config.optimizer.name == "adamw8bit"
    assert "That is too much" in words
    require_gpu(job.config, GPU)


# --- compiled

FAST = pytest.mark.parametrize("blocks", ["plain", "direct", "lean"])


@pytest.mark.slow
@COMPILES
@FAST
def test_gradients_are_those_of_the_plain_path(blocks: str, folder: Path) -> None:
    """Of two pictures, and of one: of that alone inductor once made wrong code."""
    grads: list[list[Tensor]] = []
    counters.clear()
    recipe = Recipe(text_encoder=False, sizes=((8, 8), (8, 8), (8, 16)))
    for make in (make_learner, partial(compiled_learner, blocks=blocks)):
        learner = make(folder, recipe)
        random_like(learner.parameters, 0)
        grads.append([])
        for batch in (2, 1):
            index = next(i for i in range(9) if len(learner.batches.batch(i).samples) == batch)
            grads[-1] += torch.autograd.grad(learner.loss(index), learner.parameters)
    assert not counters["graph_break"]
    assert len(grads[0]) == len(grads[1]) > 0
    largest = max(float(grad.abs().max()) for grad in grads[0])
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=3e-6 * largest)


@pytest.mark.slow
@COMPILES
@FAST
def test_twenty_steps_have_the_losses_of_the_plain_path(blocks: str, folder: Path) -> None:
    have_the_losses_of_the_plain_path(partial(compiled_learner, blocks=blocks), folder)


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_twenty_steps_of_other_families_too(name: str, tmp_path: Path) -> None:
    have_the_losses_of_the_plain_path(compiled_learner, save_tiny(tmp_path / name, name))


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("attention", ["sdpa-flash", "sdpa-math", "blockwise", "eager"])
def test_every_attention_can_be_compiled(attention: str) -> None:
    assert why_not(attention, CPU, torch.float32, ADAPT) == ""


@pytest.mark.slow
@COMPILES
def test_equal_blocks_share_their_code(folder: Path) -> None:
    torch.compiler.reset()
    learner = compiled_learner(folder, Recipe(text_encoder=False))
    counters.clear()
    learner.loss(0).backward()
    learner.loss(1).backward()
    assert counters["stats"]["unique_graphs"] == 2, "four blocks of two widths"


@pytest.mark.slow
@COMPILES
def test_the_adapters_strength_is_followed(folder: Path) -> None:
    """With gradients, where blocks are compiled, and without."""
    plan = AdapterPlan("lora", 2, 3.0, "attention+ff", False, 0)
    both = [quick(load_backbone(folder, compiling=compiling)) for compiling in (False, True)]
    results: list[list[Tensor]] = []
    for backbone in both:
        base = predicted(backbone).detach()
        adapters = attach_adapters(backbone, plan)
        random_like(adapters["unet"].parameters(), 0)
        found = [base, predicted(backbone).detach()]
        for factor in (0.5, 0.25):
            with scaled(adapters, factor):
                found.append(predicted(backbone).detach())
        with disabled(adapters):
            found.append(predicted(backbone).detach())
        with torch.no_grad(), scaled(adapters, 0.5):
            found.append(predicted(backbone))
        found.append(predicted(backbone).detach())
        results.append(found)
    for ours, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    base, whole, half, quarter, none, half_again, whole_again = results[1]
    assert torch.equal(none, base)
    assert torch.equal(whole, whole_again)
    torch.testing.assert_close(half, half_again, rtol=1e-4, atol=1e-5)
    for first, second in ((base, quarter), (quarter, half), (half, whole)):
        assert (first - second).abs().max() > 1e-3, "each strength tells"


@pytest.mark.slow
@COMPILES
def test_a_resumed_run_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    """Also where another size comes first after it."""
    recipe = Recipe(sizes=((8, 8), (8, 8), (8, 16)))
    # The compiler forgets, as in a new process.
    goes_on_bit_for_bit(lambda: compiled_learner(folder, recipe), tmp_path, torch.compiler.reset)


@pytest.mark.slow
@COMPILES
def test_a_whole_run_draws_scores_exports_and_goes_on(
    train: Callable[..., Outcome], tmp_path: Path
) -> None:
    settings = ("preview.every_steps=2", "objective.prior_weight=1")
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    train(*settings, output=plain).done()
    done = train(*settings, "model.compile=true", output=whole).done()
    assert "cannot be compiled" not in done.out
    train(*settings, "model.compile=true", "run.stop_at_step=2", output=parts).done()
    refused = train("--resume", "--set=model.compile=false", output=parts)
    assert refused.code != 0
    assert "model.compile" in refused.err
    train("--resume", "--set=run.stop_at_step=0", output=parts).done()
    assert same_tensors(tensors_of(parts), tensors_of(whole))
    for name, tensor in tensors_of(plain).items():
        # fp16 in the file, and Adam's first steps turn on the sign of small gradients.
        torch.testing.assert_close(tensors_of(whole)[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_machine_without_compiler_is_found_out_by_trying(tmp_path: Path) -> None:
    code = (
        "import torch; from trainer.families.compiling import why_not; "
        "print('why:', why_not('sdpa', torch.device('cpu'), torch.float32, lambda block: None))"
    )
    lacking = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    lacking.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=lacking, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1].startswith("why: ")
    assert "compiler" in done.stdout
