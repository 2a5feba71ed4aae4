"""Generation with merged visual tokens, written from the definition: row by row, without cache or padding, a dense
softmax(scale * Q K^T + log gamma_K) (gamma_V * V) in which gamma_K of a group is the sum of its members' factors. It
shares nothing with the package but the groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dense_eager import ALPHA_K, ALPHA_V, plain_attention, pseudo_scores
from tiny_models import IMAGE, SUPPRESSED, VIDEO
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from videoanchor_triton.anchor.grouping import Groups

state: dict[str, Tensor | None] = {"gamma_k": None, "gamma_v": None}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    causal = is_causal if is_causal is not None else module.is_causal
    if causal and state["gamma_k"] is not None and state["gamma_v"] is not None:
        later = (0, key.shape[2] - len(state["gamma_k"]))
        logits = logits + F.pad(state["gamma_k"].log(), later)
        value = value * F.pad(state["gamma_v"], later, value=1.0)[:, None]
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_groups", _attention)
AttentionMaskInterface.register("dense_groups", eager_mask)


@dataclass
class Row:
    """The decoder's input of one row: embeddings (n, D), positions (..., n), and what else it takes by position."""

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    deepstack: list[Tensor] | None
    types: dict[str, Tensor]
    images: Tensor  # (n,) a number for the image that a token sees in both directions, -1 for none
    counts: Tensor = field(default_factory=lambda: torch.ones(0))
    gamma_k: Tensor = field(default_factory=lambda: torch.ones(0))
    gamma_v: Tensor = field(default_factory=lambda: torch.ones(0))

    def add_text(self, model: Any, ids: Tensor) -> None:
        """Text behind it, at the positions that follow."""
        n = len(ids)
        self.embeds = torch.cat([self.embeds, model.get_input_embeddings()(ids)])
        later = self.positions[..., -1:] + torch.arange(1, n + 1)
        self.positions = torch.cat([self.positions, later], -1)
        self.visual, self.images = F.pad(self.visual, (0, n)), F.pad(self.images, (0, n), value=-1)
        self.types = {name: F.pad(types, (0, n)) for name, types in self.types.items()}


