"""Sampling with a cache, padding and compaction, against full forward passes over one row at a time."""
import pytest
import torch
from conftest import on_cpu, on_every_device

from checkpoint import generator
from model import (
    Cache, Rollouts, SharedPrompts, completion_logprobs, decode, micro_batches, pack, pad_left, sample,
    shared_logprobs)

EOS, PAD = 9, 10            # of small_gpt, which has 11 tokens in use
LAST_UNIFORM = 1 - 2 ** -24  # the largest number that torch.rand draws in float32


def prompts_of_all_lengths(longest=12, n_vocab=9):
    gen = generator(0, "prompts")
    return [torch.randint(0, n_vocab, (n,), generator=gen).tolist() for n in range(1, longest + 1)]


def uniforms(rows, max_new):
    return torch.rand(rows, max_new, generator=generator(0, "uniforms"))


def rollouts(model, prompts, group, max_new, temperature=1.0, seed=0, eos=EOS):
    return sample(model, prompts, group, max_new, eos, PAD, generator(seed, "test"), temperature)


def assert_same(a, b):
    """The same rollouts: tokens, lengths and ends exactly, log-probabilities and entropies to 1e-5."""
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def draw(model, prompts, u, temperature=1.0, compact=True, eos=EOS):
    """Rollouts from uniform numbers u (rows, max_new) that the test chose."""
    u = u.unflatten(0, (len(prompts), -1)).to(model.device)
    return decode(model, prompts, u, eos, PAD, temperature, compact)


@torch.inference_mode()
def draw_alone(model, prompt, u, temperature):
    """Completion, log-probabilities and entropies from full forward passes in a loop, inverse CDF by hand."""
    completion, logprobs, entropies = [], [], []
    for number in u.tolist():
        logits = model(torch.tensor([prompt + completion]))[0, -1].double()
        p = (logits / (temperature or 1)).softmax(-1)
        if temperature == 0:
            token = int(p.argmax())
        else:
            token, below = 0, 0.
            while below + float(p[token]) <= number:
                below += float(p[token])
                token += 1
        completion.append(token)
        logprobs.append(float(p[token].log()))
        entropies.append(float(-(p * p.log()).sum()))
        if token == EOS:
            break
    return completion, torch.tensor(logprobs), torch.tensor(entropies)


def spy_on_hidden(model):
    """Lets the test see the shape of every batch that runs through the model."""
    shapes = []
    hidden = model.hidden

    def spy(ids: torch.Tensor, cache=None) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return hidden(ids, cache)

    model.hidden = spy
    return shapes


# ---- the cache ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk, n_kv_heads", [(1, 2), (2, 2), (3, 2), (12, 2), (3, 1)])
@torch.inference_mode()
def test_prefill_in_chunks_equals_the_full_forward(make_gpt, chunk, n_kv_heads):
    """Chunks into a cache, some of padding only, give the logits of one full forward, which a top-left mask
    does not. In the last case two heads of queries share one of keys and values."""
    gpt = make_gpt(n_kv_heads=n_kv_heads)
    rows = prompts_of_all_lengths(36, 61)[-10:]
    alone = torch.cat([gpt(torch.tensor([row]))[0] for row in rows])
    ids, padding = pad_left(rows, 36, 0, gpt.device)
    real = torch.arange(36) >= padding[:, None]
    for length in range(1, 13):                          # the prompt in chunks, then token by token
        cache = Cache(gpt.config, padding, capacity=40)
        parts = [*ids[:, :length].split(chunk, dim=1), *ids[:, length:].split(1, dim=1)]
        logits = torch.cat([gpt.logits(gpt.hidden(part, cache)) for part in parts], 1)
        assert torch.allclose(logits[real], alone, atol=1e-4)


@on_every_device
@pytest.mark.parametrize("temperature", [1.0, .6, 0])
def test_decoding_in_a_padded_batch_equals_the_full_forward(small_gpt, temperature):
    """Prompts of all lengths in one batch have the tokens, log-probabilities and entropies they have alone:
    those of softmax(logits / T) over the tokens in use, in nats; at T = 0 the argmax at every step."""
    prompts, alone = prompts_of_all_lengths(), on_cpu(small_gpt)
    u = uniforms(24, 15)
    out = draw(small_gpt, prompts, u, temperature)
    assert 0 < int(out.finished.sum()) < 24
    for row, completion in enumerate(out.completions()):
        tokens, logprobs, entropies = draw_alone(alone, prompts[row // 2], u[row], temperature)
        n = len(tokens)
        assert completion == tokens
        assert torch.allclose(out.logprobs[row, :n], logprobs, atol=1e-4)
        assert torch.allclose(out.entropy[row, :n], entropies, atol=1e-4)


@on_every_device
@torch.inference_mode()
def test_cached_keys_of_other_rows_stay_apart(gpt):
    """Cache.select repeats and reorders whole rows: keys, values and the number of padding columns."""
    prompts, alone = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]], on_cpu(gpt)
    ids, padding = pad_left(prompts, 6, 0, gpt.device)
    cache = Cache(gpt.config, padding, capacity=8)
    gpt.hidden(ids, cache)
    cache.select(torch.tensor([2, 0, 0, 1], device=gpt.device))
    new = torch.tensor([[4], [5], [6], [7]], device=gpt.device)
    decoded = gpt.logits(gpt.hidden(new, cache))[:, 0].cpu()
    for row, (p, last) in enumerate(((2, 4), (0, 5), (0, 6), (1, 7))):
        assert torch.allclose(decoded[row], alone(torch.tensor([prompts[p] + [last]]))[0, -1], atol=1e-4)


