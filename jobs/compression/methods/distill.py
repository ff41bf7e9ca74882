"""Logit distillation: teach a pruned model to predict what the dense one predicts.

Takes a decoder that earlier steps made smaller or sparser, the dense one and text; gives the
decoder with weights trained on the dense one's next-token distributions (forward Kullback-Leibler
divergence), and zeros of pruned layers still zero. Steps that quantize come after it.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Muralidharan et al.,
"Compact Language Models via Pruning and Knowledge Distillation" (Minitron), 2024, section 3: of
the losses there, that on logits alone is the best where few blocks were left out.

B sequences, T tokens of one, N tokens of several, C hidden width, V vocabulary
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cluster.config import StrictModel
from cluster.errors import RecipeError
from cluster.storage import MIB
from jobs.compression.layers import weight_of
from jobs.compression.methods._protocol import Repair, RepairProgress
from jobs.compression.text import TextNeed
from jobs.config import OptimizerConfig, Precision, ScheduleConfig
from jobs.kernels.formats import Layout
from jobs.training.optim import build_optimizer, learning_rate, set_learning_rate
from jobs.training.precision import Computed, forward_context, resolve
from jobs.training.world import World

_TOKENS_AT_ONCE = 4096
_LOGITS_BYTES = 64 * MIB  # of one model's float32 logits at a time; about five such exist


class Options(StrictModel):
    """How much text it sees, and how weights move."""

    num_tokens: int = Field(
        ge=1, description="Tokens of text, rounded down to whole steps; each is seen once."
    )
    batch_size: int = Field(16, ge=1, description="Sequences of a step.")
    seq_len: int = Field(256, ge=2, description="Tokens of a sequence.")
    lr: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of steps that rise to it.")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="How it falls then.")
    final_lr_ratio: float = Field(0.05, ge=0, le=1, description="Last learning rate over the peak.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay on matrices.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm.")
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by it.")
    alpha: float = Field(
        0.0, ge=0, le=1, description="Share of the text's own cross entropy in the loss."
    )
    seed: int = Field(0, description="Seed of which sequences, in which order.")
    precision: Precision = Field(
        "auto", description="fp32, or bf16 autocast; auto: bf16 where the device is faster in it."
    )

    @model_validator(mode="after")
    def _check_one_step(self) -> Self:
        if self.num_steps < 1:
            raise ValueError(
                f"num_tokens={self.num_tokens} is less than one step of batch_size x seq_len = "
                f"{self.batch_size} x {self.seq_len} = {self.batch_size * self.seq_len}"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_tokens // (self.batch_size * self.seq_len)


def layout(options: Options) -> Layout | None:
    """Return None: a later step quantizes."""
    return None


def text_need(options: Options) -> TextNeed:
    """Return the sequences of all steps."""
    return TextNeed(options.num_steps * options.batch_size, options.seq_len)


def repair(
    task: Repair,
    options: Options,
    progress: RepairProgress,
    *,
    logits_bytes: int = _LOGITS_BYTES,
) -> None:
    """Train the student in place, on the device that it lies on.

    Logits exist for so many tokens at a time that one model's take at most `logits_bytes`. Raises
    RecipeError if the loss is no longer a number.
    """
    device = task.student.model.embed_tokens.weight.device
    precision = resolve(options.precision, device, World())
    training = _Training(task, options, precision, logits_bytes)
    for step in range(options.num_steps):
        progress(step + 1, options.num_steps, training.step(step))
    training.optimizer.zero_grad(set_to_none=True)


class _Training:
    """A student on its way."""

    def __init__(
        self, task: Repair, options: Options, precision: Computed, logits_bytes: int
    ) -> None:
        self._task, self._options, self._precision = task, options, precision
        self._num_at_once = max(1, logits_bytes // (4 * task.student.config.vocab_size))
        self._zeros = [
            (weight, weight.detach() == 0)
            for weight in (weight_of(task.student, layer) for layer in sorted(task.pruned))
        ]
        self._schedule = ScheduleConfig(
            kind=options.schedule,
            warmup_steps=int(options.warmup_ratio * options.num_steps),
            final_lr_ratio=options.final_lr_ratio,
        )
        # Its moments start at zero, so a weight whose gradient is always zero does not move.
        self.optimizer = build_optimizer(
            task.student, OptimizerConfig(lr=options.lr, weight_decay=options.weight_decay)
        )

    def step(self, step: int) -> float:
        """Take one optimizer step; return the loss before it."""
        options, student = self._options, self._task.student
        rate = learning_rate(step, options.num_steps, options.lr, self._schedule)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        rows_BT = self._task.text.batch(options.seed, step, options.batch_size, options.seq_len)
        loss = 0.0
        for part_BT in rows_BT.split(max(1, _TOKENS_AT_ONCE // options.seq_len)):
            loss += self._add_gradients(part_BT, options.batch_size * options.seq_len)
        for weight, is_zero in self._zeros:
            assert weight.grad is not None, "every linear weight takes part"
            weight.grad.masked_fill_(is_zero, 0.0)
        limit = math.inf if options.grad_clip is None else options.grad_clip
        norm = nn.utils.clip_grad_norm_(student.parameters(), limit).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RecipeError(
                f"in training step {step + 1} of {options.num_steps} the loss is {loss} and the "
                f"gradient norm {norm}, with lr={options.lr:g}. Lower `lr`, or raise "
                "`warmup_ratio`."
            )
        self.optimizer.step()
        return loss

    def _add_gradients(self, rows_BT: Tensor, num_tokens: int) -> float:
        """Add the gradients of some of a step's tokens; return their share of its mean loss."""
        student, teacher = self._task.student, self._task.teacher
        device = student.model.embed_tokens.weight.device
        rows_BT = rows_BT.to(device)
        tokens_BT, targets_N = rows_BT[:, :-1], rows_BT[:, 1:].flatten()
        with forward_context(self._precision, device):
            with torch.no_grad():
                wanted_NC = teacher.hidden(tokens_BT).flatten(0, 1)
            hidden_NC = student.hidden(tokens_BT).flatten(0, 1)
        # The graph is cut before the head, so that logits exist for a few tokens at a time.
        leaf_NC = hidden_NC.detach().requires_grad_()
        total = torch.zeros((), device=device)
        for start in range(0, len(targets_N), self._num_at_once):
            part = slice(start, start + self._num_at_once)
            with forward_context(self._precision, device):
                with torch.no_grad():
                    teacher_NV = teacher.head(wanted_NC[part])
                student_NV = student.head(leaf_NC[part])
            loss = _loss(student_NV, teacher_NV, targets_N[part], self._options) / num_tokens
            loss.backward()
            total += loss.detach()
        hidden_NC.backward(leaf_NC.grad)
        return total.item()


def _loss(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, options: Options) -> Tensor:
    """Return the loss summed over tokens.

    The divergence is multiplied by the temperature squared, as its gradients shrink by that (Hinton
    et al., section 2).
    """
    temperature = options.temperature
    divergence = functional.kl_div(
        functional.log_softmax(student_NV / temperature, dim=-1),
        functional.log_softmax(teacher_NV / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    loss = divergence * temperature**2
    if options.alpha == 0:
        return loss
    own = functional.cross_entropy(student_NV, targets_N, reduction="sum")
    return (1 - options.alpha) * loss + options.alpha * own
