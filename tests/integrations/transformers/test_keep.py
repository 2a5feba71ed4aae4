"""generate() with merged visual tokens against a dense form of it, over every class and every way of generating."""

import copy
from dataclasses import replace
from typing import Any

import dense_groups
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from dense_eager import ALPHA_K, ALPHA_V, GENERATE, build, plain_attention, pseudo_scores
from dense_groups import assert_generates, logits_of, merge, merged_rows, n_kept, scattered, unmerged_rows
from gated_prompts import CONFIG, ONE, TWO
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import videoanchor_triton as va
from videoanchor_triton.anchor.grouping import Groups
from videoanchor_triton.anchor.grouping_rules import group_means
from videoanchor_triton.integrations.transformers import merging
from videoanchor_triton.integrations.transformers.cache_scores import CacheScores, Merged, cached_scores

pytestmark = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 encodes pixels within the forward")

MERGED = replace(CONFIG, keep=0.5)
MIXED: list[list[int | str]] = [[3, "V", 5, "V", 6], [7, 8, 9], [4, "V", 2]]
REFUSED = {"exaone4_5", "hyperclovax"}
NEEDS_IDS = {"gemma4_shared"}  # the oracle gives the language model embeddings alone


@pytest.fixture(autouse=True)
def _scattered_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "group_tokens", scattered)
    torch.set_grad_enabled(False)


@pytest.fixture(autouse=True, scope="module")
def _gradients_are_back() -> Any:
    yield
    torch.set_grad_enabled(True)


def generate(model: Any, batch: dict[str, Tensor], config: va.VideoAnchorConfig = MERGED, **options: Any) -> Any:
    with va.enable(model, config):
        return model.generate(**batch, **{**GENERATE, **options})


@pytest.mark.filterwarnings("ignore:keep")
@pytest.mark.parametrize("name", [name for name in tiny.ALL_BACKBONES if name not in REFUSED | NEEDS_IDS])
def test_every_class(name: str) -> None:
    """Two rows, padded on the left, of one and of two videos."""
    model = tiny.build(name)
    model.set_attn_implementation(plain_attention(model))
    batch = tiny.inputs(name, [[3, 4, "V", 5], [7, "V", 11, "V", 9, 10]])
    out = generate(model, batch, max_new_tokens=3)
    assert_generates(out, model, merged_rows(model, batch, 0.5), batch["input_ids"])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dynamic"),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, id="static"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"prefill_chunk_size": 3}, id="chunks"),
    ],
)
def test_rows_that_lose_different_numbers(backbone: tuple[str, Any], options: dict[str, Any]) -> None:
    """Rows of two videos, none and one, each cut to six tokens where it has more."""
    name, model = backbone
    batch = tiny.inputs(name, MIXED)
    out = generate(model, batch, replace(CONFIG, keep=6), **options)
    assert_generates(out, model, merged_rows(model, batch, 6), batch["input_ids"])


@pytest.mark.parametrize("how", ["mean", "drop"])
def test_what_others_do(backbone: tuple[str, Any], how: Any) -> None:
    """A group that counts as one token, and one member alone; the mass is then the number of tokens that are left."""
    name, model = backbone
    batch = tiny.inputs(name, MIXED)
    out = generate(model, batch, replace(MERGED, merge=how), max_new_tokens=3)
    assert_generates(out, model, merged_rows(model, batch, 0.5, how), batch["input_ids"])
    held = cached_scores(out.past_key_values)
    assert held is not None
    assert held.merged is not None
    assert held.merged.counts.eq(1).all()


def test_right_padding(backbone: tuple[str, Any]) -> None:
    """The prompt is padded on the left anew, so that right-padded rows answer as left-padded ones."""
    name, model = backbone
    batch = tiny.inputs(name, TWO, left_pad=False)
    expected = generate(model, tiny.inputs(name, TWO))
    out = generate(model, batch)
    assert torch.equal(out.sequences[:, :-6], batch["input_ids"])
    assert torch.equal(out.sequences[:, -6:], expected.sequences[:, -6:])
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_beams(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    out = generate(model, batch, num_beams=4, num_return_sequences=2, output_scores=True)
    assert torch.equal(out.sequences[:, :-6], batch["input_ids"].repeat_interleave(2, 0))
    rows = merged_rows(model, batch, 0.5)
    for number, sequence in enumerate(out.sequences):
        row, tokens = rows[number // 2], sequence[-6:]
        dense_groups.state.update(gamma_v=row.gamma_v)
        each = logits_of(model, row, tokens[:-1].tolist()).log_softmax(-1).gather(1, tokens[:, None])
        torch.testing.assert_close(each.sum() / 6, out.sequences_scores[number], atol=1e-4, rtol=0)


def test_prompt_lookup(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, "V", 5, 3, 4, 5, 3, 4, 5]])
    out = generate(model, batch, max_new_tokens=10, prompt_lookup_num_tokens=3)
    assert_generates(out, model, merged_rows(model, batch, 0.5), batch["input_ids"])


