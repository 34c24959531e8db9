"""The CUDA path on a machine without a GPU: whole runs on a simulated one, its kernels and waits counted, its
rules broken on purpose; precision, large vocabularies, and the attention of Apple's GPUs."""
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from conftest import on_cpu, on_every_device
from simulated_cuda import CUDA, GPU, simulated_cuda

import evaluate
import merge
import model as model_py
import pretrain
import rl
import sft
from checkpoint import generator, load_checkpoint, load_model, save_checkpoint
from model import GPT, Cache, ModelConfig, attention, decode_all, inverse_cdf, sample, uniform, visible

# ---- whole runs -------------------------------------------------------------------------------------------

TUNING = dict(micro_tokens=300, max_new=18, eval_every=2, eval_problems=2, eval_samples=2, save_every=1)
GRPO = TUNING | dict(n_problems=4, rollouts=4, steps=2)


def trained(script, out: Path, device: str, **options) -> tuple[dict, list]:
    """(weights, log) of a run on a device, from the parrot: its rewards differ within groups."""
    if script is not pretrain:
        options |= dict(init=str(worlds.parrot()), problem_file=str(worlds.sevens()))
    c = script.Config(data=str(worlds.data()), out=str(out), device=device, **{"threads": 1} | options)
    with simulated_cuda() if device == "cuda" else nullcontext():
        final = Path(worlds.quietly(script.train, c))
    return load_checkpoint(final)["model"], worlds.lines(out / "log.jsonl")


def agree(a, b) -> bool:
    """Nested dicts and lists have equal numbers but for rounding; times and the names of devices aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(agree(a[k], b[k]) for k in a if k not in ("seconds", "device"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(agree, a, b))
    return a == b or a == pytest.approx(b, rel=1e-3, abs=1e-5)


def furthest(a: dict, b: dict) -> float:
    """The largest difference of two weights."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("script, lr, options", [
    pytest.param(pretrain, 3e-3, worlds.PRETRAIN | dict(batch=16, micro_batch=8, tokens=4_096,
                                                        checkpoints_at=(2_048,)), id="pretrain"),
    pytest.param(sft, 1e-3, TUNING | dict(batch=8, n_train=16, epochs=1), id="sft"),
    pytest.param(rl, 3e-4, GRPO, id="rl"),
    pytest.param(rl, 3e-4, GRPO | dict(kl=.1, updates=2, recompute=True, decode_rows=8,
                                       freeze_embeddings=True), id="rl with options"),
    *(pytest.param(merge, 3e-4, GRPO | dict(batch=8, mode=mode), id=f"merge {mode}")
      for mode in ("parallel", "fused", "alternating"))])
def test_a_run_does_not_depend_on_the_device(script, lr, options, tmp_path):
    """A run on the GPU has the log and the weights of one on the CPU, but for rounding: of an AdamW step less
    than 5 %."""
    weights, log = trained(script, tmp_path / "cpu", "cpu", **options)
    other_weights, other_log = trained(script, tmp_path / "cuda", "cuda", **options)
    assert log[-2]["updates"] >= 2 and agree(log, other_log)
    assert furthest(weights, other_weights) < .05 * lr


def test_a_run_moves_to_another_device(tmp_path):
    """A run that broke off on the GPU goes on from its last.pt on a CPU."""
    options = TUNING | dict(batch=8, n_train=16, epochs=1)
    weights, log = trained(sft, tmp_path / "cpu", "cpu", **options)
    effects = [mock.DEFAULT, RuntimeError("power cut")]
    with (mock.patch.object(sft, "sft_gradient", wraps=sft.sft_gradient, side_effect=effects),
          pytest.raises(RuntimeError, match="power cut")):
        trained(sft, tmp_path / "moved", "cuda", **options)
    moved, moved_log = trained(sft, tmp_path / "moved", "cpu", **options)
    assert furthest(weights, moved) < 5e-5 and agree(log, moved_log)


def test_an_evaluation_does_not_depend_on_the_device(monkeypatch):
    """Problems, every 50th benchmark item, bits per byte, the KL to a reference: the numbers of the CPU."""
    whole = evaluate.measure_benchmarks
    monkeypatch.setattr(evaluate, "measure_benchmarks", lambda m, t, items: whole(m, t, items[::50]))

    def measured(device: str) -> dict:
        c = evaluate.Config((str(worlds.parrot()),), data=str(worlds.data()), n_problems=3, n_samples=4,
                            k=(1, 4), max_new=20, reference=str(worlds.base()), device=device, threads=1)
        with simulated_cuda() if device == "cuda" else nullcontext():
            return worlds.quietly(lambda c: evaluate.evaluate(c.checkpoints[0], c), c)
    assert agree(measured("cpu"), measured("cuda"))


