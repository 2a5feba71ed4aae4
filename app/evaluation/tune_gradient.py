"""The strengths of the gate by gradient descent on the likelihood of right answers, through the gated attention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...anchor.config import VideoAnchorConfig
from ...integrations.errors import InputError
from ...integrations.transformers.attention import GATE_ARGUMENT, LayerGate
from ...integrations.transformers.enable import enable
from ...integrations.transformers.visual_tokens import find_multimodal_model
from .. import pipeline
from ..batch.results import ResultsLog
from ..batch.stopping import StopRule, failure_of
from ..batch.worker import reason_of
from ..budget import check_fits
from ..score_cache import ScoreCache
from ..video.reader import VideoClip
from .questions import Question
from .tune import Point

Loss = Callable[[Tensor, int], Tensor]
"""(alpha_k, alpha_v) (2,) float32, and the number of a question -> differentiable scalar."""


def learn(
    loss: Loss,
    order: Sequence[int],
    log: ResultsLog,
    key: str,
    *,
    start: Point = (1.0, 1.0),
    n_steps: int = 30,
    batch: int = 4,
    rate: float = 0.1,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Point, list[dict[str, Any]]]:
    """Adam on (log alpha_k, log alpha_v), so that both stay above 0.

    Args:
        loss: of one question; an exception of it leaves the question out of its step.
        order: numbers of the questions, taken `batch` at a time, around and around.
        log: steps that were made; each is written as it ends, and a rerun goes on after the last.
        key: tells steps of different runs apart.
        start: first strengths, above 0.
        n_steps, batch, rate: steps, questions a step, Adam's learning rate.
        progress: called with ("steps", done, n_steps).

    Returns:
        the strengths to three digits, and of each step its number, mean loss, alpha_k and alpha_v before it.

    Raises:
        InputError: a setting is out of its range, no question of a step has a loss, or the loss is not finite.
        StoppedError: further questions would fail as well, see `batch.stopping.StopRule`.
    """
    for name, value in (("--steps", n_steps), ("--batch", batch), ("--rate", rate), ("--start", min(start))):
        if not value > 0:
            raise InputError(f"{name}: expected values above 0, got {value}")
    log_alpha = torch.tensor(start, dtype=torch.float32).log().requires_grad_()
    optimizer = torch.optim.Adam([log_alpha], lr=rate)
    steps: list[dict[str, Any]] = []
    rule = StopRule(len(order))
    for step in range(n_steps):
        record = log.records.get(f"{key}-{step}")
        if record is None:
            alphas = log_alpha.detach().exp().tolist()
            numbers = [order[(step * batch + n) % len(order)] for n in range(min(batch, len(order)))]
            mean = _descend(loss, numbers, log_alpha, optimizer, rule)
            record = {
                "key": f"{key}-{step}",
                "step": step,
                "loss": mean,
                "alpha_k": alphas[0],
                "alpha_v": alphas[1],
                "log_alpha": log_alpha.tolist(),
                "adam": {name: value.tolist() for name, value in optimizer.state[log_alpha].items()},
            }
            log.append(record)
        else:
            with torch.no_grad():
                log_alpha.copy_(torch.tensor(record["log_alpha"]))
            optimizer.state[log_alpha] = {name: torch.tensor(value) for name, value in record["adam"].items()}
        steps.append({name: record[name] for name in ("step", "loss", "alpha_k", "alpha_v")})
        if progress is not None:
            progress("steps", step + 1, n_steps)
    alpha_k, alpha_v = (float(f"{value:.3g}") for value in log_alpha.detach().exp().tolist())
    return (alpha_k, alpha_v), steps


def _descend(
    loss: Loss, numbers: Sequence[int], log_alpha: Tensor, optimizer: torch.optim.Optimizer, rule: StopRule
) -> float:
    """One step; returns the mean loss before it."""
    optimizer.zero_grad()
    losses: list[float] = []
    failure = ""
    for number in numbers:
        try:
            value = loss(log_alpha.exp(), number)
            value.backward()
        except Exception as error:
            failure = reason_of(error)
            rule.failed(failure_of(error), failure, f"question {number}")
            continue
        rule.answered()
        losses.append(float(value.detach()))
    if not losses:
        raise InputError(f"no question of a step has a loss: {failure}")
    assert log_alpha.grad is not None  # a loss was propagated
    log_alpha.grad /= len(losses)
    mean = sum(losses) / len(losses)
    if not torch.isfinite(log_alpha.grad).all() or mean != mean:
        raise InputError(
            f"the loss is not finite (mean {mean}, gradient {log_alpha.grad.tolist()}): try --dtype float32"
        )
    optimizer.step()
    return mean


def answer_loss(
    model: PreTrainedModel,
    processor: Any,
    clip: VideoClip,
    question: Question,
    config: VideoAnchorConfig,
    alphas: Tensor,
    scores: ScoreCache | None = None,
) -> Tensor:
    """-log p(right answer | video, question) with the gate of `alphas`, differentiable by them. Call it and `backward`
    within `recomputed_layers`.

    Args:
        model, processor: of `pipeline.load`.
        clip, question: what is asked; the answer is the letter, the number or the text.
        config: of the scores; its own alphas are not used.
        alphas: (2,) float32, alpha_k and alpha_v.
        scores: where scores are kept; None computes them anew.

    Returns:
        scalar float32: summed over the answer's tokens.

    Raises:
        InputError: see `pipeline.prepare` and `budget.check_fits`.
    """
    inputs, grid = pipeline.prepare(model, processor, clip, question.prompt())
    text = f"{question.answer:.15g}" if isinstance(question.answer, float) else question.answer
    answer = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    check_fits(model, inputs["input_ids"].shape[1], answer.shape[1], clip, grid, config)
    with _differentiable_gate(model, config, alphas, scores):
        output = model(**_continued(inputs, answer), use_cache=False, logits_to_keep=answer.shape[1] + 1)
    logits = output.logits[0, -answer.shape[1] - 1 : -1].float()
    return nn.functional.cross_entropy(logits, answer[0].to(logits.device), reduction="sum")


def _continued(inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """The inputs of a prompt, with the tokens of an answer after it; what else has an entry a token gets 1 in masks and
    0 in types."""
    shape = inputs["input_ids"].shape
    continued = dict(inputs, input_ids=torch.cat([inputs["input_ids"], answer], 1))
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, Tensor) and value.shape == shape:
            fill = torch.full_like(answer, "mask" in name, dtype=value.dtype)
            continued[name] = torch.cat([value, fill], 1)
    return continued


@contextmanager
def _differentiable_gate(
    model: PreTrainedModel, config: VideoAnchorConfig, alphas: Tensor, cache: ScoreCache | None
) -> Iterator[None]:
    """`enable`, with factors 1 + alpha * score of a tensor alpha."""

    def differentiable(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        gate: LayerGate = kwargs[GATE_ARGUMENT]
        if gate.gamma_k is None:
            return args, kwargs
        scores = gate.gamma_k - 1  # with alpha_k = 1
        alpha_k, alpha_v = alphas.to(scores.device)
        gate = LayerGate(1 + alpha_k * scores, 1 + alpha_v * scores, n_positions=gate.n_positions)
        return args, {**kwargs, GATE_ARGUMENT: gate}

    with enable(model, replace(config, alpha_k=1.0, alpha_v=1.0)) as handle:
        if cache is not None:
            handle.anchor_scores = cache.anchor_scores
        text: nn.Module = find_multimodal_model(model).language_model  # pyright: ignore[reportAssignmentType]
        hook = text.register_forward_pre_hook(differentiable, with_kwargs=True)  # after that of `enable`
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def recomputed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within the block no weight asks for a gradient, and a backward pass computes each layer again, so that memory
    holds the activations of one at a time. (transformers does that in training mode only: the layers are in it, what is
    in the layers stays in eval mode.)"""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _named(model, "enable")({"use_reentrant": False})
    for layer in layers:
        layer.training = True
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for layer in layers:
            layer.training = False
        _named(model, "disable")()


def _named(model: PreTrainedModel, what: str) -> Callable[..., None]:
    """transformers renames gradient to activation checkpointing."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")