@pytest.mark.parametrize("assistant_merges", [False, True])
def test_assistant(backbone: tuple[str, Any], assistant_merges: bool) -> None:
    """It is given the features of groups, which are not merged again."""
    name, model = backbone
    assistant = build(name)
    if assistant_merges:
        va.enable(assistant, MERGED)
    batch = tiny.inputs(name, ONE)
    out = generate(model, batch, max_new_tokens=10, assistant_model=assistant)
    assert_generates(out, model, merged_rows(model, batch, 0.5), batch["input_ids"])


def test_sampling(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    greedy = generate(model, batch, max_new_tokens=1).logits[0]
    out = generate(model, batch, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert torch.equal(out.sequences[:, :-3], batch["input_ids"].repeat_interleave(3, 0))
    torch.testing.assert_close(out.logits[0], greedy.repeat_interleave(3, 0), atol=1e-4, rtol=0)
    with va.enable(model, MERGED):
        bare = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert torch.equal(bare[:, :-3], batch["input_ids"].repeat_interleave(3, 0))


@pytest.mark.parametrize("only_new", [False, True], ids=["all-ids", "new-ids"])
def test_second_and_third_turn(backbone: tuple[str, Any], only_new: bool) -> None:
    """Positions and lengths are those of the conversation as the caller knows it; so are copies of the cache."""
    name, model = backbone
    batch, cache = tiny.inputs(name, TWO), DynamicCache(config=model.config.get_text_config())
    rows = merged_rows(model, batch, 0.5)
    said = generate(model, batch, past_key_values=cache).sequences
    mask = batch["attention_mask"]
    for question in ([21, 22, 23], [24, 25]):
        ids = torch.cat([said, torch.tensor([question] * 2)], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        given = ids[:, said.shape[1] - 1 :] if only_new else ids
        before = copy.deepcopy(cache)
        turn = {"input_ids": given, "attention_mask": mask}
        out = generate(model, turn, past_key_values=cache)
        again = generate(model, turn, past_key_values=before)
        assert torch.equal(torch.stack(out.logits), torch.stack(again.logits))
        for row, whole in zip(rows, ids, strict=True):
            n_known = row.visual.shape[0] - len(row.gamma_k)  # text since the prompt
            row.add_text(model, whole[batch["input_ids"].shape[1] + n_known :])
        assert_generates(out, model, rows, given)
        said = torch.cat([ids, out.sequences[:, given.shape[1] :]], 1)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
@pytest.mark.parametrize("keep", [0.5, 13], ids=["both-merged", "second-merged"])
def test_second_turn_with_videos(name: str, keep: float) -> None:
    """Each turn is scored and merged by itself. (transformers takes no such turn of Qwen.)"""
    model = build(name)
    first, second = tiny.inputs(name, [[3, 4, "V", 5]]), tiny.inputs(name, [[21, "V", 22, "V", 23]], seed=6)
    cache = DynamicCache(config=model.config.get_text_config())
    config = replace(CONFIG, keep=keep)
    said = generate(model, first, config, past_key_values=cache).sequences
    ids = torch.cat([said, second["input_ids"]], 1)
    turn = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = generate(model, turn, config, past_key_values=cache)

    pixels = next(key for key in first if key.startswith("pixel"))
    whole = {**turn, pixels: torch.cat([first[pixels], second[pixels]])}
    (row,) = unmerged_rows(model, whole)
    n = int(row.visual.sum()) // 3
    k_first, k_second = (n_kept(n, keep), n_kept(2 * n, keep))

    def by_turn(tokens: Tensor) -> Groups:
        one, two = scattered(tokens[:n], k_first), scattered(tokens[n:], k_second)
        return Groups(torch.cat([one.member, two.member + k_first]), torch.cat([one.kept, two.kept + n]))

    def scores(tokens: Tensor) -> Tensor:
        return torch.cat([pseudo_scores(tokens[:n]), pseudo_scores(tokens[n:])])

    assert_generates(out, model, [merge(row, by_turn, scores)], ids)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_second_turn_that_says_where_old_videos_are(name: str) -> None:
    """A processor gives the token types of the whole conversation. The videos lie before what is new, and beyond the
    length of the short cache."""
    model, config = build(name), replace(CONFIG, keep=6)
    batch, cache = tiny.inputs(name, [[3, "V", 5, "V", 6]]), DynamicCache(config=model.config.get_text_config())
    said = generate(model, batch, config, past_key_values=cache).sequences
    assert cache.get_seq_length() < int(batch["mm_token_type_ids"].nonzero()[-1, 1])
    ids = torch.cat([said, torch.tensor([[21, 22]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = F.pad(batch["mm_token_type_ids"], (0, ids.shape[1] - batch["input_ids"].shape[1]))
    expected = generate(model, turn, config, past_key_values=copy.deepcopy(cache))
    out = generate(model, {**turn, "mm_token_type_ids": types}, config, past_key_values=cache)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_a_static_cache_that_was_reset() -> None:
    model, batch = build("internvl"), tiny.inputs("internvl", TWO)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=48)
    first = generate(model, batch, past_key_values=cache, disable_compile=True)
    cache.reset()
    again = generate(model, batch, past_key_values=cache, disable_compile=True)
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))


def test_decoding_that_is_compiled() -> None:
    """With a static cache: one graph, and what it gives uncompiled."""
    model, batch = build("internvl"), tiny.inputs("internvl", TWO)
    expected = generate(model, batch, cache_implementation="static", disable_compile=True)
    compile_config = CompileConfig(backend="eager", mode=None)  # pyright: ignore[reportArgumentType]
    compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    torch._dynamo.reset()
    counters.clear()
    out = generate(model, batch, cache_implementation="static", compile_config=compile_config)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_static_cache_has_room_for_the_short_prompt_only() -> None:
    batch = tiny.inputs("internvl", ONE)
    caches = [
        generate(build("internvl"), batch, config, cache_implementation="static", disable_compile=True).past_key_values
        for config in (CONFIG, MERGED)
    ]
    assert [cache.layers[0].keys.shape[2] for cache in caches] == [24, 18]


def test_lengths_are_of_the_prompt_as_given(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    n, end = batch["input_ids"].shape[1], 150
    lengths = {"max_new_tokens": None, "min_length": n + 4, "max_length": n + 6, "eos_token_id": end}
    out = generate(model, batch, **lengths, output_scores=True)
    assert torch.equal(out.sequences[:, :n], batch["input_ids"])
    assert out.sequences.shape[1] == n + 6
    assert [bool(step[0, end] == -torch.inf) for step in out.scores] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_the_prompt_as_given(name: str) -> None:
    """But for those of text, the first of four, by which transformers tells packed sequences apart: without gaps."""
    model, batch, seen = build(name), tiny.inputs(name, TWO), []
    for config in (CONFIG, MERGED):
        hook = model.base_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        generate(model, batch, config, max_new_tokens=3)
        hook.remove()
    plain, merged = seen[:3], seen[3:]
    for row, mask in enumerate(batch["attention_mask"]):
        n = int(mask.sum()) - 6  # twelve visual tokens were merged to six
        assert torch.equal(merged[0][0, row, -n:], torch.arange(n))
        missing = {*map(tuple, merged[0][1:, row, -n:].T.tolist())} - {*map(tuple, plain[0][1:, row].T.tolist())}
        assert not missing
    for ours, theirs in zip(merged[1:], plain[1:], strict=True):
        assert torch.equal(ours[1:], theirs[1:])


def test_keep_1_is_bit_equal(backbone: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are prompts from which nothing is taken."""
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    expected = generate(model, batch, CONFIG)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be merged")

    monkeypatch.setattr(merging, "group_tokens", never)
    for keep in (1, 1.0, 0.99, 100):
        out = generate(model, batch, replace(CONFIG, keep=keep))
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_text_alone(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, [[3, 4, 5], [6, 7, 8]])
    out, expected = generate(model, batch), generate(model, batch, CONFIG)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_counts_stay_where_the_gate_goes() -> None:
    """decode="prefill" leaves decoding steps ungated; a merged token stands for several in them as well."""
    model, batch = build("internvl"), tiny.inputs("internvl", ONE)
    out = generate(model, batch, replace(MERGED, decode="prefill"), max_new_tokens=2)
    held = cached_scores(out.past_key_values)
    assert held is not None
    assert held.merged is not None
    config = replace(MERGED, decode="prefill")
    torch.testing.assert_close(held.gate(config, counts_only=True).log_gamma_k, held.merged.counts.log())

    (row,) = merged_rows(model, batch, 0.5)
    cache: Any = DynamicCache(config=model.config.get_text_config())
    generate(model, batch, config, max_new_tokens=1, past_key_values=cache)  # the prompt, gated
    step = {
        "input_ids": out.sequences[:, -2:-1],
        "position_ids": row.positions[None, -1:] + 1,
        "past_key_values": cache,
    }
    model.set_attn_implementation("dense_groups")
    dense_groups.state.update(gamma_k=row.counts.float(), gamma_v=torch.ones(len(row.counts)))
    plain = DynamicCache(config=model.config.get_text_config())
    for layer, (keys, values) in enumerate([(one.keys, one.values) for one in cache.layers]):
        plain.update(keys, values, layer)
    logits = model(**{**step, "past_key_values": plain}).logits[:, -1]
    dense_groups.state.update(gamma_k=None)
    torch.testing.assert_close(out.logits[1], logits, atol=1e-4, rtol=0)


def test_what_the_cache_holds(backbone: tuple[str, Any]) -> None:
    """The mass is the number of tokens, the places are where the representatives stood."""
    name, model = backbone
    batch = tiny.inputs(name, TWO)
    out = generate(model, batch, max_new_tokens=1)
    held = cached_scores(out.past_key_values)
    assert held is not None
    assert held.merged is not None
    real = held.merged.places >= 0
    assert torch.equal((held.merged.counts * real).sum(1).long(), batch["attention_mask"].sum(1))
    for row, places in enumerate(held.merged.places):
        kept = places[places >= 0]
        visual = torch.isin(batch["input_ids"][row, kept], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
        assert held.merged.counts[row, places >= 0][~visual].eq(1).all()
        assert batch["attention_mask"][row, kept].all()
    assert held.merged.removed == batch["input_ids"].shape[1] - held.scores.shape[1] > 0


def test_the_result_names_the_groups() -> None:
    model, batch = build("internvl"), tiny.inputs("internvl", TWO)
    with va.enable(model, MERGED) as handle:
        model.generate(**batch, **GENERATE)
    for result in handle.last:
        assert result is not None
        assert result.groups is not None
        assert torch.equal(result.groups, scattered(result.scores, 6).member)


def test_duplicates_are_one_key() -> None:
    """One attention call: equal keys and values with scores of their own, and one with the sum of their gates."""
    generator = torch.Generator().manual_seed(0)
    n, k = 400, 37
    member = torch.cat([torch.arange(k), torch.randint(0, k, (n - k,), generator=generator)])
    keys, values = torch.randn(2, 1, 2, k, 64, generator=generator)
    query = torch.randn(1, 8, 5, 64, generator=generator)
    scores = torch.rand(n, generator=generator)
    gamma_k, gamma_v = 1 + ALPHA_K * scores, 1 + ALPHA_V * scores
    every = (x[:, :, member].double() for x in (keys, values))
    expected = va.anchored_attention(query.double(), *every, gamma_k=gamma_k, gamma_v=gamma_v, backend="reference")

    counts = torch.bincount(member)[None].float()
    means, squares = (group_means(x[:, None], member, k).T for x in (scores, scores.square()))
    held = CacheScores(means, None, Merged(counts, squares, torch.arange(k)[None], n - k, int(counts.max())))
    gate = held.gate(CONFIG)
    assert gate.log_gamma_k is not None
    torch.testing.assert_close(gate.log_gamma_k.exp().sum(), gamma_k.sum())
    out = va.anchored_attention(query, keys, values, log_gamma_k=gate.log_gamma_k, gamma_v=gate.gamma_v)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