@on_every_device
def test_a_checkpoint_has_no_device(make_gpt, byte_tokenizer, tmp_path, device):
    """The file has the bytes of one written from the CPU; read back, the model is on the device asked for."""
    model = make_gpt(vocab_size=320, n_vocab=258)
    for name, saved in ("here.pt", model), ("cpu.pt", on_cpu(model)):
        save_checkpoint(tmp_path / name, saved, byte_tokenizer, [])
    assert (tmp_path / "here.pt").read_bytes() == (tmp_path / "cpu.pt").read_bytes()
    ids = torch.tensor([[1, 2, 3]], device=device)
    loaded, _, _ = load_model(tmp_path / "cpu.pt", device)
    assert loaded.device == device and torch.equal(loaded(ids), model(ids))


# ---- decoding in stretches --------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 0]]


def tokens(model: GPT, temperature: float = 1., max_new: int = 50) -> list:
    return sample(model, PROMPTS, 8, max_new, 9, 10, generator(0, "test"), temperature).tokens.tolist()


@pytest.fixture
def gpu():
    """The books of a simulated GPU."""
    with simulated_cuda() as gpu:
        yield gpu


@pytest.mark.parametrize("temperature", [1., .6, 0.])
def test_graphs_draw_the_tokens_of_the_cpu(small_gpt, gpu, temperature):
    """Tokens are exactly those of a CPU, which decodes one by one, wherever max_new ends a stretch, and after
    rows were dropped, for which a graph is recorded anew."""
    model = small_gpt.to(CUDA)
    for max_new in (1, 2, 16, 17, 18, 50):
        graphs = len(gpu.graphs)
        assert tokens(model, temperature, max_new) == tokens(on_cpu(model), temperature, max_new)
    assert len(gpu.graphs) >= graphs + (2 if temperature else 1)         # greedy rows end together


