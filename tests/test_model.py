"""The architecture, against a naive re-implementation written from its equations."""
import math

import pytest
import torch
from conftest import on_cpu, on_every_device

from checkpoint import generator
from model import GPT, SIZES, ModelConfig, rms_norm, rotate

# ---- the equations again: float64, one position and one head at a time ---------------------------------

def naive_rms(x, w):
    return w * x / math.sqrt(x @ x / len(x) + 1e-6)


def naive_rope(x, position, theta):
    """Half-split: element i turns together with element i + d/2, by position · theta^(-2i/d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


@torch.no_grad()
def naive_logits(model, ids):
    """Logits (T, V) from a model in float64. Each head of keys and values serves n_heads / n_kv_heads
    neighbouring heads of queries; head rows that no token uses are left out."""
    c = model.config
    size = c.d_model // c.n_heads
    xs = list(model.embed.weight[ids])
    for b in model.blocks:
        w_q, w_k, w_v = b.qkv.weight.split((c.d_model, size * c.n_kv_heads, size * c.n_kv_heads))
        w_gate, w_up = b.gate_up.weight.split(c.d_ff)
        qs = [naive_rms(w_q @ x, b.q_norm) for x in xs]
        ks = [naive_rms(w_k @ x, b.k_norm) for x in xs]
        vs = [w_v @ x for x in xs]
        for t, x in enumerate(xs):
            heads = []
            for h in range(c.n_heads):
                q = naive_rope(qs[t][h * size:(h + 1) * size], t, c.rope_theta)
                at = h * c.n_kv_heads // c.n_heads * size
                part = slice(at, at + size)
                scores = [q @ naive_rope(ks[s][part], s, c.rope_theta) / math.sqrt(size)
                          for s in range(t + 1)]
                weights = [math.exp(score) for score in scores]
                heads.append(sum(p * v[part] for p, v in zip(weights, vs)) / sum(weights))
            x = x + naive_rms(b.out.weight @ torch.cat(heads), b.attention_norm)
            gate = w_gate @ x
            inner = gate / (1 + torch.exp(-gate)) * (w_up @ x)
            xs[t] = x + naive_rms(b.down.weight @ inner, b.mlp_norm)
    return torch.stack([model.head.weight[:c.n_vocab] @ naive_rms(x, model.norm) for x in xs])


@on_every_device
@pytest.mark.parametrize("changes", [{}, {"n_heads": 1, "rope_theta": 100.}, {"d_ff": 24, "n_layers": 1},
                                     {"n_heads": 4, "n_kv_heads": 2}, {"n_heads": 2, "n_kv_heads": 1}])
def test_logits_equal_the_equations(make_gpt, changes):
    """OLMo-2: the vectorised fp32 model equals the equations computed with loops in float64."""
    model = make_gpt(1, d_model=16, **changes)
    ids = [5, 60, 0, 5, 17, 33, 33, 2]
    logits = model(torch.tensor([ids], device=model.device))[0].cpu()
    assert torch.allclose(logits, naive_logits(on_cpu(model).double(), ids).float(), atol=1e-5)


@on_every_device
def test_the_future_does_not_matter(gpt):
    """OLMo-2: attention is causal; changing token t leaves all logits before t as they are."""
    ids = torch.randint(0, 61, (3, 12), generator=generator(0, "test"))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    a, b = gpt(ids.to(gpt.device)), gpt(changed.to(gpt.device))
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert (a - b)[:, 7:].abs().amax(-1).min() > 1e-3


@on_every_device
def test_unused_rows_get_no_logit(gpt):
    """Rows above n_vocab exist for alignment only; they neither get a logit nor change any other."""
    ids = torch.tensor([[1, 2, 3]], device=gpt.device)
    before = gpt(ids)
    with torch.no_grad():
        gpt.head.weight[61:] = 1e6
    assert before.shape == (1, 3, 61) and torch.equal(gpt(ids), before)
    gpt(ids).sum().backward()
    assert (gpt.head.weight.grad[61:] == 0).all()
    assert (gpt.head.weight.grad[:61] != 0).any()


def test_rms_norm_values():
    """OLMo-2: RMS(x; w) = w·x/sqrt(mean(x²) + 1e-6); with x = 1e-3 the mean square equals the epsilon."""
    x = torch.tensor([[3., 4.], [1e-3, 1e-3], [0., 0.]])
    expected = torch.tensor([[3 / 12.5 ** .5, 8 / 12.5 ** .5], [.5 ** .5, 2 * .5 ** .5], [0., 0.]])
    assert torch.allclose(rms_norm(x, torch.tensor([1., 2.])), expected, rtol=1e-5)


def test_rms_norm_computes_in_fp32():
    """OLMo-2: the norm runs in fp32 on bf16 input: a bf16 mean could be off by 0.4 %."""
    x = torch.linspace(-300, 300, 64).bfloat16()
    exact = x.double() / (x.double() ** 2).mean().add(1e-6).sqrt()
    y = rms_norm(x, torch.ones(64))
    assert y.dtype == torch.float32 and torch.allclose(y.double(), exact, rtol=1e-6)


def test_rope_scores_depend_on_the_distance_only():
    """OLMo-2: the score of a query at i and a key at j depends on i - j, and a rotation keeps lengths."""
    model = GPT(ModelConfig(d_model=16, n_heads=2, context=50))
    vectors = torch.randn(1, 2, 1, 8, generator=generator(0, "test"))
    q, k = rotate(vectors.expand(1, 2, 50, 8), model.cos, model.sin)[0]
    scores = q @ k.T                                                     # (i, j)
    for distance in (-9, -1, 0, 1, 7, 30):
        same = scores.diagonal(-distance)
        assert torch.allclose(same, same[0].expand_as(same), atol=1e-5)
    assert scores[10].std() > .1                                         # and it does depend on that
    assert torch.allclose(q.norm(dim=-1), vectors[0, 0].norm(), rtol=1e-5)


def test_rope_turns_an_element_with_the_one_half_a_head_further():
    """OLMo-2, half-split: a quarter turn of the pair (x, y) is (-y, x); the pairs here are (1, 3), (2, 4)."""
    cos = torch.tensor([[1., 1., 1., 1.], [0., 0., 0., 0.], [1., 0., 1., 0.]])
    sin = torch.tensor([[0., 0., 0., 0.], [-1., -1., 1., 1.], [0., -1., 0., 1.]])
    turned = rotate(torch.tensor([1., 2., 3., 4.]).expand(1, 1, 3, 4), cos, sin)
    assert turned[0, 0].tolist() == [[1, 2, 3, 4], [-3, -4, 1, 2], [1, -4, 3, 2]]


def test_rope_tables_are_fp32_and_turn_at_the_listed_rates():
    """OLMo-2: inv_freq = theta^(-2i/head_dim), tables in fp32; an angle near 255 errs by 3e-5."""
    model = GPT(ModelConfig(d_model=16, n_heads=2, context=256, rope_theta=500.))
    assert model.cos.dtype == model.sin.dtype == torch.float32 and model.cos.shape == (256, 8)
    for position in (0, 1, 3, 100, 255):
        for i in range(4):
            angle = position * 500. ** (-2 * i / 8)
            for column, sign in ((i, -1), (i + 4, 1)):
                assert abs(float(model.cos[position, column]) - math.cos(angle)) < 3e-5
                assert abs(float(model.sin[position, column]) - sign * math.sin(angle)) < 3e-5


def test_initialisation_is_a_truncated_normal():
    """OLMo-2: matrices are normal, std .02, cut at 3 sigma (which leaves .98658 of the std); gains are 1."""
    model = GPT(ModelConfig(d_model=192, n_layers=2, n_heads=6, d_ff=512), generator(0, "weights"))
    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    for w in matrices:
        assert .058 < float(w.abs().max()) <= .06
        assert float(w.std()) == pytest.approx(.02 * .98658, rel=.02)
        assert abs(float(w.mean())) < 5e-4
    w = torch.cat([w.flatten() for w in matrices])
    inside = float((w.abs() < .02).float().mean())
    assert abs(inside - .68269 / .99730) < .002              # normal, not uniform
    assert all((p == 1).all() for p in model.parameters() if p.dim() == 1)


def test_initialisation_is_a_function_of_the_generator():
    """One seed gives the same weights, whatever the global generator did; another seed gives others."""
    def weights(seed):
        torch.rand(seed + 1)
        return GPT(ModelConfig(d_model=16, n_heads=2), generator(seed, "weights")).blocks[0].qkv.weight
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_no_biases_and_no_tied_weights(gpt):
    """OLMo-2: untied, no biases: the parameters of the equations and nothing else, counted by hand."""
    d, ff, layers, rows = 32, 64, 2, 64
    by_hand = 2 * rows * d + layers * (4 * d * d + 3 * d * ff + 4 * d) + d
    assert sum(p.numel() for p in gpt.parameters()) == by_hand


@pytest.mark.parametrize("n_kv_heads", [0, 1])
def test_flops_per_token_by_hand(make_gpt, n_kv_heads):
    """2 FLOPs per multiply-add of every product of one forward pass, counted product by product. With one
    head of keys and values for two of queries, k and v are half as wide."""
    model = make_gpt(n_layers=3, n_kv_heads=n_kv_heads)
    d, ff, layers, vocabulary, length = 32, 64, 3, 61, 48
    projections = (3 if n_kv_heads else 4) * 2 * d * d                   # q, k, v, o
    attention = sum(2 * (2 * d * (t + 1)) for t in range(length))        # t + 1 scores, sum of t + 1 values
    flops = layers * (projections + attention / length + 3 * 2 * d * ff) + 2 * d * vocabulary
    one_key_per_layer = layers * 2 * 2 * d                               # the estimate may drop the + 1
    assert abs(model.flops_per_token(length) - flops) <= one_key_per_layer
    assert model.flops_per_token(2 * length) - model.flops_per_token(length) == layers * 2 * d * length


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_parameters_that_their_name_says(name):
    """Presets: the name is the parameter count at a vocabulary of 512, within 15 %, and shapes fit."""
    d_model, n_layers, n_heads, d_ff = SIZES[name]
    with torch.device("meta"):
        model = GPT(ModelConfig(512, 512, 256, d_model, n_layers, n_heads, d_ff))
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / (float(name.removesuffix("M")) * 1e6) - 1) < .15
    assert d_model % (2 * n_heads) == 0                                  # rope turns pairs