def language_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What generate() gives the language model for a prompt."""
    seen: list[dict[str, Any]] = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    hook.remove()
    return seen[0]


def unmerged_rows(model: Any, batch: dict[str, Tensor]) -> list[Row]:
    given = language_inputs(model, batch)
    deepstack, positions = given.get("deepstack_visual_embeds"), given["position_ids"]
    rows, first = [], 0
    for row, ids in enumerate(batch["input_ids"]):
        real = batch["attention_mask"][row].bool()
        visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
        n = int(visual.sum())
        place = positions[row % len(positions)] if positions.ndim == 2 else positions[:, row]
        types = {
            name: value[row, real]
            for name, value in given.items()
            if name.endswith("token_type_ids") and value is not None and value.shape == batch["input_ids"].shape
        }
        features = None if deepstack is None else [layer[first : first + n] for layer in deepstack]
        images = (visual & ~visual.roll(1)).cumsum(0).where(visual, -1)[real]
        rows.append(Row(given["inputs_embeds"][row, real], place[..., real], visual[real], features, types, images))
        first += n
    return rows


def merge(
    row: Row, group: Callable[[Tensor], Groups], scorer: Callable[[Tensor], Tensor] = pseudo_scores, how: str = "counts"
) -> Row:
    """The row with one token for each group of its visual tokens: `how` is `VideoAnchorConfig.merge`."""
    n = len(row.embeds)
    members = [torch.tensor([i]) for i in range(n)]
    gamma_k, gamma_v = torch.ones(n), torch.ones(n)
    at = row.visual.nonzero()[:, 0]
    drop = torch.zeros(n, dtype=torch.bool)
    if len(at):
        scores = scorer(row.embeds[at])
        gamma_k[at], gamma_v[at] = 1 + ALPHA_K * scores, 1 + ALPHA_V * scores
        groups = group(row.embeds[at])
        drop[at] = True
        for number, kept in enumerate(groups.kept.tolist()):
            members[int(at[kept])] = at[kept, None] if how == "drop" else at[groups.member == number]
            drop[at[kept]] = False
    left = (~drop).nonzero()[:, 0].tolist()
    mass = torch.stack([gamma_k[members[i]].sum() for i in left])
    gain = torch.stack([(gamma_k[members[i]] * gamma_v[members[i]]).sum() for i in left]) / mass
    if how == "mean":  # as one token of the mean score
        mass, gain = (torch.stack([gamma[members[i]].mean() for i in left]) for gamma in (gamma_k, gamma_v))
    order = row.visual.cumsum(0) - 1  # of a visual token among the features
    deepstack = row.deepstack and [
        torch.stack([layer[order[members[i]]].mean(0) for i in left if row.visual[i]] or [layer[:0].sum(0)])
        for layer in row.deepstack
    ]
    return Row(
        torch.stack([row.embeds[members[i]].mean(0) for i in left]),
        row.positions[..., left],
        row.visual[left],
        deepstack,
        {name: types[left] for name, types in row.types.items()},
        row.images[left],
        torch.tensor([len(members[i]) for i in left]),
        mass,
        gain,
    )


def _mask(model: Any, row: Row) -> Any:
    """What the language model makes its masks of; where the tokens of an image see each other, the masks: in all layers
    of Gemma 3, in those with a sliding window of Gemma 4, whose window holds for them too."""
    n, text = len(row.embeds), model.config.get_text_config()
    gemma3 = model.config.model_type == "gemma3"
    if not gemma3 and getattr(text, "use_bidirectional_attention", None) != "vision":
        return torch.ones(1, n, dtype=torch.long)
    at = torch.arange(n)
    together = (row.images[:, None] == row.images) & (row.images >= 0)
    past = at[:, None] - at
    causal, near = past >= 0, past < text.sliding_window
    both = (causal & near) | together if gemma3 else (causal | together) & near
    lowest = torch.finfo(torch.float32).min
    masks = {"full_attention": causal | together if gemma3 else causal, "sliding_attention": both}
    return {kind: torch.where(one, 0.0, lowest)[None, None] for kind, one in masks.items()}


def logits_of(model: Any, row: Row, tokens: Sequence[int] = ()) -> Tensor:
    """(1 + len(tokens), V) after the prompt and after each of `tokens`."""
    n_prompt, counted = len(row.embeds), row.gamma_k
    row = Row(row.embeds, row.positions, row.visual, row.deepstack, row.types, row.images)
    if tokens:
        row.add_text(model, torch.tensor(tokens))
    options: dict[str, Any] = {name: types[None] for name, types in row.types.items()}
    if row.deepstack is not None:
        options |= {"visual_pos_masks": row.visual[None], "deepstack_visual_embeds": row.deepstack}
    if row.positions.ndim == 2 and len(row.positions) == 4:
        row.positions = torch.cat([torch.arange(len(row.embeds))[None], row.positions[1:]])
    positions = row.positions[:, None] if row.positions.ndim == 2 else row.positions[None]
    attention = plain_attention(model)
    model.set_attn_implementation("dense_groups")
    state.update(gamma_k=counted, gamma_v=state["gamma_v"])
    try:
        options |= {"position_ids": positions, "attention_mask": _mask(model, row), "use_cache": False}
        out = model.base_model.language_model(inputs_embeds=row.embeds[None].clone(), **options)
    finally:
        state.update(gamma_k=None)
        model.set_attn_implementation(attention)
    logits = model.lm_head(out.last_hidden_state[0, n_prompt - 1 :])
    config = model.config.get_text_config()
    cap, factor = getattr(config, "final_logit_softcapping", None), getattr(config, "output_multiplier", 1.0)
    return logits if cap is None else (logits * factor / cap).tanh() * cap


def greedy(model: Any, row: Row, n: int) -> tuple[list[int], Tensor]:
    """The n tokens that follow, and their logits (n, V)."""
    tokens: list[int] = []
    found = []
    state.update(gamma_v=row.gamma_v)
    for _ in range(n):
        logits = logits_of(model, row, tokens)[-1]
        found.append(logits.clone())
        logits[SUPPRESSED] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens, torch.stack(found)


def scattered(tokens: Tensor, k: int, *_: Any, **__: Any) -> Groups:
    """Groups that no neighbourhood explains, whose representative is their last member."""
    n = len(tokens)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    member = (torch.arange(n) * k // n)[shuffled]
    last = torch.stack([(member == group).nonzero()[-1, 0] for group in range(k)])
    kept, order = last.sort()
    return Groups(order.argsort()[member], kept)


def n_kept(n: int, keep: float) -> int:
    """Of n visual tokens of a row."""
    return min(keep, n) if isinstance(keep, int) else max(1, int(keep * n + 0.5))


def merged_rows(model: Any, batch: dict[str, Tensor], keep: float, how: str = "counts") -> list[Row]:
    """The rows of a prompt, merged to `keep` by `scattered`."""
    return [
        merge(row, lambda tokens: scattered(tokens, n_kept(len(tokens), keep)), how=how)
        for row in unmerged_rows(model, batch)
    ]


def assert_generates(out: Any, model: Any, rows: list[Row], given: Tensor, repeats: int = 1) -> None:
    """`out` begins with the prompt `given`, and goes on as the rows do, in tokens and in logits within 1e-4."""
    n = len(out.logits)
    assert torch.equal(out.sequences[:, :-n], given.repeat_interleave(repeats, 0))
    for number, row in enumerate(rows):
        tokens, logits = greedy(model, row, n)
        for sequence in range(number * repeats, (number + 1) * repeats):
            assert out.sequences[sequence, -n:].tolist() == tokens
            ours = torch.stack([step[sequence] for step in out.logits])
            torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
