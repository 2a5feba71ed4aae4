"""Where visual tokens are, as the grouping is told: time, rows and columns, positions, and rotary angles."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import tiny_models as tiny
import torch
from dense_eager import GENERATE, build, plain_attention
from dense_groups import scattered
from gated_prompts import CONFIG
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.anchor.grouping import Group, group_tokens
from videoanchor_triton.integrations.transformers import merging
from videoanchor_triton.integrations.transformers.cache_scores import cached_scores
from videoanchor_triton.integrations.transformers.places import (
    frames_of_features,
    grid_of,
    rotary_features,
    rows_of_positions,
)

v5 = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 merges nothing")
GRID = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))


def test_frames_of_features() -> None:
    def encoded(*lengths: int) -> dict[str, Any]:
        return {"pooler_output": [torch.zeros(length, 8) for length in lengths]}

    assert frames_of_features(encoded(4, 2), None).tolist() == [0, 0, 0, 0, 1, 1]
    assert frames_of_features(encoded(6, 4), [3, 2]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert frames_of_features(encoded(7), [3]).tolist() == [0, 0, 1, 1, 2, 2, 2], "a newline ends the last"
    assert frames_of_features(encoded(2, 2, 2), [3]).tolist() == [0, 0, 1, 1, 2, 2], "parts are frames"
    assert frames_of_features({"pooler_output": torch.zeros(2, 3, 8)}, None).tolist() == [0, 0, 0, 1, 1, 1]


def test_grid_by_positions() -> None:
    """Three rows of two, of two frames; each frame begins where the model puts it, and times may be fractions."""
    frames = torch.arange(12) // 6
    place = torch.cartesian_prod(torch.arange(3), torch.arange(2)).repeat(2, 1)
    positions = torch.stack([7 + 0.5 * frames, 20 + 9 * frames + place[:, 0], 30 + 9 * frames + place[:, 1]])
    expected = torch.cat([frames[:, None], place], 1)
    assert torch.equal(grid_of(torch.arange(12) // 4, positions), expected), "times say what the frames are"


@pytest.mark.parametrize("axes", [1, 3])
def test_grid_of_squares(axes: int) -> None:
    """Where positions count on, also in three equal axes, a frame is a square."""
    frames = torch.tensor([0] * 9 + [1] * 4)
    positions = torch.arange(13).expand(axes, -1)
    grid = grid_of(frames, positions)
    squares = [torch.cartesian_prod(torch.tensor([t]), torch.arange(n), torch.arange(n)) for t, n in ((0, 3), (1, 2))]
    assert torch.equal(grid, torch.cat(squares))


def test_rows_of_positions() -> None:
    positions = torch.arange(4 * 2 * 5).view(4, 2, 5)
    columns = torch.tensor([1, 3])
    assert torch.equal(rows_of_positions(positions, 1, columns), positions[1:, 1][:, columns])
    assert torch.equal(rows_of_positions(positions[1:], 1, columns), positions[1:, 1][:, columns])
    assert torch.equal(rows_of_positions(positions[:1], 1, columns), positions[:1, 1][:, columns])
    assert torch.equal(rows_of_positions(positions[0], 1, columns), positions[:1, 1][:, columns])
    assert torch.equal(rows_of_positions(positions[0, :1], 1, columns), positions[:1, 0][:, columns])


@v5
@pytest.mark.filterwarnings("ignore:keep")
@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "llava_next_video", "gemma3", "ernie4_5_vl_moe"]
)
def test_what_the_grouping_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second row of two: the frames of its video, 2 x 2 tokens each, and the angles that its layers get."""
    told: list[dict[str, Tensor]] = []

    def listening(tokens: Tensor, k: int, *rest: Any, **options: Any) -> Any:
        told.append({**options, "tokens": tokens})
        return scattered(tokens, k, *rest)

    monkeypatch.setattr(merging, "group_tokens", listening)
    model = tiny.build(name)
    model.set_attn_implementation(plain_attention(model))
    batch = tiny.inputs(name, [[3, "V"], [4, 5, "V", 6]])
    with va.enable(model, replace(CONFIG, keep=0.5)) as handle:
        model.generate(**batch, **GENERATE)
    assert len(told) == len(handle.last) == 2
    assert torch.equal(told[1]["grid"], GRID)

    given: list[dict[str, Any]] = []
    text = model.base_model.language_model
    text.register_forward_pre_hook(lambda _module, _args, kwargs: given.append(kwargs), with_kwargs=True)
    angles: list[Any] = []
    text.rotary_emb.register_forward_hook(lambda _module, _args, output: angles.append(output))
    model.generate(**batch, max_new_tokens=1)
    visual = torch.isin(batch["input_ids"][1], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    assert torch.equal(told[1]["tokens"], given[0]["inputs_embeds"][1, visual])
    at = given[0]["position_ids"]
    at = at[None] if at.ndim == 2 else at
    assert torch.equal(told[1]["positions"].T, at[-told[1]["positions"].shape[1] :, 1][:, visual])
    layers = [torch.cat([part[1, visual].flatten(1) for part in one], 1).float() for one in angles]
    assert any(torch.allclose(told[1]["rotary"], layer, atol=1e-5) for layer in layers)


def test_a_language_model_without_rotary_angles() -> None:
    assert rotary_features(build("internvl").lm_head, torch.zeros(1, 3)) is None


@v5
@pytest.mark.parametrize("group", get_args(Group))
def test_each_rule_in_a_model(group: Any) -> None:
    """The package's own groups, in a run: as many as asked for, and the same again."""
    model, batch = build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    runs = []
    for _ in range(2):
        scorer: Any = "ssc" if group == "subspace" else CONFIG.scorer
        config = replace(CONFIG, keep=5, group=group, scorer=scorer, n_clusters=2, pca_rank=4)
        with va.enable(model, config) as handle:
            out = model.generate(**batch, **GENERATE)
        (result,) = handle.last
        assert result is not None
        assert result.groups is not None
        assert result.groups.unique().tolist() == [0, 1, 2, 3, 4]
        runs.append((result.groups, torch.stack(out.logits)))
    assert all(map(torch.equal, *runs))


@v5
@pytest.mark.parametrize("merge", ["counts", "mean", "drop"])
def test_compress_is_what_generate_does(merge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a run groups, compress() makes the run's embeddings and factors, to the bit."""
    config = replace(CONFIG, keep=5, merge=merge)
    model, batch = build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", [[3, "V", 5]])
    told: dict[str, Any] = {}

    def noted(tokens: Tensor, k: int, *rule: Any, **options: Any) -> Any:
        told.update(features=tokens, **options)
        return group_tokens(tokens, k, *rule, **options)

    monkeypatch.setattr(merging, "group_tokens", noted)
    given: list[Any] = []
    with va.enable(model, config) as handle:
        model.base_model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: given.append(kwargs), with_kwargs=True
        )
        out = model.generate(**batch, **GENERATE)
    held, (result,) = cached_scores(out.past_key_values), handle.last
    assert held is not None
    del told["seed"], told["labels"]  # of the configuration, and of the result
    merged = va.compress(told.pop("features"), config, scores=result, **told)
    at = (batch["input_ids"][0] == tiny.VIDEO).nonzero()[0, 0] + torch.arange(5)
    gate = held.gate(config)
    assert gate.log_gamma_k is not None
    assert gate.gamma_v is not None
    assert torch.equal(gate.log_gamma_k[0, at], merged.log_gamma_k)
    assert torch.equal(gate.gamma_v[0, at], merged.gamma_v)
    assert torch.equal(given[0]["inputs_embeds"][0, at], merged.features)
    assert result is not None
    assert result.groups is not None
    assert torch.equal(result.groups, merged.groups)
