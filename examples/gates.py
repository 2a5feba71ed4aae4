"""Gates as a language: merged tokens, a compacted cache, ALiBi and forgetting attention, each beside its dense form."""

import torch

import videoanchor_triton as va

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, heads, 37, 64, device=device) for heads in (8, 2, 2))  # grouped-query attention
position = torch.arange(37, device=device)


def dense(bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / 8 + bias) v, causal, from a bias (8, 37, 37) of pairs: what the gates below save."""
    keys, values = (x.repeat_interleave(4, 1) for x in (k, v))
    return ((q @ keys.mT / 8 + bias).masked_fill(position > position[:, None], -torch.inf)).softmax(-1) @ values


# merged tokens: a key that stands for n equal ones
counts = torch.randint(1, 20, (37,), device=device)
few = va.anchored_attention(q, k, v, log_gamma_k=counts.log())
many = va.anchored_attention(q, k.repeat_interleave(counts, 2), v.repeat_interleave(counts, 2))
print(f"37 keys with counts equal {int(counts.sum())} keys:", torch.allclose(few, many, atol=1e-4))

# a compacted cache: each KV head keeps 30 keys with weights beta of its own, and 7 newer ones as they are
beta = torch.randn(1, 2, 30, device=device)
lengths = torch.tensor([37], dtype=torch.int32, device=device)
step = va.anchored_attention_decode(q[:, :, -1:], k, v, lengths, log_gamma_k=beta)
bias = torch.cat([beta[0], torch.zeros(2, 7, device=device)], 1).repeat_interleave(4, 0)
print("compacted cache equal:", torch.allclose(step, dense(bias[:, None])[:, :, -1:], atol=1e-4))

# ALiBi: slopes of query heads; the distance to the last key is that to the query but for a constant of the row
slopes = 2.0 ** -torch.arange(1.0, 9.0, device=device)
alibi = va.anchored_attention(q, k, v, causal=True, log_gamma_k=(slopes[:, None] * (position - 36))[None])
bias = -slopes[:, None, None] * (position[:, None] - position)
print("ALiBi equal:", torch.allclose(alibi, dense(bias), atol=1e-4))

# forgetting attention: F the running sum of log forget gates, of query heads; the bias is F_i - F_j
total = torch.nn.functional.logsigmoid(torch.randn(1, 8, 37, device=device) + 2).cumsum(-1)
forgetting = va.anchored_attention(q, k, v, causal=True, log_gamma_k=total[..., -1:] - total)
bias = total[0, :, :, None] - total[0, :, None]
print("forgetting attention equal:", torch.allclose(forgetting, dense(bias), atol=1e-4))
