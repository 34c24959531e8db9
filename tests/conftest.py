"""Small models whose behaviour is known, and an independent way to compute log-probabilities.

`make_gpt` is a random tiny model made lively enough that mistakes show: gains differ from 1 and logits spread
over about one nat. `bigram` is a GPT whose next-token distribution is a table given by the test. They are on
the CPU, or in a test marked @on_every_device on each device in turn.
"""
import copy
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import generator
from data.tokenizer import PATTERN, Tokenizer
from model import GPT, ModelConfig
from simulated_cuda import simulated_cuda

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process per core for a whole folder of tests, none besides this one for a file or a test."""
    return os.cpu_count() if any(Path(arg).is_dir() for arg in config.args) else 0


REAL = ["gpu"] * torch.cuda.is_available()
on_every_device = pytest.mark.parametrize("device", ["cpu", "simulated", *REAL], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of the test's models."""
    kind = getattr(request, "param", "cpu")
    with simulated_cuda() if kind == "simulated" else nullcontext():
        yield torch.device("cpu" if kind == "cpu" else "cuda:0")


def on_cpu(model: GPT) -> GPT:
    """A copy on the CPU, to compare with."""
    return copy.deepcopy(model).cpu()


@pytest.fixture
def make_gpt(device):
    """make_gpt(seed=0, **config) -> GPT of 2 layers, width 32, context 64; 61 of 64 vocabulary rows used."""
    def make(seed: int = 0, **changes) -> GPT:
        config = dict(vocab_size=64, n_vocab=61, context=64, d_model=32, n_layers=2, n_heads=2, d_ff=64)
        config |= changes
        model = GPT(ModelConfig(**config), generator(seed, "weights"))
        gen = generator(seed, "gains")
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.copy_(.5 + torch.rand(p.shape, generator=gen))
            model.head.weight.mul_(10)
            model.embed.weight.mul_(25)              # else its gradient is 50 times that of the others
        return model.to(device)
    return make


@pytest.fixture
def gpt(make_gpt) -> GPT:
    return make_gpt()


@pytest.fixture
def small_gpt(make_gpt) -> GPT:
    """Only 11 tokens in use (of 16 rows): a row meets EOS after about ten tokens."""
    return make_gpt(vocab_size=16, n_vocab=11)


@pytest.fixture
def bigram(device):
    """bigram({a: {b: p}}, n_vocab) -> GPT with P(b follows a) = p; unlisted pairs have exactly 0.

    Attention and MLP have zero weights, so x stays the embedding: one axis per listed token, which the final
    norm scales to sqrt(d_model) and the head turns into the log-probabilities of that token's successors."""
    def make(table: dict[int, dict[int, float]], n_vocab: int, context: int = 64) -> GPT:
        d = 2 * -(-(len(table) + 1) // 2)
        model = GPT(ModelConfig(-(-n_vocab // 64) * 64, n_vocab, context, d, 1, 1, 4))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0. if p.dim() == 2 else 1.)
            model.embed.weight[:, d - 1] = 1.       # tokens that are not listed share the last axis
            for axis, (a, follows) in enumerate(table.items()):
                model.embed.weight[a] = 0.
                model.embed.weight[a, axis] = 1.
                model.head.weight[:, axis] = -200 / d ** .5
                for b, p in follows.items():
                    model.head.weight[b, axis] = (math.log(p) if p else -200) / d ** .5
        return model.to(device)
    return make


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    """258 tokens: the bytes, EOS 256, PAD 257."""
    return Tokenizer({"pattern": PATTERN, "merges": []})


@pytest.fixture
def answer_tokenizer() -> Tokenizer:
    """The bytes and '####' as one token (257), so that a bigram model can answer; EOS 258, PAD 259."""
    return Tokenizer({"pattern": PATTERN, "merges": [[35, 35], [256, 256]]})


@pytest.fixture
def answering(bigram, answer_tokenizer):
    """answering(wrong, unreadable) -> GPT that says '#### 7', '#### 8' if wrong or 'x' if unreadable, EOS."""
    def make(wrong: float = .5, unreadable: float = 0.) -> GPT:
        t = answer_tokenizer
        newline, four, space, x, seven, eight = (t.encode(c)[0] for c in ("\n", "####", " ", "x", "7", "8"))
        return bigram({newline: {four: 1 - unreadable, x: unreadable}, four: {space: 1.},
                       space: {seven: 1 - wrong, eight: wrong}, seven: {t.eos: 1.}, eight: {t.eos: 1.},
                       x: {t.eos: 1.}}, t.n_vocab)
    return make


@pytest.fixture
def logprobs_of():
    """logprobs_of(model, prompt, completion, T) -> (length,) with a graph: one row, no padding, no cache."""
    def compute(model: GPT, prompt: list, completion: list, temperature: float = 1.) -> torch.Tensor:
        logits = model(torch.tensor([prompt + completion], device=model.device))[0] / temperature
        logp = logits - logits.exp().sum(-1, keepdim=True).log()
        return torch.stack([logp[len(prompt) + i - 1, token] for i, token in enumerate(completion)])
    return compute