# ---- one prefill per prompt ---------------------------------------------------------------------------

@on_every_device
def test_a_prompt_is_computed_once_for_its_group(small_gpt):
    """The first pass has one row per prompt; yet each row of the group draws its own first token."""
    prompts = prompts_of_all_lengths(4)
    shapes = spy_on_hidden(small_gpt)
    out = draw(small_gpt, prompts, uniforms(200, 5), compact=False)
    assert shapes[0] == (4, 4) and set(shapes[1:]) == {(200, 1)}
    for firsts in out.tokens[:, 0].view(4, 50):
        assert len(firsts.unique()) >= 5


@on_every_device
@pytest.mark.parametrize("temperature", [1.0, .6])
def test_recorded_logprobs_are_the_trainers(small_gpt, temperature):
    """The sampler's log-probabilities equal those of the trainer, computed from logits / T, to 1e-5. Row
    p·G + g continues prompt p, also where `sample` sorts prompts by length and cuts them apart."""
    prompts = [prompts_of_all_lengths(8)[i] for i in (2, 4, 0, 1, 7, 3, 6, 5)]       # not its own inverse
    small_gpt.decode_rows = 10
    out = rollouts(small_gpt, prompts, 5, 12, temperature)
    inputs = pack([p for p in prompts for _ in range(5)], out.completions(), PAD, small_gpt.device)
    trainer = completion_logprobs(small_gpt, *inputs, temperature).cpu()
    recorded = torch.cat([row[:n] for row, n in zip(out.logprobs, out.lengths)])
    assert len(trainer) == len(recorded)
    assert (recorded - trainer).abs().max() < 1e-5


# ---- compaction, order, frequencies -------------------------------------------------------------------

@on_every_device
@pytest.mark.parametrize("temperature", [1.0, .6])
def test_compaction_changes_nothing(small_gpt, temperature):
    """Dropping finished rows gives the same tokens, since each row has its own uniform numbers."""
    prompts, u = prompts_of_all_lengths(6), uniforms(120, 20)
    a, b = (draw(small_gpt, prompts, u, temperature, compact) for compact in (True, False))
    assert_same(a, b)
    assert int(a.finished.sum()) > 20


def test_compaction_drops_finished_rows(bigram):
    """Of 40 rows 20 end at the first token; the next passes carry the other 20, or 40 without it."""
    model = bigram({0: {1: .5, 2: .5}, 1: {1: 1.}}, n_vocab=3)
    u = torch.tensor([[.25] * 4, [.75] * 4]).repeat(20, 1)
    for compact, rows in ((True, 20), (False, 40)):
        shapes = spy_on_hidden(model)
        out = draw(model, [[0]], u, compact=compact, eos=2)
        assert shapes == [(1, 1)] + [(rows, 1)] * 3
        assert out.lengths.tolist() == [4, 1] * 20 and out.finished.tolist() == [False, True] * 20


@pytest.mark.parametrize("max_new, finished", [(30, True), (2, True), (1, False)])
def test_sampling_stops_when_all_rows_are_finished(bigram, max_new, finished):
    """Nothing is computed after the last row's EOS. As token max_new it counts as finished too."""
    model = bigram({0: {1: 1.}, 1: {2: 1.}}, n_vocab=3)
    shapes = spy_on_hidden(model)
    out = rollouts(model, [[0]] * 3, 2, max_new, eos=2)
    assert out.completions() == [[1, 2][:max_new]] * 6
    assert out.finished.tolist() == [finished] * 6
    assert len(shapes) == 1 + finished


@on_every_device
def test_order_of_rows_is_irrelevant(small_gpt):
    """Prompts in another order, with their uniform numbers, give the same completions in that order."""
    prompts, u = prompts_of_all_lengths(8), uniforms(8, 12)
    order = torch.randperm(8, generator=generator(0, "order"))
    a = draw(small_gpt, prompts, u)
    b = draw(small_gpt, [prompts[i] for i in order], u[order])
    assert_same(Rollouts(*(x[order] for x in a)), b)


