"""The seam to who computes layers: what is handed over, and that others give the same."""

import copy
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from cluster.errors import PlacementError, RecipeError
from jobs.compression.inputs import LayerInputs
from jobs.compression.layer_work import LayerTask, change_layer
from jobs.compression.methods._protocol import LayerResult
from jobs.compression.recipe import Compressed, apply_recipe
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.layer_workers import require_room
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2
)
TEXT = CalibrationText.of(torch.randint(61, (16, 32), generator=torch.Generator().manual_seed(4)))
W4 = {"scheme": "w4a16", "group_size": 32}


class Elsewhere:
    """Computes the last task first, from copies, and remembers what it was handed."""

    def __init__(self) -> None:
        self.batches: list[Sequence[LayerTask]] = []
        self.inputs: list[Mapping[str, LayerInputs]] = []

    def run(
        self, tasks: Sequence[LayerTask], inputs: Mapping[str, LayerInputs]
    ) -> Iterator[LayerResult]:
        self.batches.append(tasks)
        self.inputs.append(dict(inputs))
        found = []
        for task in reversed(copy.deepcopy(tasks)):
            reads = None if task.reads is None else copy.deepcopy(inputs[task.reads])
            found.append(change_layer(task, reads))
        return reversed(found)


def step(method: str, *targets: str, **options: object) -> Step:
    return Step(method=method, targets=targets or ("*",), options=options)


def apply(steps: tuple[Step, ...], workers: Elsewhere | None = None) -> Compressed[Decoder]:
    return apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps), TEXT, workers=workers)


@pytest.mark.parametrize(
    "steps",
    [
        (step("sparsegpt", sparsity=0.5), step("gptq", **W4)),
        (step("wanda", sparsity=0.3), step("awq"), step("gptq", **W4)),
        (step("magnitude", sparsity=0.3), step("rtn", "*mlp*", **W4)),
        (step("gptq", **W4), step("rtn", "*o_proj", "lm_head", scheme="w8a8")),
    ],
)
def test_layers_when_computed_elsewhere_in_another_order_are_the_same(
    steps: tuple[Step, ...],
) -> None:
    here, there = apply(steps), apply(steps, Elsewhere())
    expected = here.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in there.model.state_dict().items())
    assert here.quantized.keys() == there.quantized.keys()
    for layer, weight in here.quantized.items():
        assert torch.equal(weight.values_OI, there.quantized[layer].values_OI)
        assert torch.equal(weight.scale_OG, there.quantized[layer].scale_OG)


def test_layers_of_a_block_are_handed_over_at_once_with_all_their_steps() -> None:
    workers = Elsewhere()
    apply((step("sparsegpt", sparsity=0.5), step("gptq", "*mlp*", **W4)), workers)
    sizes = [len(tasks) for tasks in workers.batches]
    assert sizes == [7, 7, 0]
    chains = {
        task.layer.rpartition(".")[2]: [each.method for each in task.steps]
        for task in workers.batches[0]
    }
    assert chains["q_proj"] == ["sparsegpt"]
    assert chains["down_proj"] == ["sparsegpt", "gptq"]
    reads = {task.layer.rpartition(".")[2]: task.reads for task in workers.batches[1]}
    assert reads["q_proj"] == reads["v_proj"] == "model.layers.1.self_attn.q_proj"
    assert len(workers.inputs[1]) == 4


def test_layers_when_scaling_comes_between_are_handed_over_before_and_after_it() -> None:
    workers = Elsewhere()
    apply((step("wanda", sparsity=0.3), step("awq", "*mlp*"), step("gptq", **W4)), workers)
    methods = [{each.method for task in tasks for each in task.steps} for tasks in workers.batches]
    assert methods == [{"wanda"}, {"gptq"}, {"wanda"}, {"gptq"}, set(), set()]


def test_layer_when_a_step_fails_elsewhere_names_step_and_layer() -> None:
    words = r"step 1 \(gptq\), `model\.layers\.0\..*Hessian is singular"
    with pytest.raises(RecipeError, match=words):
        apply((step("gptq", **W4, damping=1e-30),), Elsewhere())


def test_workers_when_no_node_has_the_threads_of_one_say_what_to_set() -> None:
    require_room(2, 8, [2.0, 8.0])
    words = r"`workers` = 2 computes on 8 threads.*largest node offers 4 CPUs. Set OMP_NUM_THREADS"
    for nodes in ([2.0, 4.0], [4.0]):
        with pytest.raises(PlacementError, match=words):
            require_room(2, 8, nodes)
