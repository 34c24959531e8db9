"""A small GPT in the OLMo-2 architecture: model, sampling, scoring. It imports PyTorch and nothing of ours.

Axes: B rows, T positions, V vocabulary, L layers, H heads, D head size, P prompts, G rollouts per prompt.
Left out: dropout, biases and weight tying, as OLMo-2 has none of them.

A class of your own takes the place of GPT (define it at the end of this file, then `GPT = Mine`) if it offers
    GPT(config, generator=None) an nn.Module, its initial weights drawn from the generator
    config, device              its ModelConfig (context and n_vocab are read by others), its device
    hidden(ids, cache=None)     final states (B, T, d) of ids (B, T), which follow the tokens in the cache
    logits(hidden)              (..., d) -> (..., n_vocab), in fp32 under autocast too; forward(ids): both
    flops_per_token(length)     forward FLOPs of a token in a sequence of that length, for the log
    decode_rows, set_memory(c)  rows sampled at once; takes the options of a run about memory
    given a cache: T new positions stand in its columns cache.columns(T), rows being padded on the left by
    cache.padding (B,); the mask is visible(cache, T); layer i attends to cache.store(i, k, v), k and v being
    (B, H, T, D) with H = n_kv_heads and D = d_model / n_heads; after the last layer, cache.length += T
"""
import copy
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as compute_twice

Ids = list[list[int]]           # token ids, a list for each row
KV = tuple[Tensor, Tensor]      # keys and values of a layer, (B, H, T, D) each
Cached = typing.Union["Cache", "SharedPrompts", None]


@dataclass
class ModelConfig:
    vocab_size: int = 512       # rows of the embedding and of the head
    n_vocab: int = 512          # token ids in use; rows beyond them pad the matrix for alignment
    context: int = 256          # longest sequence, tokens
    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 3
    d_ff: int = 256             # about 8/3 d_model: SwiGLU has three matrices where a plain MLP has two
    rope_theta: float = 10_000.0
    n_kv_heads: int = 0         # key/value heads: 0 = as many as n_heads, fewer = grouped-query attention

    def __post_init__(self) -> None:
        self.n_kv_heads = self.n_kv_heads or self.n_heads

    @property
    def kv_width(self) -> int:
        """Width of the keys of a position, and of its values."""
        return self.d_model // self.n_heads * self.n_kv_heads


# one dial: parameters at a vocabulary of 512 -> d_model, n_layers, n_heads, d_ff
SIZES = {
    "0.3M": (64, 5, 2, 192),
    "0.5M": (96, 4, 3, 256),
    "1M": (128, 5, 4, 352),
    "3M": (192, 6, 6, 512),
    "10M": (320, 8, 5, 864),
    "30M": (512, 9, 8, 1376),
    "124M": (768, 16, 12, 2304),
}


