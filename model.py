"""A small GPT in the OLMo-2 architecture, with key-value cache, batched sampling and token log-probabilities.

    python model.py runs/base/8M.pt          prints what the checkpoint is, then answers prompts that you type

Axes: B rows, T positions, V vocabulary, L layers, H heads, D head size, P prompts, G rollouts per prompt.
Left out: dropout, biases and weight tying, as OLMo-2 has none of them.
"""
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ranks


@dataclass
class ModelConfig:
    vocab_size: int = 512       # rows of the embedding and of the head
    n_vocab: int = 512          # ids in use; the rows above are for alignment, never sampled nor scored
    context: int = 256          # longest sequence, tokens
    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 3
    d_ff: int = 256             # about 8/3 d_model: SwiGLU has three matrices where a plain MLP has two
    rope_theta: float = 10_000.0
    n_kv_heads: int = 0         # of keys and values, 0 = n_heads; fewer: grouped-query attention (OLMo-2 32B)

    def __post_init__(self) -> None:
        self.n_kv_heads = self.n_kv_heads or self.n_heads

    @property
    def kv_width(self) -> int:
        """Width of the keys of a position, and of its values."""
        return self.d_model // self.n_heads * self.n_kv_heads


# one dial: parameters at a vocabulary of 512                        d_model, n_layers, n_heads, d_ff
SIZES = {"0.3M": (64, 5, 2, 192), "0.5M": (96, 4, 3, 256), "1M": (128, 5, 4, 352), "3M": (192, 6, 6, 512),
         "10M": (320, 8, 5, 864), "30M": (512, 9, 8, 1376), "124M": (768, 16, 12, 2304)}