@on_every_device
@pytest.mark.parametrize("rows", [1, 4, 9, 30])
def test_the_number_of_rows_decoded_at_once_is_irrelevant(small_gpt, rows):
    """The number of rows decoded at a time changes no token, log-probability or entropy."""
    prompts = prompts_of_all_lengths(7)[::-1]
    a = rollouts(small_gpt, prompts, 4, 12)
    small_gpt.decode_rows = rows
    shapes = spy_on_hidden(small_gpt)
    assert_same(a, rollouts(small_gpt, prompts, 4, 12))
    assert max(n for n, _ in shapes) <= max(rows, 4)


@on_every_device
def test_a_row_does_not_depend_on_its_neighbours(small_gpt):
    """A longer prompt beside a row changes its padding and its place in the batch, not its tokens."""
    a, b = (rollouts(small_gpt, [[1, 2, 3], other, [4]], 10, 8) for other in ([5, 6], [7] * 9))
    for rows in (slice(0, 10), slice(20, 30)):
        assert_same(*(Rollouts(*(x[rows] for x in out)) for out in (a, b)))


@on_every_device
def test_only_the_given_generator_is_used(small_gpt):
    """One seed gives the same rollouts whatever the global generator did, and leaves that one alone."""
    first = rollouts(small_gpt, [[1, 2]], 20, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_same(rollouts(small_gpt, [[1, 2]], 20, 8), first)
    assert not torch.equal(rollouts(small_gpt, [[1, 2]], 20, 8, seed=1).tokens, first.tokens)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [1.0, .6])
@torch.no_grad()
def test_frequencies_match_softmax(small_gpt, temperature):
    """First and second tokens of 6,000 rows agree with the exact distribution, by chi-square."""
    rows = 6000
    out = rollouts(small_gpt, [[3, 1]], rows, 2, temperature)
    first = (small_gpt(torch.tensor([[3, 1]]))[0, -1].double() / temperature).softmax(-1)
    after = small_gpt(torch.tensor([[3, 1, a] for a in range(11)]))[:, -1].double() / temperature
    first_token_goes_on = torch.arange(11) != EOS
    second = (first * first_token_goes_on) @ after.softmax(-1)
    for seen, p in ((out.tokens[:, 0], first), (out.tokens[out.lengths == 2, 1], second)):
        counts = torch.bincount(seen, minlength=11)
        chi2 = float(((counts - p * rows) ** 2 / (p * rows)).sum())
        assert chi2 < 29.6                               # 99.9 % quantile with 10 degrees of freedom
    assert first.max() / first.min() > 3                                 # far from uniform


@on_every_device
def test_the_inverse_cdf_hits_each_tokens_interval(bigram):
    """With probabilities .2, .3, .5 a u below .2 draws the first, below .5 the second, above the third."""
    model = bigram({0: {1: .2, 3: .3, 4: .5}}, n_vocab=6)
    u = torch.tensor([0., .1, .199, .201, .35, .499, .501, .9, LAST_UNIFORM])[:, None]
    out = draw(model, [[0]], u, eos=5)
    assert out.tokens[:, 0].tolist() == [1, 1, 1, 3, 3, 3, 4, 4, 4]


@on_every_device
@pytest.mark.parametrize("u, expected", [(0., 2), (LAST_UNIFORM, 3)])
def test_a_token_of_probability_zero_is_never_drawn(bigram, u, expected):
    """At both ends of [0,1) the draw skips tokens whose probability is exactly 0 in float32."""
    model = bigram({0: {2: .5, 3: .5}}, n_vocab=6)
    out = draw(model, [[0]], torch.tensor([[u]]), eos=5)
    assert out.tokens.tolist() == [[expected]] and out.entropy.isfinite().all()


# ---- packed rows, EOS, unused rows --------------------------------------------------------------------

def test_pack_goes_by_lengths():
    """Targets come from recorded lengths; completions that hold the pad id lose no target. Their places are
    those of the tokens before them, in rows without their last token."""
    pad = 0
    prompts, completions = [[5, 0, 6], [7], [8, 8]], [[0, 9], [0, 0, 0, 9], []]
    ids, at, wanted = pack(prompts, completions, pad)
    assert ids.tolist() == [[5, 0, 6, 0], [7, 0, 0, 0], [8, 0, 0, 0]]
    assert at.tolist() == [0 * 4 + 2, 0 * 4 + 3, 1 * 4 + 0, 1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3]
    assert wanted.tolist() == [0, 9, 0, 0, 0, 9]
    assert at.dtype == ids.dtype == wanted.dtype == torch.int64
    assert [x.tolist() for x in pack([[7]], [[]], pad)] == [[[]], [], []]
    assert {x.dtype for x in pack([[7]], [[]], pad)} == {torch.int64}