# ---- the Transformer -------------------------------------------------------------------------------------
def precision(model: "GPT") -> torch.autocast:
    """On a GPU and from a width of 512 on, matrix products in bf16, the rest in fp32, weights and their
    gradients too: in narrower models the casts cost more than the products gain. The model itself enters it,
    so that sampling and scoring agree."""
    wide = model.config.d_model >= 512
    return torch.autocast("cuda", torch.bfloat16, enabled=wide and model.device.type == "cuda")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight · x / sqrt(mean(x²) + 1e-6), in fp32 under autocast too (Zhang and Sennrich 2019)."""
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6)


def rotary_tables(context: int, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (context, D) of position · theta^(−2i/D), twice; the first sines negative."""
    exponents = torch.arange(0, size, 2).float() / size
    frequencies = theta ** -exponents
    angles = torch.outer(torch.arange(context), frequencies)             # (context, D/2)
    cos = angles.cos()
    sin = angles.sin()
    cos = torch.cat((cos, cos), dim=1)
    sin = torch.cat((-sin, sin), dim=1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split form (Su et al. 2021): element i turns with i + D/2. x (B, H, T, D); cos, sin (T, D),
    the first half of the sines negative."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, dims=-1), sin)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D) v, (B, H, T, D), where `mask` (B, 1, T, keys) is True; without a mask, causal."""
    T = q.shape[2]
    on_cpu = q.device.type == "cpu"
    compiling = on_cpu and torch.compiler.is_compiling()
    if mask is None and compiling:
        return causal_products(q, k, v)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cuda" or on_cpu and T > 1 and not compiling:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # the fused kernel of a CPU is slow for a single query, and slower than compiled products; that of Apple's
    # GPUs is wrong with masks like ours (PyTorch issues 174861, 182285, 184180)
    return by_products(q, k, v, mask)


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same of a mask, with one product for the scores and one for the values."""
    heads = q.shape[:2]                                                  # B, H
    scale = q.shape[-1] ** -.5
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    scores = scores.unflatten(0, heads) * scale                          # (B, H, T, keys)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    y = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1))
    return y.unflatten(0, heads)                                         # (B, H, T, D)


QUERIES = 64


def causal_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without a mask. A length known to be a multiple of QUERIES: a block of queries at a time with
    the keys up to its last one, so that nearly half of the scores are left out. Any other length: at once."""
    # imported here: plain runs do without its sympy. A plain condition would fix a length that varies
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    T = q.shape[2]
    position = torch.arange(T, device=q.device)
    if not statically_known_true(T % QUERIES == 0):
        return by_products(q, k, v, position <= position[:, None])
    parts = []
    for start in range(0, T, QUERIES):
        end = start + QUERIES
        known = position[:end] <= position[start:end, None]              # (QUERIES, end)
        parts.append(by_products(q[:, :, start:end], k[:, :, :end], v[:, :, :end], known))
    return torch.cat(parts, dim=2)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_size = c.d_model // c.n_heads
        self.widths = (c.d_model, c.kv_width, c.kv_width)        # of queries, keys, values: one product
        self.qkv = nn.Linear(c.d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.q_norm = nn.Parameter(torch.ones(c.d_model))
        self.k_norm = nn.Parameter(torch.ones(c.kv_width))
        self.attention_norm = nn.Parameter(torch.ones(c.d_model))
        self.mlp_norm = nn.Parameter(torch.ones(c.d_model))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                mask: Tensor | None, cache: Cached, layer: int) -> Tensor:
        """x + norm(attention(x)), then x + norm(SwiGLU(x)): (B, T, d_model), norms after (OLMo-2)."""
        attended = self.attend(x, cos, sin, mask, cache, layer)
        x = x + rms_norm(attended, self.attention_norm)
        return x + rms_norm(self.mlp(x), self.mlp_norm)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor,
               mask: Tensor | None, cache: Cached, layer: int) -> Tensor:
        """Multi-head attention (B, T, d_model). Queries and keys are normed over the whole width, then split
        into heads and rotated by cos, sin (T, D). A cache stores this layer's keys and values and returns all
        there are, which queries may see where `mask` (B, 1, T, keys) is True; without a cache, attention is
        causal."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q = rms_norm(q, self.q_norm)             # over all heads
        k = rms_norm(k, self.k_norm)

        q = rotate(self.heads(q), cos, sin).to(v.dtype)                  # (B, H, T, D)
        k = rotate(self.heads(k), cos, sin).to(v.dtype)
        v = self.heads(v)

        if cache is not None:
            k, v = cache.store(layer, k, v)
        repeats = q.shape[1] // k.shape[1]       # heads of queries to a head of keys and values
        if repeats > 1:
            k = k.repeat_interleave(repeats, dim=1)
            v = v.repeat_interleave(repeats, dim=1)

        y = attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) -> (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU (Shazeer 2020): (B, T, d_model)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GPT(nn.Module):
    def __init__(self, c: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c
        self.recompute = False                   # activations again in the backward pass: less memory
        self.decode_rows = 1024                  # rows sampled at once
        self.compiled = False                    # trained in torch.compile's code: see `compilable`
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        matrices = (p for p in self.parameters() if p.dim() == 2)
        for p in matrices:
            nn.init.trunc_normal_(p, std=.02, a=-.06, b=.06, generator=generator)
        size = c.d_model // c.n_heads
        cos, sin = rotary_tables(c.context, size, c.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def hidden(self, ids: Tensor, cache: Cached = None) -> Tensor:
        """Final hidden states (B, T, d_model) of ids (B, T), which follow the tokens in the cache."""
        T = ids.shape[1]
        columns = cache.columns(T) if cache else slice(T)
        mask = visible(cache, T) if cache else None
        cos = self.cos[columns]
        sin = self.sin[columns]

        x = F.embedding(ids, self.embed.weight)  # in nn.Embedding a float makes torch.compile trace twice
        recompute = self.recompute and torch.is_grad_enabled()
        with precision(self):
            for layer, block in enumerate(self.blocks):
                inputs = (x, cos, sin, mask, cache, layer)
                if recompute:
                    x = compute_twice(block, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(*inputs)
        if cache:
            cache.length += T
        return rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) -> (..., n_vocab): rows that no token uses take no part. Always in fp32: sampled
        and scored logits must agree, and bf16 numbers near 20 lie .125 apart."""
        weight = self.head.weight[:self.config.n_vocab]
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, weight.float())

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def set_memory(self, c: typing.Any) -> None:
        """Take the options --recompute, --decode-rows and --freeze-embeddings from a Config."""
        self.recompute = c.recompute
        self.decode_rows = c.decode_rows
        self.embed.requires_grad_(not c.freeze_embeddings)
        self.head.requires_grad_(not c.freeze_embeddings)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token in a sequence of `length` (Kaplan et al. 2020); backward: twice that."""
        c = self.config
        projections = 2 * c.d_model ** 2 + 2 * c.d_model * c.kv_width
        mlp = 3 * c.d_model * c.d_ff
        head = c.d_model * c.n_vocab
        weights = c.n_layers * (projections + mlp) + head
        scores = c.n_layers * c.d_model * length     # of two products, with length/2 keys on average
        return 2 * weights + 2 * scores


# ---- torch.compile ---------------------------------------------------------------------------------------
def compilable(shapes_vary: bool) -> Callable:
    """Decorates a function of (model, ids, ...): with gradients and a model whose `compiled` is set it runs
    in torch.compile's code, equal within rounding; made at the first call, once for all shapes if they vary
    (but for a single row or column, which would have a code of its own: it runs as it is)."""
    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def chosen(model: GPT, ids: Tensor, *inputs: typing.Any, **options: typing.Any) -> Tensor:
            training = torch.is_grad_enabled() and getattr(model, "compiled", False)
            one_code = not shapes_vary or min(ids.shape) > 1
            code = fast_code(function, shapes_vary) if training and one_code else function
            return code(model, ids, *inputs, **options)
        return chosen
    return decorate


@cache
def fast_code(function: Callable, shapes_vary: bool) -> Callable:
    return torch.compile(function, dynamic=shapes_vary)


# ---- sampling --------------------------------------------------------------------------------------------
class Cache:
    """Keys and values decoded so far, filled up to `length`. No query sees the first `padding` (B,) columns
    of a row. Decoding attends over the whole capacity, unfilled columns masked: CPUs multiply contiguous
    tensors several times faster than slices. So on a CPU it grows in small steps, one tensor after the other:
    fresh memory is slow. `length` is a tensor (1,) because a CUDA graph repeats the numbers of Python, but
    reads tensors."""

    def __init__(self, c: ModelConfig, padding: Tensor, capacity: int):
        self.config = c
        self.padding = padding
        self.capacity = capacity
        self.length = torch.zeros(1, dtype=torch.long, device=padding.device)
        self.keys_values: list[Tensor] = []      # of layer 0, of layer 1, ...: (B·H, capacity, D)

    def keys(self, T: int) -> int:
        """How many keys T new positions have before them, their own and unfilled ones included."""
        return self.capacity

    def columns(self, T: int) -> Tensor:
        """The next T columns (T,), where new positions are stored."""
        if T == 1:
            return self.length
        return self.length + torch.arange(T, device=self.length.device)

    def grow(self, capacity: int) -> None:
        """Make room for so many columns, and for a few more."""
        missing = capacity - self.capacity
        if missing > 0:
            rows, _, size = self.keys_values[0].shape
            new = self.keys_values[0].new_zeros(rows, max(16, missing), size)
            for i, old in enumerate(self.keys_values):
                self.keys_values[i] = torch.cat((old, new), dim=1)
            self.capacity += new.shape[1]

    def store(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Append a layer's k, v (B, H, T, D); returns all of them (B, H, capacity, D). GPT.hidden advances
        `length`, after the last layer."""
        B, H, T, D = k.shape
        if len(self.keys_values) == 2 * layer:   # its first keys, which have the dtype of products
            empty = k.new_zeros(B * H, self.capacity, D)
            self.keys_values += [empty, empty.clone()]
        all_k, all_v = (x.unflatten(0, (B, H)) for x in self.keys_values[2 * layer:2 * layer + 2])
        columns = self.columns(T)
        if k.device.type == "cpu":               # a slice is faster, but must know the number
            columns = slice(int(columns[0]), int(columns[0]) + T)
        all_k[:, :, columns] = k
        all_v[:, :, columns] = v
        return all_k, all_v

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows, in this order."""
        self.padding = self.padding[rows]
        for i, old in enumerate(self.keys_values):
            by_row = old.unflatten(0, (-1, self.config.n_kv_heads))      # (B, H, capacity, D)
            self.keys_values[i] = by_row.index_select(0, rows).flatten(0, 1)


def visible(cache: Cached, T: int) -> Tensor:
    """Mask (B, 1, T, keys) of T new positions over all keys of a cache: no later key, and no padding, except
    that a padding position attends to itself. PyTorch's causal flag would align top-left."""
    key = torch.arange(cache.keys(T), device=cache.padding.device)
    query = cache.columns(T)
    known = key >= cache.padding[:, None, None, None]                    # (B, 1, 1, keys)
    earlier = key <= query[:, None]                                      # (T, keys)
    itself = key == query[:, None]
    return earlier & known | itself


