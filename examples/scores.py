"""Subspace scores of any visual tokens: all at once, as they come, and as a scikit-learn estimator."""

import torch

import videoanchor_triton as va

torch.manual_seed(0)
bases = torch.randn(4, 8, 128)
tokens = torch.cat([torch.randn(60, 8) @ basis for basis in bases])  # four subspaces of 8 dimensions, (240, 128)

config = va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5, n_clusters=4, pca_rank=32)
result = va.anchor_scores(tokens, config)
print(f"scores {result.scores.min():.2f} to {result.scores.max():.2f}, {result.n_iter} iterations")

stream = va.AnchorStream(config, max_atoms=128)
for chunk in tokens[torch.randperm(240)].split(60):
    print(f"{len(stream.update(chunk).scores)} more tokens")

subspaces = va.SparseSubspaceClustering(n_clusters=4, pca_rank=32, random_state=0).fit(tokens.numpy())
for place in range(4):
    print(f"subspace {place}: labels {sorted(set(subspaces.labels_[60 * place : 60 * place + 60].tolist()))}")
