"""Blocks whose weights come when they compute: the same numbers, and never more than two there."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners import Recipe, load_backbone, make_learner, make_plan
from tests.models import small_unet
from tests.runs import same_tensors
from tests.test_training import run
from tests.tiny import save_tiny
from trainer.adapters.attach import attach
from trainer.adapters.frozen import quicken
from trainer.adapters.targets import select_layers
from trainer.families import streaming
from trainer.families.checkpointing import checkpoint_blocks
from trainer.families.lean import keep_less
from trainer.families.quantize import pack_weights
from trainer.families.streaming import Streamer, stream
from trainer.training.snapshot import take_snapshot

CPU = torch.device("cpu")
FAMILIES = ("sd1", "sdxl")


@pytest.fixture
def _none_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not on the device are no numbers: whoever computes with them is found out.

    The device is the processor here, so what lies in main memory could be computed with as well.
    """
    kept: dict[int, Tensor] = {}
    make, copy = streaming._moved_together, Streamer._copy

    def moved(weights: list[nn.Parameter], home: Tensor) -> Any:
        made = make(weights, home)
        kept[id(made.home)] = made.home.clone()
        made.home.fill_(255)  # not a number in every floating format, -1 in int8
        return made

    def copied(streamer: Streamer, number: int, place: Any) -> None:
        home = streamer._blocks[number].home
        home.copy_(kept[id(home)])
        copy(streamer, number, place)
        home.fill_(255)

    monkeypatch.setattr(streaming, "_moved_together", moved)
    monkeypatch.setattr(Streamer, "_copy", copied)


def built(family: str, *, weights: str = "same", share: float = 0.0) -> Any:
    """As a base is loaded. share: of the blocks that are checkpointed."""
    unet = small_unet(family).requires_grad_(False).eval()
    if weights != "same":
        pack_weights(unet, weights, CPU)
    quicken(unet, pack=False)
    checkpoint_blocks(unet, share)
    keep_less(unet)
    return unet


