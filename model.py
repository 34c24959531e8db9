"""A small GPT in the OLMo-2 architecture, with a key-value cache, batched sampling and token log-probabilities.

    python model.py runs/base/8M.pt          prints what the checkpoint is, then answers prompts that you type

Axes: B rows, T positions, V vocabulary, L layers, H heads, D size of a head, P prompts, G rollouts per prompt.
Left out: dropout, biases, weight tying (OLMo-2 has none of them) and grouped-query attention (not needed at 1B).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ModelConfig:
    vocab_size: int = 512       # rows of the embedding and of the head
    n_vocab: int = 512          # ids in use; the rows above exist for alignment only and are never sampled nor scored
    context: int = 256          # longest sequence, tokens
    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 3
    d_ff: int = 256             # about 8/3 d_model: SwiGLU has three matrices where a plain MLP has two
    rope_theta: float = 10_000.0


# one dial: parameters at a vocabulary of 512                        d_model, n_layers, n_heads, d_ff
SIZES = {"0.3M": (64, 5, 2, 192), "0.5M": (96, 4, 3, 256), "1M": (128, 5, 4, 352), "3M": (192, 6, 6, 512),
         "10M": (320, 8, 5, 864), "30M": (512, 9, 8, 1376), "124M": (768, 16, 12, 2304)}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """weight · x / sqrt(mean(x²) + 1e-6), in fp32 under autocast too (Zhang and Sennrich 2019)."""
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split form (Su et al. 2021). x (B, H, T, D); cos, sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Cache:
    """Keys and values of everything decoded so far: two tensors (L, B·H, capacity, D), filled up to `length`.

    The decode step attends over the whole capacity, unfilled columns masked: a product with a contiguous tensor is
    several times faster on a CPU than one with a slice of it. The capacity therefore grows in small steps."""

    def __init__(self, c: ModelConfig, batch: int, capacity: int, device: torch.device):
        self.heads, self.length = c.n_heads, 0
        shape = (c.n_layers, batch * c.n_heads, capacity, c.d_model // c.n_heads)
        self.k, self.v = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def room(self, columns: int) -> int:
        """Make room for so many further columns; returns the capacity."""
        missing = self.length + columns - self.k.shape[2]
        if missing > 0:
            self.k, self.v = (F.pad(x, (0, 0, 0, max(16, missing))) for x in (self.k, self.v))
        return self.k.shape[2]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T, D) to a layer; returns all keys and values (B, H, capacity, D). `length` stays."""
        columns = slice(self.length, self.length + k.shape[2])
        every = tuple(x[layer].unflatten(0, (-1, self.heads)) for x in (self.k, self.v))
        every[0][:, :, columns], every[1][:, :, columns] = k, v
        return every

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows, in this order."""
        self.k, self.v = (x.unflatten(1, (-1, self.heads)).index_select(1, rows).flatten(1, 2)
                          for x in (self.k, self.v))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_heads = c.n_heads
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=False)      # queries, keys, values in one product
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.q_norm, self.k_norm, self.attention_norm, self.mlp_norm = (
            nn.Parameter(torch.ones(c.d_model)) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None,
                layer: int) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(x).split(d, dim=-1)
        q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)        # over all heads at once, before the split
        q, k, v = (y.view(B, T, self.n_heads, -1).transpose(1, 2) for y in (q, k, v))             # (B, H, T, D)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.store(layer, k, v)
        if cache is not None and T == 1:      # PyTorch's fused attention is slow for single queries on a CPU
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (B, -1))        # (B, H, 1, capacity)
            weights = (scores * q.shape[-1] ** -.5).masked_fill(~mask, -torch.inf).softmax(-1)
            y = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, -1))           # (B, H, 1, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        x = x + rms_norm(self.out(y.transpose(1, 2).reshape(B, T, d)), self.attention_norm)       # norm after, not before
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + rms_norm(self.down(F.silu(gate) * up), self.mlp_norm)


class GPT(nn.Module):
    def __init__(self, c: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.trunc_normal_(p, std=.02, a=-.06, b=.06, generator=generator)
        size = c.d_model // c.n_heads
        angles = torch.outer(torch.arange(c.context), c.rope_theta ** -(torch.arange(0, size, 2).float() / size))
        self.register_buffer("cos", angles.cos(), persistent=False)      # (context, D/2), fp32
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, ids: Tensor, cache: Cache | None = None, seen: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, d_model) of ids (B, T), which follow what the cache holds.

        `seen` (B, columns) is False at columns of the cache that hold padding; None: there is none. With a cache the
        mask is explicit, as the causal flag of PyTorch aligns top-left when there are more keys than queries."""
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        mask = None
        if cache is not None:
            capacity = cache.room(ids.shape[1])
            mask = torch.ones(ids.shape[1], capacity, dtype=torch.bool, device=ids.device).tril(start)   # (T, capacity)
            if seen is not None:                                         # a padding query still looks at itself
                known = F.pad(seen, (0, max(0, capacity - seen.shape[1])))[:, None, None, :capacity]
                itself = torch.eye(ids.shape[1], capacity, dtype=torch.bool, device=ids.device) if start == 0 else False
                mask = mask & known | itself                             # (B, 1, T, capacity)
        x = self.embed(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.cos[start:end], self.sin[start:end], mask, cache, layer)
        if cache is not None:
            cache.length = end
        return rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) -> (..., n_vocab): rows that no token uses do not take part anywhere."""
        return F.linear(hidden, self.head.weight[:self.config.n_vocab])

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of one token in a sequence of `length`: 2 per weight in a product, plus attention
        (Kaplan et al. 2020, appendix B). A backward pass costs twice that."""
        c = self.config
        weights = c.n_layers * (4 * c.d_model ** 2 + 3 * c.d_model * c.d_ff) + c.d_model * c.n_vocab
        return 2 * weights + 2 * c.n_layers * c.d_model * length       # two products over length/2 keys on average