@on_every_device
@pytest.mark.parametrize("temperature, n_kv_heads", [(1., 2), (.6, 2), (.6, 1)])
@pytest.mark.parametrize("prompts, rows, completions", [
    pytest.param([[1], [2, 3, 4, 5, 6, 7], [8, 9], [0, 0, 0], [10]], [1, 0, 4, 4, 2, 3, 1, 0],
                 [[7, 60], [8], [0, 0, 9, 60], [5, 4, 3, 2, 1, 0, 60], [60], [0], [1], [8, 0]], id="mixed"),
    pytest.param([[1], [2, 3, 4], [8, 9]], [1, 0, 2, 1], [[8], [60], [0], [1]], id="one token each"),
    pytest.param([[1] * 60, [2]], [0, 1], [[3, 4, 5, 60], [6, 60]], id="full context")])
def test_packed_and_shared_prompts_give_the_logprobs_of_single_rows(
        make_gpt, logprobs_of, prompts, rows, completions, temperature, n_kv_heads):
    """Neither padding nor other rows nor prompts computed once, in any order and number of completions,
    change a log-probability; the order is row after row."""
    gpt = make_gpt(n_kv_heads=n_kv_heads)
    before = [prompts[p] for p in rows]
    alone = torch.cat([logprobs_of(gpt, a, b, temperature) for a, b in zip(before, completions)])
    packed = completion_logprobs(gpt, *pack(before, completions, 0, gpt.device), temperature)
    shared = shared_logprobs(gpt, SharedPrompts(gpt, prompts, 0), rows, completions, 0, temperature)
    assert torch.allclose(packed, alone, atol=1e-5)
    assert torch.allclose(shared, alone, atol=1e-5)


@on_every_device
def test_sampled_rows_end_with_their_first_eos(small_gpt):
    """A finished row's last token is its only EOS, counted in its length; the rest is padding. A row without
    EOS within max_new is not finished and keeps max_new tokens."""
    out = rollouts(small_gpt, prompts_of_all_lengths(6), 30, 20)
    assert 100 < int(out.finished.sum()) < 170
    for row, tokens in enumerate(out.tokens.tolist()):
        n, finished = int(out.lengths[row]), bool(out.finished[row])
        assert tokens[:n].count(EOS) == finished and (tokens[n - 1] == EOS) == finished
        assert n == 20 or finished
        assert tokens[n:] == [PAD] * (20 - n)
        assert (out.logprobs[row, n:] == 0).all() and (out.entropy[row, n:] == 0).all()
        assert (out.logprobs[row, :n] < 0).all() and (out.entropy[row, :n] > 0).all()


@on_every_device
def test_banned_rows_are_neither_sampled_nor_scored(gpt):
    """Unused rows of the head, which would win every draw if they took part, change nothing."""
    before = rollouts(gpt, [[1, 2]], 300, 3)
    with torch.no_grad():
        gpt.head.weight[61:] = 100 * gpt.hidden(torch.tensor([[1, 2]], device=gpt.device))[0, -1]
    after = rollouts(gpt, [[1, 2]], 300, 3)
    assert int(after.tokens.max()) < 61 and torch.equal(after.tokens, before.tokens)
    inputs = pack([[1, 2]] * 61, [[token] for token in range(61)], 0, gpt.device)
    p = completion_logprobs(gpt, *inputs).exp()
    assert abs(p.sum().item() - 1) < 1e-5                                # the tokens in use share all of it


# ---- limits -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 55], [[1], [2] * 55]])
def test_prompts_that_do_not_fit_are_errors(gpt, prompts):
    """Limits: an empty prompt has no logits, and prompt + max_new beyond the context would lack positions."""
    with pytest.raises(ValueError, match="1 to 54 tokens"):
        rollouts(gpt, prompts, 2, 10)


@pytest.mark.parametrize("tokens", [1, 7, 20, 64, 10_000])
def test_micro_batches_hold_every_row_once(tokens):
    """Each row is in exactly one micro-batch, which has at most `tokens` tokens unless it is one row."""
    lengths = [3, 9, 1, 7, 7, 20, 2, 5, 4, 9]
    batches = micro_batches(lengths, tokens, torch.device("cpu"))
    assert sorted(row for rows in batches for row in rows) == list(range(10))
    assert all(len(rows) == 1 or len(rows) * max(lengths[r] for r in rows) <= tokens for rows in batches)
    assert len(batches) == {1: 10, 10_000: 1}.get(tokens, len(batches))