def mixed(function: Callable) -> Callable:
    """Decorator of f(model, ...): on a GPU (or if the weights are bf16) matrix products in bf16, the rest in
    fp32, weights and their gradients too. On the model itself, so that sampling and scoring agree."""
    @functools.wraps(function)
    def wrapped(model: "GPT", *args: object, **options: object) -> object:
        weight = model.head.weight
        if not weight.is_cuda and weight.dtype == torch.float32:
            return function(model, *args, **options)
        with torch.autocast(weight.device.type, torch.bfloat16):
            return function(model, *args, **options)
    return wrapped


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight · x / sqrt(mean(x²) + 1e-6), in fp32 under autocast too (Zhang and Sennrich 2019)."""
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split form (Su et al. 2021): element i turns with i + D/2. x (B, H, T, D); cos, sin (T, D),
    the first half of the sines negative."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Cache:
    """Keys and values decoded so far: two tensors (L, B·H, capacity, D), filled up to `length`. No query sees
    the first `padding` (B,) columns of a row. Decoding attends over the whole capacity, unfilled columns
    masked: CPUs multiply contiguous tensors several times faster than slices. So it grows in small steps."""

    def __init__(self, c: ModelConfig, padding: Tensor):
        self.heads, self.length, self.padding = c.n_kv_heads, 0, padding
        shape = (c.n_layers, len(padding) * self.heads, 0, c.d_model // c.n_heads)
        self.k, self.v = torch.zeros(shape, device=padding.device), torch.zeros(shape, device=padding.device)

    def room(self, columns: int) -> int:
        """Make room for so many further columns; returns the capacity."""
        missing = self.length + columns - self.k.shape[2]
        if missing > 0:                          # one after the other: two copies of both are not needed
            new = self.k.new_zeros(*self.k.shape[:2], max(16, missing), self.k.shape[3])
            self.k = torch.cat((self.k, new), dim=2)
            self.v = torch.cat((self.v, new), dim=2)
        return self.k.shape[2]

    def store(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Append a layer's k, v (B, H, T, D); returns all of them (B, H, capacity, D). `length` stays."""
        if self.k.dtype != new[0].dtype:         # the first ones say whether it is bf16
            self.k, self.v = self.k.to(new[0].dtype), self.v.to(new[0].dtype)
        whole = [x[layer].unflatten(0, (-1, self.heads)) for x in (self.k, self.v)]
        for x, y in zip(whole, new):
            x[:, :, self.length:self.length + y.shape[2]] = y
        return whole

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows, in this order."""
        self.padding = self.padding[rows]
        self.k = self.k.unflatten(1, (-1, self.heads)).index_select(1, rows).flatten(1, 2)
        self.v = self.v.unflatten(1, (-1, self.heads)).index_select(1, rows).flatten(1, 2)


class SharedPrompts:
    """Keys and values of P prompts, computed once, to which the G completions of each prompt attend in
    training. `backward` carries the gradient that all their micro-batches left in `keys_values` back."""

    def __init__(self, model: "GPT", prompts: list[list[int]], pad: int):
        device, width = model.head.weight.device, max(2, max(map(len, prompts))) - 1     # but the last token
        ids = torch.tensor([[pad] * (width + 1 - len(p)) + p[:-1] for p in prompts], device=device)
        self.padding = torch.tensor([width + 1 - len(p) for p in prompts], device=device)
        self.last = [p[-1] for p in prompts]                             # the token each completion follows
        self.length, self.rows, self.keys_values = 0, None, None
        self.graph: list[Tensor] = []            # keys, values of layer 0, of layer 1, ...: (P, H, T, D)
        model.hidden(ids, self)
        self.keys_values = [x.detach().requires_grad_() for x in self.graph]

    def of(self, rows: list[int]) -> "SharedPrompts":
        """What row i of a batch attends to: prompt number rows[i]."""
        view = copy.copy(self)
        view.rows = torch.tensor(rows, device=self.padding.device)
        view.padding = self.padding[view.rows]
        return view

    def room(self, columns: int) -> int:
        return self.length + columns

    def store(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        if self.rows is None:                                            # the prompts themselves
            if self.keys_values is None:         # else gradient checkpointing computes them once more
                self.graph += new
            return new
        prompts = self.keys_values[2 * layer:2 * layer + 2]
        return tuple(torch.cat((old.index_select(0, self.rows), y), dim=2) for old, y in zip(prompts, new))

    def backward(self) -> None:
        torch.autograd.backward(self.graph, [x.grad for x in self.keys_values])


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_size = c.d_model // c.n_heads
        self.widths = (c.d_model, c.kv_width, c.kv_width)        # of queries, keys, values: one product
        self.qkv = nn.Linear(c.d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.q_norm, self.k_norm, self.attention_norm, self.mlp_norm = (
            nn.Parameter(torch.ones(width)) for width in (c.d_model, c.kv_width, c.d_model, c.d_model))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None,
                layer: int) -> Tensor:
        """x + norm(attention(x)), then x + norm(SwiGLU(x)): (B, T, d_model), norms after (OLMo-2). Queries
        and keys are normed over the whole width, then split into heads and rotated by cos, sin (T, D). A
        cache stores this layer's keys and values and returns all there are, which queries may see where
        `mask` (B, 1, T, keys) is True; without a cache, attention is causal."""
        B, T, d = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)        # over all heads, before the split
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2) for y in (q, k, v))         # (B, H, T, D)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.store(layer, k, v)
        if q.shape[1] > k.shape[1]:              # several heads of queries to a head of keys and values
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        if cache is not None and T == 1 and not x.is_cuda:       # fused: slow for one query on a CPU
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (B, -1))    # (B, H, 1, keys)
            weights = (scores * q.shape[-1] ** -.5).masked_fill(~mask, -torch.inf).softmax(-1)
            y = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, -1))         # (B, H, 1, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        x = x + rms_norm(self.out(y.transpose(1, 2).reshape(B, T, d)), self.attention_norm)     # norm after
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + rms_norm(self.down(F.silu(gate) * up), self.mlp_norm)


class GPT(nn.Module):
    def __init__(self, c: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config, self.checkpointing, self.decode_rows = c, False, 1024               # see scale.Memory
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.trunc_normal_(p, std=.02, a=-.06, b=.06, generator=generator)
        size = c.d_model // c.n_heads
        angles = torch.outer(torch.arange(c.context),
                             c.rope_theta ** -(torch.arange(0, size, 2).float() / size))
        cos, sin = angles.cos(), angles.sin()                            # (context, D/2), fp32
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)

    @mixed
    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, d_model) of ids (B, T), which follow what the cache holds. With a cache
        the mask is explicit, as PyTorch's causal flag aligns top-left; what is padding sees only itself."""
        T, start = ids.shape[1], cache.length if cache else 0
        mask = None
        if cache is not None:
            key, query = (torch.arange(cache.room(T), device=ids.device),
                          torch.arange(start, start + T, device=ids.device))
            known = key >= cache.padding[:, None, None, None]                    # (B, 1, 1, capacity)
            mask = (key <= query[:, None]) & known | (key == query[:, None])     # (B, 1, T, capacity)
        x = self.embed(ids)
        call = (functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
                if self.checkpointing and torch.is_grad_enabled() else lambda block, *inputs: block(*inputs))
        for layer, block in enumerate(self.blocks):
            x = call(block, x, self.cos[start:start + T], self.sin[start:start + T], mask, cache, layer)
        if cache is not None:
            cache.length += T
        return rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) -> (..., n_vocab): rows that no token uses take no part. Always in fp32: sampled
        and scored logits must agree, and bf16 numbers near 20 lie .125 apart."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, self.head.weight[:self.config.n_vocab].float())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token in a sequence of `length` (Kaplan et al. 2020); backward: twice that."""
        c = self.config
        layer = 2 * c.d_model ** 2 + 2 * c.d_model * c.kv_width + 3 * c.d_model * c.d_ff
        weights = c.n_layers * layer + c.d_model * c.n_vocab
        return 2 * weights + 2 * c.n_layers * c.d_model * length      # two products, length/2 keys on average


