"""What a run works with: model, optimizer and data on this worker's device.

Takes a config, prepared data and a place among the workers; gives them ready to train, the same on
every worker. It does not know steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import jobs.models
from cluster.storage import MANIFEST, find_input, verify_directory
from jobs.config import TrainConfig
from jobs.data.prepare import TOKENIZER_FOLDER
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.data.tokens import TokenSplit, open_split
from jobs.plugins import load_plugin
from jobs.training.optim import build_optimizer
from jobs.training.precision import Computed, resolve
from jobs.training.world import World, device_of


@dataclass
class Setup:
    """Everything a step needs, the same on every worker but for the world's rank."""

    config: TrainConfig
    world: World
    device: torch.device
    precision: Computed
    model: nn.Module
    parallel: nn.Module
    optimizer: AdamW
    train: TokenSplit
    validation: TokenSplit

    def tensors(self) -> dict[str, Tensor]:
        """Return everything a checkpoint holds, by name; writing into it changes the run."""
        named = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                named[f"optimizer.{name}.{key}"] = tensor
        return named


def set_up(config: TrainConfig, data_dir: Path, world: World) -> Setup:
    """Build or load the model, and open the data.

    Raises what loading raises: ModelFormatError, IntegrityError, TokenizerError, DataError.
    """
    device = device_of(config.scaling.gpus_per_worker)
    tokenizer = load_tokenizer(data_dir / TOKENIZER_FOLDER)
    model = _make_model(config, tokenizer.bos_token_id, tokenizer.eos_token_id)
    check_fits(tokenizer, model.config.vocab_size)
    model.to(device).train()
    if config.compile:
        for block in model.model.layers:
            block.compile()
    parallel = model
    if world.size > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Setup(
        config=config,
        world=world,
        device=device,
        precision=resolve(config.precision, device, world),
        model=model,
        parallel=parallel,
        optimizer=build_optimizer(model, config.optimizer),
        train=open_split(data_dir, "train"),
        validation=open_split(data_dir, "validation"),
    )


def _make_model(config: TrainConfig, begin_id: int | None, end_id: int | None) -> Any:
    family = load_plugin(jobs.models, config.model.family, what="model family")
    if config.model.init_from is not None:
        directory = find_input(config.model.init_from)
        if (directory / MANIFEST).exists():
            verify_directory(directory)
        return family.load(directory, torch.float32)
    decoder = config.model.decoder
    marks = {
        "bos_token_id": begin_id if decoder.bos_token_id is None else decoder.bos_token_id,
        "eos_token_id": end_id if decoder.eos_token_id is None else decoder.eos_token_id,
    }
    return family.build(decoder.replace(**marks), config.seed)
