"""Sampling with a cache, padding and compaction, against full forward passes over one row at a time."""
import pytest
import torch

from checkpoint import generator
from model import (
    Cache, SharedPrompts, completion_logprobs, decode, micro_batches, pack, sample, shared_logprobs)

EOS, PAD = 9, 10            # of small_gpt, which has 11 tokens in use
LAST_UNIFORM = 1 - 2 ** -24  # the largest number that torch.rand draws in float32


def prompts_of_all_lengths(longest=12, n_vocab=9, seed=0):
    gen = generator(seed, "prompts")
    return [torch.randint(0, n_vocab, (n,), generator=gen).tolist() for n in range(1, longest + 1)]


def uniforms(rows, max_new, seed=0):
    return torch.rand(rows, max_new, generator=generator(seed, "uniforms"))


@torch.inference_mode()
def draw(model, prompts, u, temperature=1.0, compact=True, eos=EOS, pad=PAD):
    """Rollouts from uniform numbers u (rows, max_new) that the test chose."""
    return decode(model, prompts, u.unflatten(0, (len(prompts), -1)), eos, pad, temperature, compact)


@torch.inference_mode()
def draw_alone(model, prompt, u, temperature):
    """Completion, log-probabilities and entropies from full forward passes in a loop, inverse CDF by hand."""
    ids, logprobs, entropies = list(prompt), [], []
    for number in u.tolist():
        logits = model(torch.tensor([ids]))[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
            p = logits.exp() / logits.exp().sum()
        else:
            p = (logits / temperature).exp()
            p /= p.sum()
            token, below = 0, 0.
            while below + float(p[token]) <= number:
                below += float(p[token])
                token += 1
        ids.append(token)
        logprobs.append(float(p[token].log()))
        entropies.append(float(-(p * p.log()).sum()))
        if token == EOS:
            break
    return ids[len(prompt):], logprobs, entropies


def spy_on_hidden(model):
    """Lets the test see the shape of every batch that runs through the model."""
    shapes, original = [], model.hidden

    def hidden(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return original(ids, *args, **kwargs)
    model.hidden = hidden
    return shapes


# ---- the cache ----------------------------------------------------------------------------------------

def run_in_parts(model, parts, padding):
    """Logits of all positions, the parts going through the model one after the other with a cache."""
    cache = Cache(model.config, torch.tensor(padding))
    with torch.inference_mode():
        return torch.cat([model.logits(model.hidden(part, cache)) for part in parts], 1)


@pytest.mark.parametrize("chunk, n_kv_heads", [(1, 2), (2, 2), (3, 2), (12, 2), (3, 1)])
def test_prefill_in_chunks_equals_the_full_forward(make_gpt, chunk, n_kv_heads):
    """Chunks into a cache give the logits of one full forward, which a top-left mask does not. Two heads of
    queries, which share one of keys and values in the last case."""
    gpt = make_gpt(n_kv_heads=n_kv_heads)
    full = torch.randint(0, 61, (2, 36), generator=generator(0, "test"))
    for length in range(1, 13):                          # the prompt in chunks, then token by token
        parts = [*full[:, :length].split(chunk, dim=1), *full[:, length:].split(1, dim=1)]
        assert torch.allclose(run_in_parts(gpt, parts, [0, 0]), gpt(full), atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_padded_prefill_in_chunks_equals_the_full_forward(gpt, chunk):
    """Padding on the left changes no logits; a chunk of padding only must not spoil the next ones."""
    prompts = prompts_of_all_lengths(9, 61)
    padding = [9 - len(p) for p in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(padding, prompts)])
    logits = run_in_parts(gpt, ids.split(chunk, dim=1), padding)
    for row, p in enumerate(prompts):
        assert torch.allclose(logits[row, -len(p):], gpt(torch.tensor([p]))[0], atol=1e-4)


def test_decoding_in_a_padded_batch_equals_the_full_forward(small_gpt):
    """Prompts of all lengths in one batch have the tokens, log-probabilities and entropies they have
    alone."""
    prompts = prompts_of_all_lengths()
    u = uniforms(24, 10)
    out = draw(small_gpt, prompts, u)
    assert 0 < int(out.finished.sum()) < 24
    for row, completion in enumerate(out.completions()):
        tokens, logprobs, entropies = draw_alone(small_gpt, prompts[row // 2], u[row], 1.0)
        n = len(tokens)
        assert completion == tokens and int(out.lengths[row]) == n
        assert torch.allclose(out.logprobs[row, :n], torch.tensor(logprobs), atol=1e-4)
        assert torch.allclose(out.entropy[row, :n], torch.tensor(entropies), atol=1e-4)


def test_cached_keys_of_other_rows_stay_apart(gpt):
    """Cache.select repeats and reorders whole rows: keys, values and the number of padding columns."""
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    padding = [6 - len(p) for p in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(padding, prompts)])
    with torch.inference_mode():
        cache = Cache(gpt.config, torch.tensor(padding))
        gpt.hidden(ids, cache)
        cache.select(torch.tensor([2, 0, 0, 1]))
        decoded = gpt.logits(gpt.hidden(torch.tensor([[4], [5], [6], [7]]), cache))[:, 0]
        for row, (p, last) in enumerate(((2, 4), (0, 5), (0, 6), (1, 7))):
            assert torch.allclose(decoded[row], gpt(torch.tensor([prompts[p] + [last]]))[0, -1], atol=1e-4)


# ---- one prefill per prompt ---------------------------------------------------------------------------

def test_a_prompt_is_computed_once_for_its_group(small_gpt):
    """The first pass has one row per prompt; yet each row of the group draws its own first token."""
    prompts = prompts_of_all_lengths(4)
    shapes = spy_on_hidden(small_gpt)
    out = draw(small_gpt, prompts, uniforms(200, 5), compact=False)
    assert shapes[0] == (4, 4) and set(shapes[1:]) == {(200, 1)}
    for firsts in out.tokens[:, 0].view(4, 50):
        assert len(firsts.unique()) >= 5


def test_row_belongs_to_prompt_row_over_group(small_gpt):
    """Row p·G + g continues prompt p, also where `sample` sorts prompts by length and cuts them apart."""
    prompts = [prompts_of_all_lengths(5)[i] for i in (2, 4, 0, 1, 3)]    # not its own inverse
    small_gpt.decode_rows = 7
    out = sample(small_gpt, prompts, 3, 6, EOS, PAD, generator(1, "test"))
    for row, completion in enumerate(out.completions()):
        ids, target = pack([prompts[row // 3]], [completion], PAD)
        with torch.inference_mode():
            expected = completion_logprobs(small_gpt, ids, target)
        assert torch.allclose(out.logprobs[row, :len(completion)], expected, atol=1e-5)


# ---- compaction, order, frequencies -------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, .6])
def test_compaction_changes_nothing(small_gpt, temperature):
    """Dropping finished rows gives the same tokens, since each row has its own uniform numbers."""
    prompts, u = prompts_of_all_lengths(6), uniforms(120, 20)
    a, b = (draw(small_gpt, prompts, u, temperature, compact) for compact in (True, False))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.finished, b.finished) and 20 < int(a.finished.sum())
    assert torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert torch.allclose(a.entropy, b.entropy, atol=1e-5)


def test_compaction_drops_finished_rows(bigram):
    """Of 40 rows 20 end at the first token; the next passes carry the other 20, or 40 without it."""
    model = bigram({0: {1: .5, 2: .5}, 1: {1: 1.}}, n_vocab=3)
    u = torch.tensor([[.25] * 4, [.75] * 4]).repeat(20, 1)
    for compact, rows in ((True, 20), (False, 40)):
        shapes = spy_on_hidden(model)
        out = draw(model, [[0]], u, compact=compact, eos=2)
        assert shapes == [(1, 1)] + [(rows, 1)] * 3
        assert out.lengths.tolist() == [4, 1] * 20 and out.finished.tolist() == [False, True] * 20


def test_sampling_stops_when_all_rows_are_finished(bigram):
    """Nothing is computed after the last row's EOS."""
    model = bigram({0: {1: 1.}, 1: {2: 1.}}, n_vocab=3)
    shapes = spy_on_hidden(model)
    out = sample(model, [[0]] * 3, 2, 30, 2, 2, generator(0, "test"))
    assert out.completions() == [[1, 2]] * 6 and len(shapes) == 2


def test_order_of_rows_is_irrelevant(small_gpt):
    """Prompts in another order, with their uniform numbers, give the same completions in that order."""
    prompts, u = prompts_of_all_lengths(8), uniforms(8, 12)
    order = torch.randperm(8, generator=generator(0, "order"))
    a = draw(small_gpt, prompts, u)
    b = draw(small_gpt, [prompts[i] for i in order], u[order])
    assert torch.equal(a.tokens[order], b.tokens) and torch.equal(a.lengths[order], b.lengths)


@pytest.mark.parametrize("rows", [1, 4, 9, 30])
def test_the_number_of_rows_decoded_at_once_is_irrelevant(small_gpt, rows):
    """The number of rows decoded at a time changes no token, log-probability or entropy."""
    prompts = prompts_of_all_lengths(7)[::-1]
    a = sample(small_gpt, prompts, 4, 12, EOS, PAD, generator(3, "test"))
    small_gpt.decode_rows = rows
    shapes = spy_on_hidden(small_gpt)
    b = sample(small_gpt, prompts, 4, 12, EOS, PAD, generator(3, "test"))
    assert max(n for n, _ in shapes) <= max(rows, 4)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.finished, b.finished)
    assert torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert torch.allclose(a.entropy, b.entropy, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(small_gpt):
    """A longer prompt beside a row changes its padding and its place in the batch, not its tokens."""
    a, b = (sample(small_gpt, [[1, 2, 3], other, [4]], 10, 8, EOS, PAD, generator(0, "test"))
            for other in ([5, 6], [7] * 9))
    for rows in (slice(0, 10), slice(20, 30)):
        assert torch.equal(a.tokens[rows], b.tokens[rows]) and torch.equal(a.finished[rows], b.finished[rows])


def test_only_the_given_generator_is_used(small_gpt):
    """One seed gives the same rollouts whatever the global generator did, and leaves that one alone."""
    def tokens(seed):
        return sample(small_gpt, [[1, 2]], 20, 8, EOS, PAD, generator(seed, "test")).tokens
    first = tokens(0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(tokens(0), first) and not torch.equal(tokens(1), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [1.0, .6])
def test_frequencies_match_softmax(small_gpt, temperature):
    """First and second tokens of 6,000 rows agree with the exact distribution, by chi-square."""
    rows = 6000
    out = sample(small_gpt, [[3, 1]], rows, 2, EOS, PAD, generator(0, "test"), temperature)
    with torch.inference_mode():
        first = (small_gpt(torch.tensor([[3, 1]]))[0, -1].double() / temperature).softmax(-1)
        after = small_gpt(torch.tensor([[3, 1, a] for a in range(11)]))[:, -1].double() / temperature
    second = torch.stack([p * q for a, (p, q) in enumerate(zip(first, after.softmax(-1))) if a != EOS]).sum(0)
    for seen, expected in ((out.tokens[:, 0], first), (out.tokens[out.lengths == 2, 1], second)):
        counts = torch.bincount(seen, minlength=11).double()
        expected = expected * rows
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 29.6                               # 99.9 % quantile with 10 degrees of freedom
    assert first.max() / first.min() > 3                                 # far from uniform


def test_the_inverse_cdf_hits_each_tokens_interval(bigram):
    """With probabilities .2, .3, .5 a u below .2 draws the first, below .5 the second, above the third."""
    model = bigram({0: {1: .2, 3: .3, 4: .5}}, n_vocab=6)
    u = torch.tensor([0., .1, .199, .201, .35, .499, .501, .9, LAST_UNIFORM])[:, None]
    out = draw(model, [[0]], u, eos=5)
    assert out.tokens[:, 0].tolist() == [1, 1, 1, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("u, expected", [(0., 2), (LAST_UNIFORM, 3)])
def test_a_token_of_probability_zero_is_never_drawn(bigram, u, expected):
    """At both ends of [0,1) the draw skips tokens whose probability is exactly 0 in float32."""
    model = bigram({0: {2: .5, 3: .5}}, n_vocab=6)
    out = draw(model, [[0]], torch.tensor([[u]]), eos=5)
    assert out.tokens.tolist() == [[expected]] and out.entropy.isfinite().all()


# ---- EOS ----------------------------------------------------------------------------------------------

def test_eos_is_a_target_with_a_gradient(gpt):
    """The completion [7, EOS] has two targets, and -logp pulls the EOS logit up at its own position."""
    eos, seen, original = 60, [], gpt.logits

    def logits(hidden):
        seen.append(original(hidden))
        seen[-1].retain_grad()
        return seen[-1]
    gpt.logits = logits
    ids, target = pack([[1, 2, 3]], [[7, eos]], 0)
    logp = completion_logprobs(gpt, ids, target)
    assert int(target.sum()) == 2 and logp.shape == (2,)
    (-logp.sum()).backward()
    p = seen[0].detach().softmax(-1)
    assert seen[0].grad.shape == (2, 61)                     # the head runs at two positions only
    assert torch.allclose(seen[0].grad[1, eos], p[1, eos] - 1, atol=1e-6)
    assert torch.allclose(seen[0].grad[0, 7], p[0, 7] - 1, atol=1e-6)


def test_pack_goes_by_lengths():
    """Targets come from recorded lengths; completions that hold the pad id lose no target."""
    pad = 0
    prompts, completions = [[5, 0, 6], [7], [8, 8]], [[0, 9], [0, 0, 0, 9], []]
    ids, target = pack(prompts, completions, pad)
    assert ids.tolist() == [[5, 0, 6, 0, 9], [7, 0, 0, 0, 9], [8, 8, 0, 0, 0]]
    assert target.long().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0] * 5]
    assert target.dtype == torch.bool and ids.dtype == torch.int64


def test_packed_logprobs_equal_single_rows(gpt, logprobs_of):
    """Padding on the right and other rows change no log-probability; the order is row after row."""
    prompts, completions = [[1, 2, 3, 4], [5], [6, 0]], [[0, 7, 60], [8, 0], [0, 0, 9, 1, 2]]
    for temperature in (1., .6):
        ids, target = pack(prompts, completions, 0)
        together = completion_logprobs(gpt, ids, target, temperature)
        alone = torch.cat([logprobs_of(gpt, p, c, temperature) for p, c in zip(prompts, completions)])
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("temperature, n_kv_heads", [(1., 2), (.6, 2), (.6, 1)])
def test_shared_prompts_give_the_same_logprobs(make_gpt, temperature, n_kv_heads):
    """Completions attend to prompts computed once, in any order and number per prompt, one-token prompts and
    one-token completions among them: the log-probabilities are those of whole rows."""
    gpt = make_gpt(n_kv_heads=n_kv_heads)
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9], [0, 0, 0], [10]]
    rows = [1, 0, 4, 4, 2, 3, 1, 0]
    completions = [[7, 60], [8], [0, 0, 9, 60], [5, 4, 3, 2, 1, 0, 60], [60], [0], [1], [2, 60]]
    whole = completion_logprobs(gpt, *pack([prompts[r] for r in rows], completions, 0), temperature)
    shared = SharedPrompts(gpt, prompts, 0)
    assert torch.allclose(shared_logprobs(gpt, shared, rows, completions, 0, temperature), whole, atol=1e-5)
    short = [i for i, completion in enumerate(completions) if len(completion) == 1]      # no padding, T = 1
    alone = torch.cat([completion_logprobs(gpt, *pack([prompts[rows[i]]], [completions[i]], 0), temperature)
                       for i in short])
    again = shared_logprobs(gpt, shared, [rows[i] for i in short], [completions[i] for i in short], 0,
                            temperature)
    assert torch.allclose(again, alone, atol=1e-5)


def test_shared_prompts_fill_the_context(gpt):
    """Limits: prompt and completion that fill the context of 64 together share as any others do."""
    prompts, completions = [[1] * 60, [2]], [[3, 4, 5, 60], [6, 60]]
    shared = shared_logprobs(gpt, SharedPrompts(gpt, prompts, 0), [0, 1], completions, 0)
    assert torch.allclose(shared, completion_logprobs(gpt, *pack(prompts, completions, 0)), atol=1e-5)


def test_sampled_rows_end_with_their_first_eos(small_gpt):
    """A finished row's last token is its only EOS, counted in its length; the rest is padding."""
    out = sample(small_gpt, prompts_of_all_lengths(6), 30, 20, EOS, PAD, generator(0, "test"))
    assert int(out.finished.sum()) > 100
    for row, tokens in enumerate(out.tokens.tolist()):
        n, finished = int(out.lengths[row]), bool(out.finished[row])
        assert tokens[:n].count(EOS) == finished and (tokens[n - 1] == EOS) == finished
        assert n == 20 or finished
        assert tokens[n:] == [PAD] * (20 - n)
        assert (out.logprobs[row, n:] == 0).all() and (out.entropy[row, n:] == 0).all()
        assert (out.logprobs[row, :n] < 0).all() and (out.entropy[row, :n] > 0).all()


def test_truncated_rows_have_all_tokens_and_no_eos(small_gpt):
    """A row without EOS within max_new is not finished and keeps max_new tokens."""
    never = 15                                                           # a row that no token uses
    out = sample(small_gpt, [[1], [2, 3]], 5, 7, never, PAD, generator(0, "test"))
    assert not out.finished.any() and (out.lengths == 7).all()
    assert [len(c) for c in out.completions()] == [7] * 10


def test_eos_at_the_last_place_is_not_a_truncation(bigram):
    """EOS as token max_new counts as finished."""
    model = bigram({0: {1: 1.}, 1: {2: 1.}}, n_vocab=3)
    assert sample(model, [[0]], 1, 2, 2, 2, generator(0, "test")).finished.tolist() == [True]
    assert sample(model, [[0]], 1, 1, 2, 2, generator(0, "test")).finished.tolist() == [False]


# ---- one distribution ---------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, .6])
def test_recorded_logprobs_are_the_trainers(small_gpt, temperature):
    """The sampler's log-probabilities equal those of the trainer, computed from logits/T, to 1e-5."""
    prompts = prompts_of_all_lengths(8)
    out = sample(small_gpt, prompts, 5, 12, EOS, PAD, generator(0, "test"), temperature)
    ids, target = pack([p for p in prompts for _ in range(5)], out.completions(), PAD)
    with torch.inference_mode():
        trainer = completion_logprobs(small_gpt, ids, target, temperature)
    recorded = torch.cat([row[:n] for row, n in zip(out.logprobs, out.lengths)])
    assert len(trainer) == int(out.lengths.sum())
    assert (recorded - trainer).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, .6])
def test_recorded_entropy_is_that_of_the_sampling_distribution(gpt, temperature):
    """Entropy is -sum p log p of softmax(logits/T), in nats, over the tokens in use."""
    out = sample(gpt, [[1, 2, 3]], 6, 4, 63, 0, generator(0, "test"), temperature)
    for row, completion in enumerate(out.completions()):
        for t in range(4):
            with torch.inference_mode():
                logits = gpt(torch.tensor([[1, 2, 3] + completion[:t]]))[0, -1].double() / temperature
            p = logits.softmax(-1)
            assert abs(float(out.entropy[row, t]) - float(-(p * p.log()).sum())) < 1e-4


def test_banned_rows_are_neither_sampled_nor_scored(gpt):
    """Unused rows of the head, which would win every draw if they took part, change nothing."""
    before = sample(gpt, [[1, 2]], 300, 3, 60, 0, generator(0, "test"))
    with torch.no_grad():
        gpt.head.weight[61:] = 100 * gpt.hidden(torch.tensor([[1, 2]]))[0, -1]
    after = sample(gpt, [[1, 2]], 300, 3, 60, 0, generator(0, "test"))
    assert int(after.tokens.max()) < 61 and torch.equal(after.tokens, before.tokens)
    with torch.inference_mode():
        p = completion_logprobs(gpt, *pack([[1, 2]] * 61, [[token] for token in range(61)], 0)).exp()
    assert abs(float(p.sum()) - 1) < 1e-5                                # the tokens in use share all of it


def test_temperature_zero_is_greedy(small_gpt):
    """Temperature 0 takes the argmax at every step, for all prompt lengths in one batch."""
    prompts = prompts_of_all_lengths()
    out = sample(small_gpt, prompts, 1, 15, EOS, PAD, generator(0, "test"), 0.0)
    for prompt, completion in zip(prompts, out.completions()):
        assert completion == draw_alone(small_gpt, prompt, torch.zeros(15), 0)[0]


def test_low_temperature_sharpens(bigram):
    """At T=.5 probabilities .2 and .8 become .2²/(.2²+.8²) = 1/17 and 16/17."""
    model = bigram({0: {1: .2, 2: .8}}, n_vocab=4)
    out = sample(model, [[0]], 2, 1, 3, 3, generator(0, "test"), .5)
    expected = torch.tensor([0., 1 / 17, 16 / 17, 0.])[out.tokens[:, 0]]
    assert torch.allclose(out.logprobs[:, 0].exp(), expected, atol=1e-4)


# ---- limits -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 55], [[1], [2] * 55]])
def test_prompts_that_do_not_fit_are_errors(gpt, prompts):
    """Limits: an empty prompt has no logits, and prompt + max_new beyond the context would lack positions."""
    with pytest.raises(ValueError, match="1 to 54 tokens"):
        sample(gpt, prompts, 2, 10, 60, 0, generator(0, "test"))


def test_a_prompt_that_just_fits_is_sampled(gpt):
    """Limits: prompt + max_new = context is allowed."""
    out = sample(gpt, [[1] * 54], 2, 10, 63, 0, generator(0, "test"))
    assert out.lengths.tolist() == [10, 10]


@pytest.mark.parametrize("tokens", [1, 7, 20, 64, 10_000])
def test_micro_batches_hold_every_row_once(tokens):
    """Each row is in exactly one micro-batch, which has at most `tokens` tokens unless it is one row."""
    lengths = [3, 9, 1, 7, 7, 20, 2, 5, 4, 9]
    batches = micro_batches(lengths, tokens)
    assert sorted(row for rows in batches for row in rows) == list(range(10))
    assert all(len(rows) == 1 or len(rows) * max(lengths[r] for r in rows) <= tokens for rows in batches)
    assert len(batches) == {1: 10, 10_000: 1}.get(tokens, len(batches))
