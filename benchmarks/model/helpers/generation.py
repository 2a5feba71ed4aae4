"""The drop-in in gpu_check.py: tiny random models generate the tokens that the CPU finds with the same weights.

Greedy tokens are the same for every kind of cache, so that each is compared with the CPU's plain run; beams with beams.
A static cache is compiled as transformers does by default: on CUDA by inductor with CUDA graphs. Seconds are the
reason's; they hold compilation. Nothing here is a time of attention.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from triton import knobs

import videoanchor_triton as va
from benchmarks.helpers import measure
from benchmarks.helpers.channel import alive
from benchmarks.helpers.measure import Task, judged
from benchmarks.helpers.record import OK, SKIPPED, Row
from benchmarks.scores.helpers import token_sets
from videoanchor_triton.kernels.tolerance import allowed_error, error

MODELS = ("qwen2_5_vl", "qwen3_vl", "internvl")
PROMPT = [[50, 60, "V", 70, 5]]
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 7},
    "assisted": {},
    "beams": {"num_beams": 3},
}
TWO_CARDS = "two cards"
NEW_TOKENS = 8
COMPILE_SECONDS = 300.0
TOLERANCE = 1e-4  # of the solver


def model_tasks(device: torch.device) -> Iterator[Task]:
    """A row for each model and way of generating, and the scores of the card beside the CPU's."""
    for name in MODELS[:1] if measure.small else MODELS:
        for mode in (*MODES, TWO_CARDS):
            row = Row("model", name, mode)
            yield Task(row, f"model, {mode}", _or_skipped(_generation(name, mode, device)))
    yield Task(Row("model", "scores", "ssc"), "model, scores", scores_check(device))


def _or_skipped(run: Callable[[Row], Row]) -> Callable[[Row], Row]:
    def checked(row: Row) -> Row:
        if importlib.util.find_spec("transformers") is None:
            return replace(row, status=SKIPPED, reason="transformers is not installed")
        if row.contender == TWO_CARDS:
            if torch.cuda.device_count() < 2:
                return replace(row, status=SKIPPED, reason="needs two GPUs")
            if importlib.util.find_spec("accelerate") is None:
                return replace(row, status=SKIPPED, reason="accelerate is not installed")
        return run(row)

    return checked


def _generation(name: str, mode: str, device: torch.device) -> Callable[[Row], Row]:
    def run(row: Row) -> Row:
        beams = mode == "beams"
        expected, gap = on_cpu(name, beams)
        # the convolution of a vision tower would round to TF32 on a card, the CPU's does not
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            alive(f"{name}, {mode}", COMPILE_SECONDS)
            start = time.perf_counter()
            found = generated(name, mode, device)
            seconds = time.perf_counter() - start
        different = int((found != expected).sum()) if found.shape == expected.shape else expected.numel()
        row = judged(row, float(different), 0.0)
        said = f"{seconds:.1f} s" if row.status == OK else f"{different} of {expected.numel()} tokens differ"
        return replace(row, reason=f"{said}; nearest two logits of the CPU {gap:.2g} apart")

    return run


def generated(name: str, mode: str, device: torch.device) -> torch.Tensor:
    """The new tokens of a mode, on the CPU."""
    tiny = _tiny()
    model, options = _build(name), dict(MODES.get(mode, {}))
    model = _over_two_cards(model) if mode == TWO_CARDS else model.to(device)
    if mode == "static" and knobs.runtime.interpret:  # inductor compiles for a GPU
        options |= {"compile_config": _eager_compilation()} if name == MODELS[0] else {"disable_compile": True}
    if mode == "assisted":
        options["assistant_model"] = _build(name).to(device)
    batch = {key: x.to(model.device) for key, x in tiny.inputs(name, PROMPT).items()}
    return _tokens(model, batch, **options).sequences[:, batch["input_ids"].shape[1] :].cpu()


@cache
def on_cpu(name: str, beams: bool) -> tuple[torch.Tensor, float]:
    """The tokens that the CPU finds, and the least distance of its two largest logits (of the first beam)."""
    batch = _tiny().inputs(name, PROMPT)
    found = _tokens(_build(name), batch, **(MODES["beams"] if beams else {}), output_logits=True)
    top = torch.stack(found.logits)[:, 0].topk(2).values
    return found.sequences[:, batch["input_ids"].shape[1] :], float((top[:, 0] - top[:, 1]).min())


def _tokens(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    from dense_eager import ALPHA_K, ALPHA_V, pseudo_scores

    config = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores)
    with va.enable(model, config):
        return model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=_tiny().SUPPRESSED,
            return_dict_in_generate=True, **options,
        )  # fmt: skip


def _tiny() -> Any:
    import tiny_models  # of tests/, with the transformers that is installed

    return tiny_models


def _build(name: str) -> Any:
    model = _tiny().build(name)
    model.set_attn_implementation("sdpa")
    return model


def _eager_compilation() -> Any:
    from transformers import CompileConfig

    found = CompileConfig(backend="eager", mode=None)  # pyright: ignore[reportArgumentType]
    found._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _over_two_cards(model: Any) -> Any:
    from accelerate import dispatch_model, infer_auto_device_map

    half = sum(x.nbytes for x in model.parameters()) // 2
    whole = model._no_split_modules
    parts = infer_auto_device_map(model, max_memory={0: half, 1: 2**30}, no_split_module_classes=[*whole])
    if len({*parts.values()}) < 2:
        raise RuntimeError(f"the model was not split: {parts}")
    return dispatch_model(model, parts)


def scores_check(device: torch.device) -> Callable[[Row], Row]:
    """Scores on the card and on the CPU, beside those in fp64. The solver may stop an iteration apart: allowed is also
    what a tenth of its tolerance moves."""

    def scored(x: torch.Tensor, tol: float) -> torch.Tensor:
        config = va.VideoAnchorConfig(alpha_k=0, alpha_v=0, n_clusters=3, tol=tol)
        return va.anchor_scores(x, config).scores.double().cpu()

    def run(row: Row) -> Row:
        tokens = torch.from_numpy(token_sets.random_subspaces(3, 4, 32, 40, noise=0.05).X)
        exact, exacter = (scored(tokens.double(), tol) for tol in (TOLERANCE, TOLERANCE / 10))
        eager = error(scored(tokens.float(), TOLERANCE), exact)
        allowed = allowed_error(exact, eager, torch.float32, inside=error(exacter, exact))
        return judged(row, error(scored(tokens.float().to(device), TOLERANCE), exact), allowed)

    return run