def trained(unet: Any) -> list[nn.Parameter]:
    """Adapters on everything; factors that are no zeros."""
    paths = select_layers(unet, "unet", "all")
    attached = attach(unet, paths, rank=2, alpha=2.0, seed=0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in attached.layers.values():
            layer.up.normal_(0, 0.1, generator=draw)
    return attached.parameters()


def predicted(unet: Any, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, 4, 8, 8, generator=draw)
    text = torch.randn(2, 5, 16, generator=draw)
    added = None
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * 4
        added = {
            "text_embeds": torch.randn(2, pooled, generator=draw),
            "time_ids": torch.ones(2, 6),
        }
    prediction: Tensor = unet(
        noisy, torch.tensor([3, 700]), encoder_hidden_states=text, added_cond_kwargs=added
    ).sample
    return prediction


def computed(unet: Any, parameters: list[nn.Parameter], seed: int = 0) -> list[Tensor]:
    """Prediction and gradients of a step."""
    prediction = predicted(unet, seed)
    for parameter in parameters:
        parameter.grad = None
    prediction.square().sum().backward()
    return [prediction.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]


@pytest.mark.usefixtures("_none_at_home")
@pytest.mark.parametrize(
    ("family", "weights", "share"),
    [
        ("sdxl", "same", 0.0),
        ("sdxl", "same", 1.0),
        ("sd1", "int8", 0.5),
        ("sd1", "fp8", 0.0),
        ("sd1", "nf4", 1.0),
    ],
)
def test_the_numbers_are_those_of_the_unet_as_it_was(
    family: str, weights: str, share: float
) -> None:
    plain, other = (built(family, weights=weights, share=share) for _ in range(2))
    parameters = trained(plain)
    streamer = stream(other, CPU)
    others = trained(other)
    assert len(streamer.blocks) > 10
    for seed in range(2):  # the second time it is known what comes next
        wanted, found = computed(plain, parameters, seed), computed(other, others, seed)
        assert len(wanted) == len(found) > 20
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    with torch.no_grad():
        assert torch.equal(predicted(plain, 5), predicted(other, 5))


def lying(streamer: Streamer) -> list[int]:
    """The blocks whose weights are on the device, by where they point."""
    places = [place.memory for place in streamer._places]
    spans = [(memory.data_ptr(), memory.data_ptr() + memory.numel()) for memory in places]
    return [
        number
        for number, block in enumerate(streamer._blocks)
        if any(a <= block.weights[0].data_ptr() < b for a, b in spans)
    ]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_at_most_two_blocks_are_there_and_the_next_is_there_in_time(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    unet = built("sdxl", share=share)
    streamer = stream(unet, CPU)
    parameters = trained(unet)
    brought = Streamer._bring
    late: list[int] = []

    def bring(self: Streamer, number: int, way: Any) -> None:
        if number not in lying(self):
            late.append(number)
        brought(self, number, way)
        assert number in lying(self)
        assert len(lying(self)) <= 2

    monkeypatch.setattr(Streamer, "_bring", bring)
    counts = []
    for _ in range(3):
        late.clear()
        computed(unet, parameters)
        counts.append(len(late))
    # At first nothing is known of the order, later all of it.
    assert counts[0] > len(streamer.blocks)
    assert counts[1:] == [0, 0]
    assert len(lying(streamer)) == 2


def test_the_device_holds_two_of_the_largest_and_what_is_in_no_block() -> None:
    unet = built("sdxl")
    whole = sum(weight.nbytes for weight in unet.parameters())
    streamer = stream(unet, CPU)
    homes = [block.home for block in streamer._blocks]
    assert streamer.largest == max(home.numel() for home in homes)
    assert [place.memory.numel() for place in streamer._places] == [streamer.largest] * 2
    streamed = sum(weight.nbytes for block in streamer._blocks for weight in block.weights)
    assert streamed > 0.8 * whole
    assert streamed <= sum(home.numel() for home in homes)


def test_main_memory_is_taken_in_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    make = streaming._bytes

    def counted(size: int, device: torch.device, *, pinned: bool = False) -> Tensor:
        taken.append(size)
        assert pinned or not size
        return make(size, device)

    monkeypatch.setattr(streaming, "_bytes", counted)
    monkeypatch.setattr(streaming, "_PIECE", 100)
    sizes = [40, 50, 30, 150, 60, 5]
    homes = list(streaming._homes(sizes, pinned=True))
    assert [home.numel() for home in homes] == sizes
    # One for the first two, one for the third, one for the large, and what is left for the rest.
    assert taken == [0, 100, 100, 150, 65]
    for number, home in enumerate(homes):
        home.fill_(number)
    assert [int(home.unique()) for home in homes] == list(range(6))


def test_layers_that_keep_their_weights_for_the_backward_pass_stay() -> None:
    unet = small_unet("sd1").requires_grad_(False)
    with pytest.raises(ValueError, match="no block"):
        stream(unet, CPU)
    # One quick layer: that alone is streamed.
    layer = unet.get_submodule("mid_block.resnets.0.conv1")
    parent = unet.get_submodule("mid_block.resnets.0")
    held = nn.ModuleDict({"conv1": layer})
    quicken(held, pack=False)
    assert parent.conv1 is layer
    streamer = stream(unet, CPU)
    assert [len(block.weights) for block in streamer._blocks] == [1]


def test_a_base_streams_its_unet_alone_and_settles_what_is_attached(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[int] = []
    settle = Streamer.settle

    def counted(streamer: Streamer) -> None:
        settled.append(sum(1 for _ in streamer._unet.parameters()))
        settle(streamer)

    monkeypatch.setattr(Streamer, "settle", counted)
    backbone: Any = load_backbone(
        folders["sd1"], stream_blocks=True, finish=partial(quicken, pack=False)
    )
    backbone.components["unet"]  # noqa: B018  # read here, as on a GPU, which it is moved to later
    backbone._released.add("unet")
    learner = make_learner(backbone)
    # When the UNet is first held, and again with its adapters.
    first, *later = settled
    assert later[-1] == first + len(learner.adapters["unet"].parameters())


def test_copies_and_computing_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which a GPU is told: nothing is overwritten that is still computed with, and
    nothing is computed with that has not arrived."""
    said: list[tuple[str, object]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(("waits for", other.name))

        def record_event(self) -> int:
            return len(said)

        def wait_event(self, event: int) -> None:
            said.append(("computing waits", event))

    unet = built("sd1")
    streamer = stream(unet, CPU)
    parameters = trained(unet)
    computed(unet, parameters)
    streamer._copying = Stream("copying")
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    brought = Streamer._bring

    def bring(self: Streamer, number: int, way: Any) -> None:
        brought(self, number, way)
        place = next(place for place in self._places if place.block == number)
        if place.ready is not None:
            # Computing has waited for this copy, and the copy for all that was computed before.
            assert ("computing waits", place.ready) in said
            assert said[place.ready - 1] == ("waits for", "computing")

    monkeypatch.setattr(Streamer, "_bring", bring)
    for _ in range(2):
        computed(unet, parameters)
    assert len(said) > 4 * len(streamer.blocks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("streamed")
    return {family: save_tiny(home / family, family) for family in FAMILIES}


@pytest.mark.usefixtures("_none_at_home")
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_training_is_the_same(folders: dict[str, Path], family: str) -> None:
    found = []
    for streamed in (False, True):
        backbone = load_backbone(folders[family], finish=partial(quicken, pack=False))
        if streamed:
            stream(backbone.components["unet"], CPU)
        learner = make_learner(backbone, Recipe(prior_weight=1.0, prior_target="base"))
        losses = run(learner, make_plan(4))
        state = take_snapshot(learner, 4)
        found.append((losses, dict(state.adapter)))
    assert found[0][0] == found[1][0]
    assert same_tensors(found[0][1], found[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_computes_the_same_and_holds_less(
    folders: dict[str, Path], checkpointing: bool
) -> None:
    found, sizes = [], []
    for streamed in (False, True):
        backbone = load_backbone(
            folders["sdxl"],
            device=torch.device("cuda"),
            checkpointing=checkpointing,
            stream_blocks=streamed,
            blocks="lean",
            finish=partial(quicken, pack=False),
        )
        learner = make_learner(backbone, Recipe())
        losses = run(learner, make_plan(6))
        assert all(parameter.is_cuda for parameter in learner.parameters)
        frozen = [w for w in backbone.components["unet"].parameters() if not w.requires_grad]
        sizes.append(sum(weight.nbytes for weight in frozen if weight.is_cuda))
        found.append((losses, dict(take_snapshot(learner, 6).adapter)))
    assert found[0][0] == found[1][0]
    assert same_tensors(found[0][1], found[1][1])
    assert sizes[1] < 0.5 * sizes[0]
