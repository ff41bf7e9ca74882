"""Steps that change one layer after another: on their way through a model, block by block.

Takes resolved actions and a model; changes its weights, and keeps the integers of what was
quantized and which layers were pruned. It knows neither which steps a recipe has beside these, nor
who computes what becomes of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from jobs.compression.calibration import CalibrationPass, Scratch
from jobs.compression.inputs import InputSource, LayerInputs
from jobs.compression.layer_work import InProcess, LayerStep, LayerTask, LayerWorkers
from jobs.compression.layers import weight_of
from jobs.compression.methods._protocol import Quantizable, ScalingMethod
from jobs.compression.methods._rounding import RoundingOptions
from jobs.compression.shared_inputs import (
    HEAD,
    SharedInput,
    divide_input,
    feasible_scale,
    group_of,
    shared_inputs,
)
from jobs.compression.statistics import dense_statistics
from jobs.compression.steps import Action
from jobs.compression.text import CalibrationText
from jobs.kernels.formats import QuantizedWeight
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder

# An action and those of its layers that are at hand.
Work = tuple[Action, list[str]]
# What is done, how much of it, of how much.
Progress = Callable[[str, int, int], None]


def go_through(
    actions: Sequence[Action],
    work: "BlockWork",
    text: CalibrationText | None,
    progress: Progress,
    scratch: Scratch | None = None,
) -> None:
    """Apply all actions to one block of a decoder after another, then to the head.

    Text goes through as far as it is needed, its states in `scratch` if they are many; `progress`
    hears of blocks done.
    """
    model = work.model
    assert isinstance(model, Decoder), "encoders have no blocks that text goes through"
    num_blocks = len(model.model.layers)
    parts = [
        [name for g in shared_inputs(block) for name in g.layers] for block in range(num_blocks)
    ]
    parts.append([HEAD])
    seeing = {layer for action in actions if action.needs_text for layer in action.layers}
    last_seeing = max((n for n, part in enumerate(parts) if seeing.intersection(part)), default=-1)
    if last_seeing < 0:
        for part in parts:
            work.run(actions, part, None)
        return
    assert text is not None, "refused before"
    with _inputs(model, text, progress, scratch) as inputs:
        for number, part in enumerate(parts):
            work.run(actions, part, inputs)
            if number < last_seeing:
                inputs.advance()
            progress("blocks", number + 1, len(parts))


def _inputs(
    model: Decoder, text: CalibrationText, progress: Progress, scratch: Scratch | None
) -> AbstractContextManager[InputSource]:
    """Return what the text feeds layers: as the model changes, or as it is now."""
    if text.is_sequential:
        return CalibrationPass(model, text.tokens_NT, scratch)
    tell = partial(progress, "statistics of blocks")
    return dense_statistics(model, text.tokens_NT, text.cache, tell, scratch)


@dataclass
class BlockWork:
    """A model under way: the integers of its layers so far, and those that were pruned.

    Pruned layers are kept as modules: their names change where blocks are left out.
    """

    model: Decoder | Encoder
    final: dict[str, Action]
    workers: LayerWorkers = field(default_factory=InProcess)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    pruned: set[nn.Module] = field(default_factory=set)
    effects: dict[str, Tensor] = field(default_factory=dict)
    """Of the layers at hand whose inputs are scaled: see `CalibrationPass.effects`."""

    def pruned_names(self) -> frozenset[str]:
        """Return the names that the pruned layers have now."""
        return frozenset(n for n, module in self.model.named_modules() if module in self.pruned)

    def run(self, actions: Sequence[Action], part: Sequence[str], text: InputSource | None) -> None:
        """Apply all actions to some layers, in order, with what the text feeds them now."""
        here = [(action, [layer for layer in action.layers if layer in part]) for action in actions]
        seeing = [layer for action, layers in here if action.needs_text for layer in layers]
        groups = {layer: group_of(layer) for layer in seeing}
        firsts = {layer: group.layers[0] if group else layer for layer, group in groups.items()}
        inputs: dict[str, LayerInputs] = {}
        self.effects = {}
        if firsts:
            assert text is not None, "refused before"
            inputs = text.observe(list(dict.fromkeys(firsts.values())))
        for is_scaling, some in groupby(here, lambda pair: pair[0].is_scaling):
            if not is_scaling:
                self._change(list(some), part, firsts, inputs)
                continue
            for action, layers in some:
                # Anew for each: where text is sequential, what was scaled or pruned changed them.
                if _asks(action) and layers:
                    assert text is not None, "refused before"
                    self.effects = text.effects(layers)
                for group in dict.fromkeys(groups[layer] for layer in layers):
                    assert group is not None, "checked when resolved"
                    first = group.layers[0]
                    inputs[first] = self._scale(action, group, layers, inputs[first])

    def _scale(
        self, action: Action, group: SharedInput, layers: Sequence[str], inputs: LayerInputs
    ) -> LayerInputs:
        """Scale the input of a group; return its moments afterwards."""
        assert isinstance(action.method, ScalingMethod), action
        assert isinstance(self.model, Decoder), "refused before"
        rounded = [self._rounded(name, self.final[name]) for name in group.layers if name in layers]
        rounded = [layer for layer in rounded if layer.layout.scheme != "bf16"]
        if not rounded:
            return inputs
        feasible = partial(feasible_scale, self.model, group)
        scale_I = action.method.scale(rounded, inputs, feasible, action.options)
        divide_input(self.model, group, scale_I)
        return inputs.divided_by(scale_I)

    def _rounded(self, layer: str, action: Action) -> Quantizable:
        """Return a layer as the action that decides its format will round it."""
        assert action.layout is not None, "checked when resolved"
        assert isinstance(action.options, RoundingOptions), f"{action.name} does not round"
        weight_OI = weight_of(self.model, layer).detach().float()
        return Quantizable(
            weight_OI, action.layout, action.options.observer, self.effects.get(layer)
        )

    def _change(
        self,
        actions: Sequence[Work],
        part: Sequence[str],
        firsts: Mapping[str, str],
        inputs: Mapping[str, LayerInputs],
    ) -> None:
        """Apply actions none of which scales to layers, each by itself."""
        tasks = []
        for layer in part:
            own = [action for action, layers in actions if layer in layers]
            # Of several that choose a format, the last decides.
            steps = [a for a in own if a.layout is None or self.final[layer] is a]
            if steps:
                weight_OI = weight_of(self.model, layer).detach()
                chain = tuple(LayerStep(a.place, a.name, a.options) for a in steps)
                tasks.append(LayerTask(layer, weight_OI, chain, firsts.get(layer)))
            if any(action.is_pruning for action in steps):
                self.pruned.add(self.model.get_submodule(layer))
        for task, result in zip(tasks, self.workers.run(tasks, inputs), strict=True):
            with torch.no_grad():
                weight_of(self.model, task.layer).copy_(result.weight_OI)
            if result.quantized is not None:
                self.quantized[task.layer] = result.quantized


def _asks(action: Action) -> bool:
    return isinstance(action.method, ScalingMethod) and action.method.needs_effects
