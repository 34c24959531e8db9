"""A model of one's own, for README.md's "Change it": learned positions, LayerNorm first, a plain MLP.

Pasted at the end of model.py (from "class" on), with `GPT = Mine` below it, it replaces the GPT there.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import visible


class Mine(nn.Module):
    def __init__(self, c, generator=None):
        super().__init__()
        self.config = c
        self.decode_rows = 1024
        d = c.d_model
        self.embed = nn.Embedding(c.n_vocab, d)
        self.positions = nn.Embedding(c.context, d)
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(c.n_layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, c.d_ff), nn.GELU(),
                                               nn.Linear(c.d_ff, d)) for _ in range(c.n_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, c.n_vocab)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=.02, generator=generator)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    @property
    def device(self):
        return self.head.weight.device

    def hidden(self, ids, cache=None):
        T = ids.shape[1]
        position, mask = torch.arange(T, device=ids.device), None
        if cache:
            mask = visible(cache, T)
            position = (position + cache.length - cache.padding[:, None]).clamp(min=0)
        x = self.embed(ids) + self.positions(position)
        for i, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            parts = qkv(self.norm(x)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for y in parts)
            if cache:
                k, v = cache.store(i, k, v)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not cache)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        if cache:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden):
        return self.head(hidden)

    def forward(self, ids):
        return self.logits(self.hidden(ids))

    def flops_per_token(self, length):
        return 2 * sum(p.numel() for p in self.parameters())

    def set_memory(self, c):
        self.decode_rows = c.decode_rows