# ---- sampling --------------------------------------------------------------------------------------------

class Rollouts(NamedTuple):
    """B = P·G sampled completions, row p·G + g being rollout g of prompt p, padded beyond its length."""
    tokens: Tensor      # (B, max_new) int64, EOS included where it was generated
    lengths: Tensor     # (B,) number of generated tokens, EOS included
    finished: Tensor    # (B,) bool: generated EOS within max_new tokens
    logprobs: Tensor    # (B, max_new) log-probability of each token under the sampling distribution
    entropy: Tensor     # (B, max_new) entropy of that distribution, nats

    def completions(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]


@mixed                                          # weights are converted once, not at every token
@torch.inference_mode()
def sample(model: GPT, prompts: list[list[int]], group: int, max_new: int, eos: int, pad: int,
           generator: torch.Generator, temperature: float = 1.0, compact: bool = True,
           block: int = 0) -> Rollouts:
    """Sample `group` completions of every prompt from softmax(logits / temperature), 0: greedy; on the CPU.
    Similar lengths are decoded together, `block` (0: model.decode_rows) rows at a time to bound memory. The
    uniform numbers behind a row do not depend on its company, nor on how many ranks share the work; each rank
    gets all rows. ValueError if a prompt is empty or leaves no room for max_new tokens."""
    longest, room = max(map(len, prompts)), model.config.context - max_new
    if min(map(len, prompts)) == 0 or longest > room:
        raise ValueError(f"prompts must have 1 to {room} tokens (context {model.config.context}, of which "
                         f"{max_new} are for the answer), found up to {longest}")
    u = torch.rand(len(prompts), group, max_new, generator=generator)    # on the CPU: same on every device
    mine = ranks.share(sorted(range(len(prompts)), key=lambda p: len(prompts[p])))
    parts, at_once = [], max(1, (block or model.decode_rows) // group)
    for i in range(0, len(mine), at_once):
        chosen = mine[i:i + at_once]
        uniform = u[chosen].flatten(0, 1).to(model.head.weight.device)   # (rows of the block, max_new)
        parts.append(decode(model, [prompts[p] for p in chosen], group, eos, pad, uniform, temperature,
                            compact))
    back, parts = torch.tensor(ranks.gather(mine)).argsort(), ranks.gather(parts)    # to the prompts' order
    return Rollouts(*(torch.cat(x).unflatten(0, (-1, group))[back].flatten(0, 1) for x in zip(*parts)))


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """A token per row (B,) from probabilities p (B, V) and uniform numbers u (B,) in [0, 1): the first at
    which the row's running sum exceeds u times its total, so never one of probability 0."""
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return token.clamp_(max=p.shape[-1] - 1)     # should rounding lift u · total to the total


def decode(model: GPT, prompts: list[list[int]], group: int, eos: int, pad: int, u: Tensor,
           temperature: float, compact: bool) -> Rollouts:
    """`sample` for B = P·G rows at once, from uniform numbers u (B, max_new); a prompt is computed only once.
    By inverse CDF, neither the order of rows nor dropping finished ones (`compact`) changes what is drawn."""
    (B, max_new), device, width = u.shape, u.device, max(map(len, prompts))
    # left padding: all rows write the same cache column; rotary positions being relative, no score changes
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)           # (P, T)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)
    cache = Cache(model.config, padding)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group)
    hidden = model.hidden(ids, cache)[rows, -1]                          # (B, d_model)
    cache.select(rows)
    alive = torch.arange(B, device=device)                               # output row of each row in the batch
    tokens = torch.full((B, max_new), pad, device=device)
    logprobs, entropy = torch.zeros(B, max_new, device=device), torch.zeros(B, max_new, device=device)
    lengths, finished = (torch.full((B,), max_new, device=device),
                         torch.zeros(B, dtype=torch.bool, device=device))
    for t in range(max_new):
        logp = model.logits(hidden / (temperature or 1.0)).log_softmax(-1)                        # (B, V)
        p = logp.exp()
        token = logp.argmax(-1) if temperature == 0 else inverse_cdf(p, u[alive, t])
        tokens[alive, t] = token
        logprobs[alive, t] = logp.gather(-1, token[:, None]).squeeze(-1)
        entropy[alive, t] = -(p * logp).sum(-1)
        ended = alive[(token == eos) & ~finished[alive]]
        lengths[ended], finished[ended] = t + 1, True
        left = (~finished[alive]).nonzero().squeeze(-1)
        if len(left) == 0 or t == max_new - 1:
            break
        if compact and len(left) <= .8 * len(alive):                     # copying the cache must be worth it
            alive, token = alive[left], token[left]
            cache.select(left)
        hidden = model.hidden(token[:, None], cache)[:, -1]
    past = torch.arange(max_new, device=device) >= lengths[:, None]      # what finished rows wrote meanwhile
    tokens[past], logprobs[past], entropy[past] = pad, 0, 0
    return Rollouts(*(x.cpu() for x in (tokens, lengths, finished, logprobs, entropy)))