class Rollouts(typing.NamedTuple):
    """B = P·G sampled completions, row p·G + g being rollout g of prompt p, padded beyond its length."""
    tokens: Tensor      # (B, max_new) int64, EOS included where it was generated
    lengths: Tensor     # (B,) number of generated tokens, EOS included
    finished: Tensor    # (B,) bool: generated EOS within max_new tokens
    logprobs: Tensor    # (B, max_new) log-probability of each token under the sampling distribution
    entropy: Tensor     # (B, max_new) entropy of that distribution, nats

    def completions(self) -> Ids:
        rows = zip(self.tokens.tolist(), self.lengths.tolist())
        return [row[:length] for row, length in rows]


def sample(model: GPT, prompts: Ids, group: int,
           max_new: int, eos: int, pad: int,
           generator: torch.Generator, temperature: float = 1.0,
           compact: bool = True) -> Rollouts:
    """Sample `group` completions of every prompt from softmax(logits / temperature), 0: greedy; on the CPU.
    The uniform numbers behind a row do not depend on the rows decoded with it. ValueError if a prompt is
    empty or leaves no room for max_new tokens."""
    u = uniform(model, (len(prompts), group, max_new), generator)
    return decode_all(model, prompts, u, eos, pad, temperature, compact)


def uniform(model: GPT, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) for tokens, on the CPU: the same for every device. In fp64 for large
    vocabularies: fp32 is too coarse for their rare tokens (Apple's GPUs have nothing finer)."""
    fine = model.config.n_vocab >= 4096 and model.device.type != "mps"
    return torch.rand(shape, generator=generator, dtype=torch.float64 if fine else torch.float32)


def without_gradients(device: torch.device) -> typing.ContextManager:
    """inference_mode is faster for few rows; but in it autocast converts all weights anew at every token."""
    return torch.no_grad() if device.type == "cuda" else torch.inference_mode()


def decode_all(model: GPT, prompts: Ids, u: Tensor,
               eos: int, pad: int,
               temperature: float, compact: bool = True) -> Rollouts:
    """`sample` with uniform numbers u (P, G, max_new) for its tokens. Prompts of similar length are decoded
    together, model.decode_rows rows at a time to bound memory."""
    _, group, max_new = u.shape
    lengths = [len(prompt) for prompt in prompts]
    room = model.config.context - max_new
    if min(lengths) == 0 or max(lengths) > room:
        raise ValueError(f"prompts must have 1 to {room} tokens (context {model.config.context}, of which "
                         f"{max_new} are for the answer), found up to {max(lengths)}")

    order = sorted(range(len(prompts)), key=lambda p: lengths[p])
    at_once = max(1, model.decode_rows // group)                         # prompts
    parts = []
    for i in range(0, len(order), at_once):
        chosen = order[i:i + at_once]
        uniform = u[chosen].to(model.device)
        some = [prompts[p] for p in chosen]
        with without_gradients(model.device), precision(model):
            parts.append(decode(model, some, uniform, eos, pad, temperature, compact))
    return together(parts, order)


def together(parts: list[Rollouts], order: list[int]) -> Rollouts:
    """One Rollouts in the order of the prompts; the i-th group of the parts belongs to prompt order[i]."""
    back = torch.tensor(order).argsort()
    columns = []
    for tensors in zip(*parts):
        groups = torch.cat(tensors).unflatten(0, (len(order), -1))       # (P, G, ...)
        columns.append(groups[back].flatten(0, 1))
    return Rollouts(*columns)


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """A token per row (B,) from probabilities p (B, V) and uniform numbers u (B,) in [0, 1): the first at
    which the row's running sum, of u's precision, exceeds u times its total: never one of probability 0."""
    cdf = p.cumsum(-1, dtype=u.dtype)
    target = u[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return token.clamp_(max=p.shape[-1] - 1)     # should rounding lift u · total to the total


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device, without waiting for a GPU (Apple's may read it when it is gone)."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def pad_left(prompts: Ids, width: int, pad: int,
             device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids (P, width), number of padding columns (P,)) of prompts of up to `width` tokens."""
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[pad] * n + prompt for n, prompt in zip(padding, prompts)]
    ids = torch.tensor(rows)
    columns = torch.tensor(padding)
    return moved(ids, device), moved(columns, device)


def recorded(step: Callable, device: torch.device) -> Callable:
    """`step` as a CUDA graph: all its kernels in one launch, on the memory that they had while recorded."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        step()
    return graph.replay


def decode(model: GPT, prompts: Ids, u: Tensor,
           eos: int, pad: int,
           temperature: float, compact: bool) -> Rollouts:
    """The rows of all prompts at once, from uniform numbers u (P, G, max_new); a prompt is computed once.
    By inverse CDF, neither the order of rows nor dropping finished ones (`compact`) changes the tokens.

    Tokens come in stretches, after each of which finished rows are dropped: of 1 token on a CPU, of 16 on a
    GPU. Within a stretch nothing waits for the GPU and no tensor changes its shape or its place."""
    P, group, max_new = u.shape
    B = P * group
    device = u.device
    on_cpu = device.type == "cpu"
    u = u.flatten(0, 1)                                                  # (B, max_new)

    # left padding: all rows write the same cache column; rotary positions being relative, no score changes
    longest = max(map(len, prompts))
    ids, padding = pad_left(prompts, longest, pad, device)               # (P, T)
    whole = 16 * -(-(longest + max_new) // 16)
    capacity = longest + 16 if on_cpu else whole
    cache = Cache(model.config, padding, capacity)
    rows = torch.arange(P, device=device).repeat_interleave(group, output_size=B)
    hidden = model.hidden(ids, cache)[rows, -1]                          # (B, d_model)
    cache.select(rows)

    tokens = torch.full((B, max_new), pad, device=device)
    logprobs = torch.zeros(B, max_new, device=device)
    entropy = torch.zeros(B, max_new, device=device)
    alive = torch.arange(B, device=device)                               # output row of each row in the batch
    at = torch.zeros(1, dtype=torch.long, device=device)                 # the next column of the output

    def choose(hidden: Tensor) -> Tensor:
        """Sample a token (rows,) from final states (rows, d_model) and write it down."""
        logits = model.logits(hidden / (temperature or 1.0))             # logits / temperature, cheaper
        logp = logits.log_softmax(-1)                                    # (rows, V)
        p = logp.exp()
        if temperature == 0:
            token = logp.argmax(-1)
        else:
            token = inverse_cdf(p, u[alive, at])
        tokens[alive, at] = token
        chosen = logp.gather(-1, token[:, None])                         # (rows, 1)
        logprobs[alive, at] = chosen.squeeze(-1)
        entropy[alive, at] = -(p * logp).sum(-1)
        at.add_(1)
        return token

    def step() -> None:
        """One more token of every row, in the place of the last."""
        hidden = model.hidden(last[:, None], cache)[:, -1]
        last.copy_(choose(hidden))

    last = choose(hidden)                                                # (rows,)
    running = last != eos
    repeat = step
    known = 1                                                            # columns of the output
    while known < max_new:
        left = running.nonzero().squeeze(-1)                             # the one wait of a stretch
        if len(left) == 0:
            break
        if compact and len(left) <= .8 * len(alive):                     # copying the cache must be worth it
            alive = alive[left]
            last = last[left]
            running = running[left]
            cache.select(left)
            repeat = step                                                # a new shape

        stretch = min(1 if on_cpu else 16, max_new - known)
        if on_cpu:
            cache.grow(longest + known)
        for i in range(stretch):
            repeat()
            if repeat is step and device.type == "cuda" and i + 1 < stretch:
                repeat = recorded(step, device)                          # after a first run, which allocates
        new = tokens[alive, known:known + stretch]
        running = running & (new != eos).all(1)
        known += stretch

    return finished_at_eos(tokens, logprobs, entropy, eos, pad)


def finished_at_eos(tokens: Tensor, logprobs: Tensor, entropy: Tensor,
                    eos: int, pad: int) -> Rollouts:
    """Rows end at their first EOS, whatever they went on to write; on the CPU."""
    ended = tokens == eos
    finished = ended.any(1)
    max_new = tokens.shape[1]
    first_eos = ended.int().argmax(1)
    lengths = torch.where(finished, first_eos + 1, max_new)
    past = torch.arange(max_new, device=tokens.device) >= lengths[:, None]
    tokens = tokens.masked_fill(past, pad)
    logprobs = logprobs.masked_fill(past, 0)
    entropy = entropy.masked_fill(past, 0)
    results = (tokens, lengths, finished, logprobs, entropy)
    return Rollouts(*(x.cpu() for x in results))


# ---- scoring ---------------------------------------------------------------------------------------------
def pack(prompts: Ids, completions: Ids, pad: int,
         device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T): rows of prompt + completion but for their last token, padded on the right; at (N,): the
    places in them, laid flat, from which the N completion tokens are predicted; wanted (N,): those tokens.
    Places come from lengths, not from comparing tokens with padding: EOS is a target like any other."""
    rows = [a + b for a, b in zip(prompts, completions)]
    width = max(map(len, rows))
    padded = [row[:-1] + [pad] * (width - len(row)) for row in rows]
    ids = torch.tensor(padded, dtype=torch.long)
    wanted = torch.tensor([token for completion in completions for token in completion], dtype=torch.long)

    start = torch.tensor(list(map(len, prompts)))
    end = torch.tensor(list(map(len, rows)))
    column = torch.arange(1, width)
    target = (column >= start[:, None]) & (column < end[:, None])
    at = target.flatten().nonzero().squeeze(1)                           # on the CPU, where it costs no wait
    return moved(ids, device), moved(at, device), moved(wanted, device)


def target_logits(model: GPT, ids: Tensor, at: Tensor,
                  temperature: float = 1.0, cache: Cached = None) -> Tensor:
    """Logits / temperature (N, V) from which `pack`'s N completion tokens are predicted."""
    hidden = model.hidden(ids, cache).flatten(0, 1)
    return model.logits(hidden.index_select(0, at) / temperature)        # divided before: fewer divisions


@compilable(shapes_vary=True)
def completion_logprobs(model: GPT, ids: Tensor, at: Tensor, wanted: Tensor,
                        temperature: float = 1.0, cache: Cached = None) -> Tensor:
    """Log-probabilities (N,) of `pack`'s N completion tokens, under softmax(logits / temperature)."""
    logits = target_logits(model, ids, at, temperature, cache)
    return -F.cross_entropy(logits, wanted, reduction="none")


def row_logprobs(model: GPT, prompts: Ids, completions: Ids,
                 pad: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (N,) of the completions' tokens, row after row, each after its prompt."""
    inputs = pack(prompts, completions, pad, model.device)
    return completion_logprobs(model, *inputs, temperature)


def tokens_at_once(asked: int, device: torch.device) -> int:
    """Tokens of a micro-batch: `asked`, or (0) as many as fit into a CPU's caches, or keep a GPU busy."""
    return asked or (16_384 if device.type == "cuda" else 2_048)


def micro_batches(lengths: list[int], tokens: int,
                  device: torch.device) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `tokens` tokens after padding (at least one row)."""
    tokens = tokens_at_once(tokens, device)
    batches: list[list[int]] = []
    width = 0                                    # of the newest batch: its first row is its longest
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for row in longest_first:
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


def packed(prompts: Ids, completions: Ids, pad: int,
           tokens: int, device: torch.device) -> Iterator[tuple]:
    """(row numbers, ids, at, wanted) of micro-batches of up to `tokens` tokens, as `pack` makes them."""
    lengths = [len(a) + len(b) for a, b in zip(prompts, completions)]
    for rows in micro_batches(lengths, tokens, device):
        chosen = [prompts[r] for r in rows]
        following = [completions[r] for r in rows]
        yield rows, *pack(chosen, following, pad, device)


# ---- a prompt computed once for its group ----------------------------------------------------------------
class SharedPrompts:
    """Keys and values of P prompts, computed once, to which the G completions of each prompt attend in
    training. The graph is cut there: gradients of all completions gather in `keys_values`, and `backward`
    propagates them through the prompts once."""

    def __init__(self, model: GPT, prompts: Ids, pad: int):
        bodies = [p[:-1] for p in prompts]                               # all but the last token
        self.last = [p[-1] for p in prompts]                             # the token each completion follows
        width = max(1, max(map(len, bodies)))
        ids, self.padding = pad_left(bodies, width, pad, model.device)
        self.length = 0
        self.prompt_of_row: Tensor | None = None
        self.keys_values: list[Tensor] | None = None
        self.graph: list[Tensor] = []            # keys, values of layer 0, of layer 1, ...: (P, H, T, D)
        model.hidden(ids, self)
        self.keys_values = [x.detach().requires_grad_() for x in self.graph]

    def of(self, prompt_of_row: list[int]) -> "SharedPrompts":
        """The cache of a batch whose row i follows prompt number prompt_of_row[i]."""
        view = copy.copy(self)
        view.prompt_of_row = moved(torch.tensor(prompt_of_row), self.padding.device)
        view.padding = self.padding[view.prompt_of_row]
        # here, not in compiled code, whose backward pass would add one number at a time
        view.keys_values = [x.index_select(0, view.prompt_of_row) for x in self.keys_values]
        return view

    def keys(self, T: int) -> int:
        return self.length + T

    def columns(self, T: int) -> Tensor:
        return self.length + torch.arange(T, device=self.padding.device)

    def store(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Of the prompts themselves: keep k, v. Of a batch of completions: append them to their prompts'."""
        if self.prompt_of_row is None:
            if self.keys_values is None:         # else `recompute` computes the prompts once more
                self.graph += (k, v)
            return k, v
        prompt_k, prompt_v = self.keys_values[2 * layer:2 * layer + 2]
        all_k = torch.cat((prompt_k, k), dim=2)
        all_v = torch.cat((prompt_v, v), dim=2)
        return all_k, all_v

    def backward(self) -> None:
        gradients = [x.grad for x in self.keys_values]
        torch.autograd.backward(self.graph, gradients)


def shared_logprobs(model: GPT, prompts: SharedPrompts,
                    prompt_of_row: list[int], completions: Ids,
                    pad: int, temperature: float = 1.0) -> Tensor:
    """The same (N,) as `completion_logprobs`, for completions of the shared prompts with these numbers."""
    last = [[prompts.last[p]] for p in prompt_of_row]
    inputs = pack(last, completions, pad, model.device)
    return completion_logprobs(model, *inputs, temperature, prompts.of(prompt_of_row))
