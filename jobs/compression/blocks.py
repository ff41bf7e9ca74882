"""Steps that change one layer after another: on their way through a model, block by block.

Takes resolved actions and a model; changes its weights, and keeps the integers of what was
quantized and which layers were pruned. It does not know which steps a recipe has beside these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from cluster.errors import RecipeError
from jobs.compression.calibration import CalibrationPass
from jobs.compression.inputs import LayerInputs
from jobs.compression.layers import weight_of
from jobs.compression.methods._protocol import (
    CalibratedMethod,
    LayerResult,
    Quantizable,
    ScalingMethod,
    WeightMethod,
)
from jobs.compression.shared_inputs import (
    HEAD,
    SharedInput,
    divide_input,
    feasible_scale,
    group_of,
    shared_inputs,
)
from jobs.compression.steps import Action
from jobs.kernels.formats import QuantizedWeight
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder


def go_through(
    actions: Sequence[Action],
    work: "BlockWork",
    text_NT: Tensor | None,
    progress: Callable[[int, int], None],
) -> None:
    """Apply all actions to one block of a decoder after another, then to the head.

    Text goes through as far as it is needed; `progress` hears of blocks done, of how many.
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
    assert text_NT is not None, "refused before"
    with CalibrationPass(model, text_NT) as text:
        for number, part in enumerate(parts):
            work.run(actions, part, text)
            if number < last_seeing:
                text.advance()
            progress(number + 1, len(parts))


@dataclass
class BlockWork:
    """A model under way: the integers of its layers so far, and those that were pruned.

    Pruned layers are kept as modules: their names change where blocks are left out.
    """

    model: Decoder | Encoder
    final: dict[str, Action]
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    pruned: set[nn.Module] = field(default_factory=set)

    def pruned_names(self) -> frozenset[str]:
        """Return the names that the pruned layers have now."""
        return frozenset(n for n, module in self.model.named_modules() if module in self.pruned)

    def run(
        self, actions: Sequence[Action], part: Sequence[str], text: CalibrationPass | None
    ) -> None:
        """Apply all actions to some layers, in order, with what the text feeds them now."""
        here = [(action, [layer for layer in action.layers if layer in part]) for action in actions]
        seeing = [layer for action, layers in here if action.needs_text for layer in layers]
        groups = {layer: group_of(layer) for layer in seeing}
        firsts = {layer: group.layers[0] if group else layer for layer, group in groups.items()}
        inputs: dict[str, LayerInputs] = {}
        if firsts:
            assert text is not None, "refused before"
            inputs = text.observe(list(dict.fromkeys(firsts.values())))
        for action, layers in here:
            if isinstance(action.method, ScalingMethod):
                for group in dict.fromkeys(groups[layer] for layer in layers):
                    assert group is not None, "checked when resolved"
                    first = group.layers[0]
                    inputs[first] = self._scale(action, group, layers, inputs[first])
                continue
            for layer in layers:
                self._change(action, layer, inputs.get(firsts.get(layer, layer)))

    def _scale(
        self, action: Action, group: SharedInput, layers: Sequence[str], inputs: LayerInputs
    ) -> LayerInputs:
        """Scale the input of a group; return its moments afterwards."""
        assert isinstance(action.method, ScalingMethod), action
        assert isinstance(self.model, Decoder), "refused before"
        chosen = {name: self.final[name].layout for name in group.layers if name in layers}
        rounded = [
            Quantizable(weight_of(self.model, name).detach().float(), layout)
            for name, layout in chosen.items()
            if layout is not None and layout.scheme != "bf16"
        ]
        if not rounded:
            return inputs
        feasible = partial(feasible_scale, self.model, group)
        scale_I = action.method.scale(rounded, inputs, feasible, action.options)
        divide_input(self.model, group, scale_I)
        return inputs.divided_by(scale_I)

    def _change(self, action: Action, layer: str, inputs: LayerInputs | None) -> None:
        if action.layout is not None and self.final[layer] is not action:
            return  # A later step decides.
        weight = weight_of(self.model, layer)
        result = _result(action, layer, weight.detach().float(), inputs)
        with torch.no_grad():
            weight.copy_(result.weight_OI)
        if result.quantized is not None:
            self.quantized[layer] = result.quantized
        if action.is_pruning:
            self.pruned.add(self.model.get_submodule(layer))


def _result(
    action: Action, layer: str, weight_OI: Tensor, inputs: LayerInputs | None
) -> LayerResult:
    try:
        if isinstance(action.method, CalibratedMethod):
            assert inputs is not None, f"{layer} was not observed"
            return action.method.apply_calibrated(weight_OI, inputs, action.options)
        assert isinstance(action.method, WeightMethod), f"{action.name} offers no function"
        return action.method.apply(weight_OI, action.options)
    except RecipeError as error:
        raise RecipeError(f"{action.place}, `{layer}`: {error.message}") from None
