"""The gated attention on its own: prefill, packed sequences, one step of decoding, and partial results merged."""

import torch

import videoanchor_triton as va

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, heads, 300, 64, device=device) for heads in (8, 2, 2))  # grouped-query attention
scores = torch.rand(300, device=device)
gates = {"gamma_k": 1 + 9.5 * scores, "gamma_v": 1 + 2.5 * scores}
out = va.anchored_attention(q, k, v, **gates, causal=True)

# packed: sequences of 100 and 200 tokens, (tokens, heads, head dim)
packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
ends = torch.tensor([0, 100, 300], dtype=torch.int32, device=device)
varlen = va.anchored_attention_varlen(*packed, ends, ends, 200, 200, **gates, causal=True)
print("packed equal:", torch.allclose(varlen[:100], out[0, :, :100].transpose(0, 1), atol=1e-4))

# one step of decoding against a cache of 300 tokens
lengths = torch.tensor([300], dtype=torch.int32, device=device)
step = va.anchored_attention_decode(q[:, :, -1:], k, v, lengths, **gates)
print("decode equal:", torch.allclose(step, out[:, :, -1:], atol=1e-4))

# keys in two halves, merged by their log-sum-exps
(out_a, lse_a), (out_b, lse_b) = (
    va.anchored_attention(q, k[:, :, part], v[:, :, part], **{n: g[part] for n, g in gates.items()}, return_lse=True)
    for part in (slice(0, 150), slice(150, 300))
)
merged, _ = va.merge_attention(out_a, lse_a, out_b, lse_b)
print("merged equal:", torch.allclose(merged, va.anchored_attention(q, k, v, **gates), atol=1e-4))