# ---- sampling -----------------------------------------------------------------------------------------------------

@dataclass
class Rollouts:
    """B = P·G sampled completions; row p·G + g is rollout g of prompt p. Columns past a row's length are padding."""
    tokens: Tensor      # (B, max_new) int64, EOS included where it was generated
    lengths: Tensor     # (B,) number of generated tokens, EOS included
    finished: Tensor    # (B,) bool: generated EOS within max_new tokens
    logprobs: Tensor    # (B, max_new) log-probability of each token under the sampling distribution
    entropy: Tensor     # (B, max_new) entropy of that distribution, nats

    def completions(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]


@torch.inference_mode()
def sample(model: GPT, prompts: list[list[int]], group: int, max_new: int, eos: int, pad: int,
           generator: torch.Generator, temperature: float = 1.0, compact: bool = True, block: int = 1024) -> Rollouts:
    """Sample `group` completions of every prompt from softmax(logits / temperature); temperature 0 is greedy.

    Every prompt is computed once and its cache repeated for the group; finished rows leave the batch. Each token is
    drawn by inverse CDF from a uniform number u[row, t] drawn beforehand, so that neither the order of rows, nor
    blocks, nor compaction changes what is sampled. At most `block` rows are decoded at a time, which bounds memory.
    Raises ValueError if a prompt is empty or leaves no room for max_new tokens in the context."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0 or longest + max_new > model.config.context:
        raise ValueError(f"prompts must have 1 to {model.config.context - max_new} tokens (context "
                         f"{model.config.context}, of which {max_new} are for the answer), found up to {longest}")
    device = model.head.weight.device
    rows = len(prompts) * group
    u = torch.rand(rows, max_new, generator=generator)                   # on the CPU: the same on every device
    out = Rollouts(torch.full((rows, max_new), pad), torch.full((rows,), max_new), torch.zeros(rows, dtype=torch.bool),
                   torch.zeros(rows, max_new), torch.zeros(rows, max_new))
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    per_block = max(1, block // group)
    for i in range(0, len(prompts), per_block):
        chosen = by_length[i:i + per_block]
        index = torch.tensor([p * group + g for p in chosen for g in range(group)])
        part = sample_block(model, [prompts[p] for p in chosen], group, max_new, eos, pad, u[index].to(device),
                            temperature, compact)
        for name, value in vars(part).items():
            getattr(out, name)[index] = value.cpu()
    return out


def sample_block(model: GPT, prompts: list[list[int]], group: int, max_new: int, eos: int, pad: int, u: Tensor,
                 temperature: float, compact: bool) -> Rollouts:
    """`sample` for prompts that fit into memory at once; u (B, max_new) are the uniform numbers."""
    device, width = u.device, max(map(len, prompts))
    # Prompts are padded on the left, so that all rows write the same column of the cache. Rotary positions are
    # relative: counting a row's positions from its padding on changes no attention score.
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)            # (P, T)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)
    seen = torch.arange(width + max_new, device=device) >= padding[:, None] if padding.any() else None
    cache = Cache(model.config, len(prompts), width, device)
    hidden = model.hidden(ids, cache, seen)[:, -1]                       # (P, d_model)

    rows = torch.arange(len(prompts), device=device).repeat_interleave(group)
    hidden, seen = hidden[rows], seen if seen is None else seen[rows]
    cache.select(rows)
    B = len(rows)
    alive = torch.arange(B, device=device)                               # row of the output that each live row fills
    out = Rollouts(torch.full((B, max_new), pad, device=device), torch.full((B,), max_new, device=device),
                   torch.zeros(B, dtype=torch.bool, device=device), torch.zeros(B, max_new, device=device),
                   torch.zeros(B, max_new, device=device))
    for t in range(max_new):
        logits = model.logits(hidden).float() / (temperature or 1.0)     # (B, V)
        logp = logits.log_softmax(-1)
        p = logp.exp()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            cdf = p.cumsum(-1)                                           # right=True: the first entry above u·total
            token = torch.searchsorted(cdf, u[alive, t, None] * cdf[:, -1:], right=True).squeeze(-1)
            token = token.clamp_(max=logits.shape[-1] - 1)
        finished = token == eos
        out.tokens[alive, t] = token
        out.logprobs[alive, t] = logp.gather(-1, token[:, None]).squeeze(-1)
        out.entropy[alive, t] = -(p * logp).sum(-1)
        # a row that has finished but is still in the batch writes on past its end: cut off below
        first = finished & ~out.finished[alive]
        out.lengths[alive[first]] = t + 1
        out.finished[alive[first]] = True
        done = out.finished[alive]
        left = int((~done).sum())
        if left == 0 or t == max_new - 1:
            break
        if compact and left <= .8 * len(alive):                          # copying the cache is worth it now and then
            keep = (~done).nonzero().squeeze(-1)
            alive, token, seen = alive[keep], token[keep], seen if seen is None else seen[keep]
            cache.select(keep)
        hidden = model.hidden(token[:, None], cache, seen)[:, -1]
    past = torch.arange(max_new, device=device) >= out.lengths[:, None]
    out.tokens[past], out.logprobs[past], out.entropy[past] = pad, 0, 0
    return out


# ---- scoring ------------------------------------------------------------------------------------------------------

def pack(prompts: list[list[int]], completions: list[list[int]], pad: int,
         device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of prompt + completion, padded on the right: ids (B, T) and `target` (B, T), True exactly at completion
    tokens. The mask comes from lengths, never from comparing ids with padding, so EOS is a target like any other."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.tensor([p + c + [pad] * (width - len(p) - len(c)) for p, c in zip(prompts, completions)])
    column = torch.arange(width)
    start = torch.tensor([len(p) for p in prompts])[:, None]
    end = start + torch.tensor([len(c) for c in completions])[:, None]
    return ids.to(device), ((column >= start) & (column < end)).to(device)


def completion_logprobs(model: GPT, ids: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (N,) of the N target tokens, row after row, under softmax(logits / temperature).

    ids, target (B, T) as made by `pack`. The head runs at the N positions only."""
    hidden = model.hidden(ids[:, :-1])[target[:, 1:]]                    # (N, d_model): position t-1 predicts token t
    logits = model.logits(hidden).float() / temperature
    return -F.cross_entropy(logits, ids[:, 1:][target[:, 1:]], reduction="none")