class CountsInPython(Cache):
    """A cache whose length is a number of Python, not a tensor."""
    number = 0

    def columns(self, T: int) -> torch.Tensor:
        return torch.arange(self.number, self.number + T, device=self.padding.device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple:
        stored = super().store(layer, k, v)
        self.number += k.shape[2] if layer == self.config.n_layers - 1 else 0
        return stored


def test_a_number_of_python_in_a_graph_is_noticed(small_gpt, gpu, monkeypatch):
    """Such a cache is right on a CPU; a graph repeats the number that it had while recorded."""
    right = tokens(small_gpt)
    monkeypatch.setattr(model_py, "Cache", CountsInPython)
    assert tokens(small_gpt) == right != tokens(small_gpt.to(CUDA))


# ---- kernels and waits of the default model ---------------------------------------------------------------

@pytest.fixture
def default_gpt(gpu) -> GPT:
    return GPT(ModelConfig(), generator(0, "weights")).to(CUDA)


def added(book, function, *args) -> int:
    """How much a call adds to one of the books."""
    before = book.total()
    function(*args)
    return book.total() - before


def decoded(model: GPT, max_new: int) -> None:
    """Eight rows without an end."""
    sample(model, PROMPTS[:2], 4, max_new, -1, 0, generator(0, "test"))


def test_one_wait_per_stretch(default_gpt, gpu):
    """49 tokens are two stretches more than 17."""
    short, long = (added(gpu.waits, decoded, default_gpt, max_new) for max_new in (17, 49))
    assert long - short <= 2


def test_kernels_per_token(default_gpt, gpu, monkeypatch):
    """A graph has at most 140 kernels and takes one launch; so few are launched where nothing is recorded."""
    short, long = (added(gpu.kernels, decoded, default_gpt, max_new) for max_new in (17, 49))
    assert (long - short) / 32 < 2
    assert all(0 < graph.kernels.total() <= 140 for graph in gpu.graphs) and len(gpu.graphs) == 2
    monkeypatch.setattr(model_py, "recorded", lambda step, device: step)
    short, long = (added(gpu.kernels, decoded, default_gpt, max_new) for max_new in (17, 49))
    assert 2 < (long - short) / 32 <= 140


@pytest.mark.parametrize("kl", [0., .1])
@pytest.mark.parametrize("micro_tokens, micro_batches", [(20, 4), (1_000, 1)])
def test_one_wait_per_micro_batch_of_an_update(default_gpt, gpu, kl, micro_tokens, micro_batches):
    """Two prompts with four completions of ten tokens each: two rows, or all of them, at a time."""
    completions = [list(range(r, r + 10)) for r in range(8)]
    batch = rl.Batch([[1, 2, 3], [4, 5]], completions, [torch.full((10,), -6.)] * 8, ["right"] * 8, [""] * 8,
                     torch.zeros(2, 4), 0., 0.)
    advantage = torch.tensor([1., -1.] * 4)
    c = rl.Config(kl=kl, micro_tokens=micro_tokens)
    assert added(gpu.waits, rl.policy_gradient, default_gpt, default_gpt, batch, advantage, range(8), c, 0
                 ) <= micro_batches


@pytest.mark.parametrize("micro_tokens, micro_batches", [(20, 4), (1_000, 1)])
def test_one_wait_per_micro_batch_of_scores(default_gpt, gpu, micro_tokens, micro_batches):
    """Eight rows of ten tokens: SFT's gradient, and the scores of benchmark items."""
    contexts, continuations = [[1, 2, 3]] * 8, [[4, 5, 6, 7, 8, 9, 10]] * 8
    examples, c = list(zip(contexts, continuations)), sft.Config(micro_tokens=micro_tokens)
    assert added(gpu.waits, sft.sft_gradient, default_gpt, examples, c, 0) <= micro_batches
    scored = default_gpt, contexts, continuations, 0, micro_tokens
    assert added(gpu.waits, evaluate.score_rows, *scored) == micro_batches


# ---- precision --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, dtype", [(256, torch.float32), (512, torch.bfloat16)])
def test_bf16_from_a_width_of_512_on(gpu, width, dtype):
    """Products of the layers are in bf16 in wide models only, those of the head in fp32. Weights are
    converted once per decode call: in inference mode it was once per token."""
    model = GPT(ModelConfig(64, 64, 64, width, 2, 4, 48), generator(0, "weights")).to(CUDA)
    shapes = [p.shape for p in model.blocks.parameters() if p.dim() == 2]

    def calls(max_new: int) -> list[tuple]:
        with mock.patch.object(GPU, "book", autospec=True, side_effect=GPU.book) as book:
            decoded(model, max_new)
        return [call.args[1:4] for call in book.call_args_list]          # operation, its arguments

    for seen in calls(2), calls(20):
        products = [args for func, args, _ in seen if str(func) == "aten.mm.default"]
        head = [a.dtype for a, b in products if b.shape == model.head.weight.T.shape]
        assert {a.dtype for a, b in products if b.shape != model.head.weight.T.shape} == {dtype}
        assert set(head) == {torch.float32}
        converted = [args[0] for _, args, options in seen if options.get("dtype") is torch.bfloat16]
        assert sum(x.shape in shapes for x in converted) == (len(shapes) if dtype is torch.bfloat16 else 0)


class OnApple(torch.Tensor):
    """A tensor of the CPU that says it is on one of Apple's GPUs."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("mps"))


@pytest.mark.parametrize("T", [1, 5])
def test_attention_of_apples_gpus(T, monkeypatch):
    """Their fused kernel is wrong with masks like ours: explicit products give the numbers of the CPU's."""
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator(0, "test"))             # (B, H, keys, D)
    q = q[:, :, -T:]
    cache = Cache(ModelConfig(), torch.tensor([0, 7]), 9)                # the second row is mostly padding
    cache.length += 9 - T
    mask = visible(cache, T)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert torch.allclose(attention(q.as_subclass(OnApple), k, v, mask), expected, atol=1e-6)


# ---- large vocabularies -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n_vocab, kind, dtype", [
    (4095, "cuda", torch.float32), (4096, "cuda", torch.float64), (4096, "cpu", torch.float64),
    (100_000, "mps", torch.float32)])
def test_uniform_numbers_are_fine_enough(n_vocab, kind, dtype):
    """In fp64 from 4,096 entries on, where there is fp64; below, the stream is the one it always was."""
    model = SimpleNamespace(config=ModelConfig(n_vocab=n_vocab), device=torch.device(kind))
    expected = torch.rand(2, 3, generator=generator(0, "test"), dtype=dtype)
    assert torch.equal(uniform(model, (2, 3), generator(0, "test")), expected)


