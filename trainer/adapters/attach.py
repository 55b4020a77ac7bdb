"""Swap adapter layers into a model, and out again: the model's own code is never edited."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.adapters import ADAPTERS
from trainer.adapters.lora import LoRALayer
from trainer.adapters.plans import BlockRule, plan_layers
from trainer.errors import FileFormatError, ModelError

_SHOWN_PROBLEMS = 5


class Attached:
    """The adapter layers of one model, made by `attach`.

    Attributes:
        layers: from dotted path in the model to adapter layer, in the order they were named.
        rates: from dotted path to the factor of the learning rate, for the same layers.
    """

    def __init__(
        self, root: nn.Module, layers: Mapping[str, LoRALayer], rates: Mapping[str, float]
    ) -> None:
        self.layers = dict(layers)
        self.rates = dict(rates)
        self._root = root
        self._frozen = [p for p in root.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for path, layer in self.layers.items():
            root.set_submodule(path, layer)
        self._attached = True

    def parameters(self) -> list[nn.Parameter]:
        """`down` and `up` of every layer, in the order of `layers`."""
        return [p for layer in self.layers.values() for p in (layer.down, layer.up)]

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """The parameters by factor of the learning rate, in the order of first appearance."""
        groups: dict[float, list[nn.Parameter]] = {}
        for path, layer in self.layers.items():
            groups.setdefault(self.rates[path], []).extend((layer.down, layer.up))
        return list(groups.items())

    def state(self) -> dict[str, Tensor]:
        """`"<path>.down"` and `"<path>.up"`: float32 copies on the CPU."""
        return {
            f"{path}.{factor}": getattr(layer, factor).detach().to("cpu", torch.float32, copy=True)
            for path, layer in self.layers.items()
            for factor in ("down", "up")
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the factors from what `state` returned.

        Raises:
            FileFormatError: a layer is missing, unknown or of another shape; nothing is changed.
        """
        problems = _problems(self.layers, state)
        if problems:
            more = len(problems) - _SHOWN_PROBLEMS
            shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
            raise FileFormatError(
                "The adapter weights do not fit this model.",
                where="\n".join(shown),
                fix="Use the base model, rank and targets they were trained with.",
            )
        for path, layer in self.layers.items():
            layer.down.copy_(state[f"{path}.down"])
            layer.up.copy_(state[f"{path}.up"])

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength for sampling: 1 as trained, 0 the base alone, bit for bit."""
        for layer in self.layers.values():
            layer.multiplier = multiplier

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Inside the `with` block the updates have so much of the strength they have outside; at 0
        the model is the base alone, bit for bit."""
        before = {path: layer.multiplier for path, layer in self.layers.items()}
        for path, multiplier in before.items():
            self.layers[path].multiplier = factor * multiplier
        try:
            yield
        finally:
            for path, multiplier in before.items():
                self.layers[path].multiplier = multiplier

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the `with` block the model is the base alone, bit for bit."""
        with self.scaled(0.0):
            yield

    def detach(self) -> None:
        """Put the original layers back; the model is as it was before. Does nothing twice."""
        if not self._attached:
            return
        for path, layer in self.layers.items():
            self._root.set_submodule(path, layer.base)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._attached = False


def attach(
    root: nn.Module,
    names: Sequence[str],
    *,
    adapter: str = "lora",
    rank: int,
    alpha: float,
    seed: int,
    rules: Sequence[BlockRule] = (),
) -> Attached:
    """Wrap the named layers of `root` with adapters and freeze everything else in it.

    The start of a layer depends on the seed and its name alone, so adding or reordering targets
    leaves the start of the others as it was.

    Args:
        root: the model; it should be on its device and in its precision already, because
            `root.to(dtype)` afterwards would cast the float32 factors as well.
        names: dotted paths of `nn.Linear` and `nn.Conv2d` layers in `root`.
        adapter: a name in `ADAPTERS`.
        rank, alpha: of every layer that no rule changes.
        seed: any integer.
        rules: rank, alpha and learning rate of some layers; later ones win.

    Raises:
        ConfigError: a rule fits none of the layers; `root` is left as it was.
        ModelError: a name does not exist or cannot be adapted; `root` is left as it was.
    """
    make_layer = ADAPTERS.load(adapter)
    modules = dict(root.named_modules(remove_duplicate=False))
    bases = {name: _find(modules, name) for name in dict.fromkeys(names)}
    if not bases:
        raise ModelError("There is no layer to adapt.", fix="Name at least one layer.")
    plans = plan_layers(tuple(bases), rank=rank, alpha=alpha, rules=rules)
    layers = {
        plan.path: make_layer(
            bases[plan.path],
            rank=plan.rank,
            alpha=plan.alpha,
            generator=_generator(seed, plan.path),
        )
        for plan in plans
    }
    return Attached(root, layers, {plan.path: plan.rate for plan in plans})


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # torch takes seeds of up to 64 bits; 63 keep it clear of the sign.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _find(modules: Mapping[str, nn.Module], name: str) -> nn.Linear | nn.Conv2d:
    """The layer called `name` among all modules of a model by their dotted path."""
    module = modules.get(name)
    if name and isinstance(module, nn.Linear | nn.Conv2d):
        return module
    if isinstance(module, LoRALayer):
        raise ModelError(f"The layer '{name}' has an adapter already.", fix="Detach that first.")
    adaptable = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
    near = difflib.get_close_matches(name, adaptable, n=3, cutoff=0.5)
    kind = "does not exist" if module is None else f"is a {type(module).__name__}"
    raise ModelError(
        f"The layer '{name}' cannot be adapted: it {kind} in {type(modules['']).__name__}.",
        where="\n".join(near),
        fix="Did you mean one of these?" if near else "Name Linear and Conv2d layers.",
    )


def _problems(layers: Mapping[str, LoRALayer], state: Mapping[str, Tensor]) -> list[str]:
    """One line for each layer that is missing, unknown or of another shape."""
    wanted = {f"{path}.{factor}" for path in layers for factor in ("down", "up")}
    problems = [f"layer {key}: is not in the file" for key in sorted(wanted - state.keys())]
    problems += [f"layer {key}: is not in the model" for key in sorted(state.keys() - wanted)]
    for path, layer in layers.items():
        down, up = state.get(f"{path}.down"), state.get(f"{path}.up")
        if down is None or up is None:
            continue
        if down.shape != layer.down.shape or up.shape != layer.up.shape:
            problems.append(f"layer {path}: {_difference(layer, down, up)}")
    return problems


def _difference(layer: LoRALayer, down: Tensor, up: Tensor) -> str:
    """What differs, in words: "file has rank 8 (down 8x320), the model expects ...\""""
    file_rank = down.shape[0] if down.ndim else 0
    has = f"file has rank {file_rank} (down {size_text(down)}, up {size_text(up)})"
    expects = []
    if file_rank != layer.rank:
        expects.append(f"rank {layer.rank}")
    if down.shape[1:2] != layer.down.shape[1:2]:
        expects.append(f"input width {layer.down.shape[1]}")
    if up.shape[:1] != layer.up.shape[:1]:
        expects.append(f"output width {layer.up.shape[0]}")
    expects.append(f"(down {size_text(layer.down)}, up {size_text(layer.up)})")
    return f"{has}, the model expects {' '.join(expects)}"


def size_text(tensor: Tensor) -> str:
    """A shape as "8x320"; "one number" for a tensor without dimensions."""
    return "x".join(str(n) for n in tensor.shape) or "one number"