def micro_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Row numbers, longest first, cut into batches of at most `tokens` tokens after padding (one row at least)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# ---- what a checkpoint is, and a prompt to try it -----------------------------------------------------------------

@dataclass
class Config:
    checkpoint: tuple[str, ...]     # file to look at
    temperature: float = 0.6        # 0 = always the most probable token
    max_new: int = 64               # longest answer, tokens
    seed: int = 0                   # of the sampling
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # CPU threads, 0 = all cores


def chat(c: Config) -> None:
    """Print what the checkpoint is; answer every line typed with the model's continuation of that line."""
    from checkpoint import (  # here, since checkpoint.py imports this file
        generator,
        load_model,
        require,
        setup,
    )
    require(len(c.checkpoint) == 1, "one checkpoint, please")
    require(c.temperature >= 0, f"--temperature {c.temperature}: must not be negative")
    model, tokenizer, content = load_model(c.checkpoint[0], setup(c.device, c.threads))
    m = model.config
    n = sum(p.numel() for p in model.parameters())
    print(f"{c.checkpoint[0]}: {n:,} parameters ({n - 2 * m.vocab_size * m.d_model:,} without embedding and head)\n"
          f"  {m.n_layers} layers, width {m.d_model}, {m.n_heads} heads, feed-forward {m.d_ff}, context {m.context}, "
          f"vocabulary {m.n_vocab}\n  lineage:")
    for stage in content["lineage"]:
        print(f"    {stage['script']}: {stage['tokens']:,} tokens, {stage['updates']} updates, "
              f"{stage['flops']:.2e} FLOPs, {stage['seconds'] / 60:.1f} min, seed {stage['config']['seed']}")
    print('  type a question, such as "Nora has 37 shells. Nora finds 48. How many shells?" (end: Ctrl-D)')
    for turn in range(1_000_000):
        try:
            line = input("> ")
        except EOFError:
            return print()
        try:
            out = sample(model, [tokenizer.encode(line + "\n")], 1, c.max_new, tokenizer.eos, tokenizer.pad,
                         generator(c.seed, "chat", turn), c.temperature)
        except ValueError as error:
            print(error)
            continue
        print(tokenizer.decode(out.completions()[0]).replace("<|endoftext|>", ""))


if __name__ == "__main__":
    from checkpoint import main
    main(chat, Config)