@on_every_device
def test_the_tail_of_a_large_vocabulary_is_drawn(bigram, device):
    """The first token has 1 - 2^-10, 2^17 others have 2^-27 each. Fp32 numbers below 1 lie 2^-24 apart: sums
    in fp32 are equal for eight tokens, of which one is drawn and the others never, of twelve neighbours two
    at most. In fp64 each is drawn by the middle of its interval."""
    tail, n_vocab = 2 ** -27, 2 ** 17 + 1
    p = torch.full((n_vocab,), tail, device=device)
    p[0] = 1 - 2 ** -10
    wanted = torch.arange(100_000, 100_012)
    middle = 1 - 2 ** -10 + tail * (wanted.double() - .5)
    assert inverse_cdf(p.expand(12, -1), middle.to(device)).tolist() == wanted.tolist()
    every = 1 - 2 ** -10 + torch.arange(-4, 5) * 2 ** -24 + wanted[6] * tail         # of fp32, around there
    coarse = inverse_cdf(p.expand(9, -1), every.to(device))
    assert every.dtype == torch.float32 and len(set(coarse.tolist()) & set(wanted.tolist())) <= 2

    model = bigram({0: {0: 1.}}, n_vocab)                                # whose logits are not quite exact
    with torch.no_grad():
        model.head.weight[:n_vocab, 0] = p.log() / model.config.d_model ** .5
    drawn = decode_all(model, [[0]], middle[None, :, None], -1, 0, 1.).tokens.flatten()
    assert ((drawn - wanted).abs() < 20).all() and (drawn.diff() == 1).all()


# ---- the simulation itself --------------------------------------------------------------------------------

def waits_in_a_graph(x: torch.Tensor) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def replays_on_lost_memory(x: torch.Tensor) -> None:
    graph, other = torch.cuda.CUDAGraph(), x + 1
    with torch.cuda.graph(graph):
        other.add_(1)
    del other
    graph.replay()


def generator_at_an_old_address(x: torch.Tensor) -> torch.Tensor:
    """The simulation once knew its generators by address: freed, it was that of the next one, of the CPU."""
    torch.Generator(CUDA)
    return torch.rand(3, device=CUDA, generator=torch.Generator())


@pytest.mark.parametrize("violation, message", [
    (lambda x: x + torch.ones(3), "same device"),
    (lambda x: torch.ones(3) + x, "same device"),
    (lambda x: torch.cat((x, torch.ones(3))), "same device"),
    (lambda x: torch.ones(3)[x.long()], "same device"),
    (lambda x: torch.ones(()).add_(x[0]), "same device"),
    (lambda x: torch._foreach_add_([torch.ones(3)], [x]), "same device"),
    (lambda x: torch.rand(3, device=CUDA, generator=torch.Generator()), "generator"),
    (generator_at_an_old_address, "generator"),
    (lambda x: torch.rand(3, generator=torch.Generator(CUDA)), "generator"),
    (lambda x: x.numpy(), "numpy"),
    (lambda x: np.asarray(x), "numpy"),
    (waits_in_a_graph, "capturing"),
    (replays_on_lost_memory, "given back")])
def test_cudas_rules_are_kept(gpu, violation, message):
    """Refused are mixed devices, generators and arrays of the CPU, waits in a graph, and lost memory."""
    with pytest.raises((RuntimeError, TypeError), match=message):
        violation(torch.zeros(3, device=CUDA))


@pytest.mark.parametrize("operation, waits", [
    (lambda x, n: x[0].item(), 1), (lambda x, n: float(x[0]), 1), (lambda x, n: bool(x[0] > 0), 1),
    (lambda x, n: x.tolist(), 1), (lambda x, n: x.cpu(), 1), (lambda x, n: x.to("cpu"), 1),
    (lambda x, n: torch.ones(3).to(CUDA), 1), (lambda x, n: torch.ones(3).to(CUDA, non_blocking=True), 0),
    (lambda x, n: x[x > 0], 1), (lambda x, n: x.nonzero(), 1), (lambda x, n: x.unique(), 1),
    (lambda x, n: x.repeat_interleave(n), 1), (lambda x, n: x.repeat_interleave(n, output_size=8), 0),
    (lambda x, n: x.__setitem__(x > 0, 0.), 0), (lambda x, n: x[n], 0), (lambda x, n: x.softmax(0) @ x, 0)])
def test_waits_are_counted(gpu, operation, waits):
    """One for each value or shape that Python learns from the GPU, none for work that it only sends there."""
    x = torch.ones(4, device=CUDA)
    n = torch.full((4,), 2, device=CUDA)
    assert added(gpu.waits, operation, x, n) == waits


def test_a_graph_repeats_what_was_recorded(gpu):
    """Recording itself does nothing, a replay reads tensors anew and numbers of Python never."""
    total, number, step = torch.zeros(1, device=CUDA), 1, torch.ones(1, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(step * number)
    assert total.tolist() == [0] and graph.kernels.total() == 2
    number = 5
    step.fill_(10)
    assert added(gpu.kernels, graph.replay) == 1 and total.tolist() == [10]
