"""Domain attention inside a model of your own: two steps, no trainer, no store.

Run: python examples/own_model.py
"""

import torch

import hstu_xd

# Two users' histories end to end: the domain of every event, and where each user begins.
domains = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
offsets = torch.tensor([0, 5, 8])

# Step 1, once a batch: one stable sort by (user, domain), shared by all layers.
grouping = hstu_xd.DomainGrouping.from_jagged(domains, offsets, num_domains=3)

# Step 2, in every layer: queries, keys and values in batch order, (tokens, heads, width).
q, k, v = (torch.randn(8, 2, 16, requires_grad=True) for _ in range(3))
out = hstu_xd.ops.domain_attention(q, k, v, grouping, norm_length=8)
out.sum().backward()

# Token 3 is its user's first event of domain 2: no other event can have reached it.
alone = torch.nn.functional.silu((q[3] * k[3]).sum(-1, keepdim=True)) * v[3] / 8
torch.testing.assert_close(out[3], alone)
print(f"{offsets.numel() - 1} users, {domains.numel()} events, output {tuple(out.shape)}")