# ---- scoring ---------------------------------------------------------------------------------------------

def pack(prompts: list[list[int]], completions: list[list[int]], pad: int,
         device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of prompt + completion, padded on the right: ids (B, T) and `target` (B, T), True at completion
    tokens. That comes from lengths, not from comparing ids with padding: EOS is a target like any other."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.tensor([p + c + [pad] * (width - len(p) - len(c)) for p, c in zip(prompts, completions)])
    column = torch.arange(width)
    start = torch.tensor([len(p) for p in prompts])[:, None]
    end = start + torch.tensor([len(c) for c in completions])[:, None]
    return ids.to(device), ((column >= start) & (column < end)).to(device)


def completion_logprobs(model: GPT, ids: Tensor, target: Tensor, temperature: float = 1.0,
                        cache: SharedPrompts | None = None) -> Tensor:
    """Log-probabilities (N,) of `pack`'s N targets, row after row, under softmax(logits / temperature)."""
    hidden = model.hidden(ids[:, :-1], cache)[target[:, 1:]]             # (N, d_model): t-1 predicts token t
    logits = model.logits(hidden / temperature)                          # the same, with fewer divisions
    return -F.cross_entropy(logits, ids[:, 1:][target[:, 1:]], reduction="none")


def shared_logprobs(model: GPT, prompts: SharedPrompts, rows: list[int], completions: list[list[int]],
                    pad: int, temperature: float = 1.0) -> Tensor:
    """The same (N,) as `completion_logprobs`, for completions of the shared prompts number `rows`."""
    ids, target = pack([[prompts.last[r]] for r in rows], completions, pad, model.head.weight.device)
    return completion_logprobs(model, ids, target, temperature, prompts.of(rows))


def micro_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `tokens` tokens after padding (at least one row)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


if __name__ == "__main__":
    from checkpoint import main
    from evaluate import ChatConfig, chat
    main(chat, ChatConfig)
