"""A model of one's own, for README.md's "Change it": learned positions, one LayerNorm for
all layers, a plain MLP.

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
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d, bias=False) for _ in range(c.n_layers))
        self.up = nn.ModuleList(nn.Linear(d, c.d_ff, bias=False) for _ in range(c.n_layers))
        self.down = nn.ModuleList(nn.Linear(c.d_ff, d, bias=False) for _ in range(c.n_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, c.n_vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=.02, generator=generator)

    @property
    def device(self):
        return self.head.weight.device

    def hidden(self, ids, cache=None):
        T = ids.shape[1]
        position = torch.arange(T, device=ids.device)
        mask = visible(cache, T) if cache else None
        if cache:
            position = (position + cache.length - cache.padding[:, None]).clamp(min=0)
        x = self.embed(ids) + self.positions(position)
        for i, (qkv, up, down) in enumerate(zip(self.qkv, self.up, self.down)):
            heads = qkv(self.norm(x)).unflatten(-1, (3, self.config.n_heads, -1))    # (B, T, 3, H, D)
            q, k, v = heads.permute(2, 0, 3, 1, 4)                                   # (B, H, T, D) each
            if cache:
                k, v = cache.store(i, k, v)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not cache)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + down(F.gelu(up(self.norm(x))))
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
