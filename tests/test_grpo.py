"""GRPO on numbers worked out by hand, on enumerations and on tiny models."""
import copy
import itertools
import json
import math

import pytest
import torch
import worlds

import ranks
import rl
from checkpoint import batch_indices, generator, load_model, save_checkpoint
from model import GPT, Rollouts, SharedPrompts, completion_logprobs, pack, sample, shared_logprobs

EOS, PAD = 60, 59           # of gpt, which has 61 tokens in use
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13]]
COMPLETIONS = [[14, 15, EOS], [16, EOS], [17, 18, 19, 20, PAD, 21, 22, 23], [EOS], [24, 25, 26, 27, EOS],
               [28] * 8]
ADVANTAGE = torch.tensor([1.5, -.5, -.5, .8, -1.2, .3])     # rows 2 and 5 are truncated: no EOS


@pytest.fixture
def make_batch(logprobs_of):
    """make_batch(model, ..., shift) -> rl.Batch that recorded the model's log-probabilities minus `shift`;
    with more completions than prompts each prompt has a group of them."""
    def make(model, prompts=PROMPTS, completions=COMPLETIONS, temperature=1., shift=0.) -> rl.Batch:
        B, group = len(completions), len(completions) // len(prompts)
        recorded = [logprobs_of(model, prompts[r // group], completions[r], temperature).detach() - shift
                    for r in range(B)]
        return rl.Batch(prompts, completions, recorded, ["wrong"] * B, [""] * B,
                        torch.zeros(len(prompts), group), 0., 0.)
    return make


def rows_of(batch) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every row."""
    group = len(batch.completions) // len(batch.prompts)
    return [(batch.prompts[r // group], completion) for r, completion in enumerate(batch.completions)]


def moved(model, seed=1):
    """The model a little further on: log-probabilities differ by some tenths of a nat."""
    other, gen = copy.deepcopy(model), generator(seed, "moved")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(.15 * p.std().nan_to_num(1.) * torch.randn(p.shape, generator=gen))
    return other.requires_grad_(False)


def gradient(model, batch, advantage, c, reference=None, rows=None):
    """(metrics, gradients by name) of rl.policy_gradient on a fresh .grad."""
    model.zero_grad(set_to_none=True)
    rows = range(len(batch.completions)) if rows is None else rows
    metrics = rl.policy_gradient(model, reference or model, batch, advantage, rows, c, PAD)
    return metrics, {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def weighted(model, logprobs_of, batch, weights, temperature=1.):
    """Gradients of sum(weight · logp), row by row, weights[row] being (length,) numbers."""
    model.zero_grad(set_to_none=True)
    for (prompt, completion), weight in zip(rows_of(batch), weights):
        (logprobs_of(model, prompt, completion, temperature) * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(a, b, tolerance=1e-6):
    """No entry differs by more than `tolerance` times the norm of the whole gradient, which is not small."""
    norm = sum(float((g ** 2).sum()) for g in b.values()) ** .5
    assert norm > .1
    for name in b:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * norm, name


# ---- advantages ---------------------------------------------------------------------------------------

def test_advantage_is_the_groups_z_score():
    """Unbiased std within the group; one right of 32 counts +5.48, each wrong one -.177."""
    r = torch.tensor([[1., 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]])
    half = .75 ** .5
    expected = torch.tensor([[1.5, -.5, -.5, -.5], [half, half, -half, -half], [-1.5, .5, .5, .5]])
    assert torch.allclose(rl.advantages(r), expected, atol=1e-5)
    rare = rl.advantages(torch.eye(32)[:1])[0]
    assert abs(float(rare[0]) - 5.48) < .005 and abs(float(rare[1]) + .177) < .0005


@pytest.mark.parametrize("rewards, std, expected", [
    ([1., 0, 0, 0], False, [.75, -.25, -.25, -.25]), ([0., 1e-6], True, [-.2929, .2929])])
def test_advantage_without_std_and_with_hardly_any(rewards, std, expected):
    """Without std only the mean is subtracted; 1e-6 is added to it: ±.5e-6 / (7.07e-7 + 1e-6) = ±.2929."""
    a = rl.advantages(torch.tensor([rewards]), std=std)
    assert torch.allclose(a, torch.tensor([expected]), atol=1e-3 * std, rtol=0)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("value", [0., 1., .1, .3, .7, -.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(value, std):
    """A group is silent if max == min: the mean of eight 0.1 is not 0.1 in float32, which gives -.0074."""
    for n in range(2, 40):
        assert (rl.advantages(torch.full((3, n), value), std) == 0).all()


def test_a_small_difference_is_a_signal():
    """A small standard deviation silences no group, and neither does another, equal group."""
    a = rl.advantages(torch.tensor([[1., 1., 1., 1 + 2 ** -20], [.1] * 4]))
    assert a[0, 3] > .3 and (a[0, :3] < -.1).all() and (a[1] == 0).all()


def test_signal_probability_is_the_enumeration():
    """The share of groups drawn from n <= 7 graded answers that are neither all right nor all wrong."""
    for n in range(1, 8):
        for right in range(n + 1):
            answers = [1] * right + [0] * (n - right)
            for group in range(1, n + 1):
                draws = list(itertools.combinations(answers, group))
                expected = sum(min(d) != max(d) for d in draws) / len(draws)
                assert abs(rl.signal_probability(answers, group) - expected) < 1e-12


@pytest.mark.parametrize("rewards, group, expected", [
    ([.2, .2, .7, 1.], 1, 0.), ([.2, .2, .7, 1.], 2, 5 / 6), ([.2, .2, .7, 1.], 3, 1.),
    ([.1] * 4, 2, 0.), ([.5, .5, .5, 0.], 3, .75), ([0., .25, .5, 1.], 2, 1.), ([.3, .3, .6, .6], 2, 2 / 3),
    ([-1., -1., 2.], 2, 2 / 3), ([.1 + .2, .3], 2, 1.)])
def test_signal_probability_of_shaped_rewards(rewards, group, expected):
    """Any two different rewards in a group are a signal: of the six pairs from .2, .2, .7, 1 one is equal."""
    assert abs(rl.signal_probability(rewards, group) - expected) < 1e-12
    assert abs(rl.signal_probability(rewards[::-1], group) - expected) < 1e-12


@pytest.mark.parametrize("group, rate, silent",
                         [(8, .01, .92), (8, .05, .66), (32, .01, .73), (32, .05, .19)])
def test_signal_probability_at_low_success_rates(group, rate, silent):
    """The reason why RL does nothing in early checkpoints: P(no signal) = p^G + (1-p)^G."""
    right = int(rate * 20_000)
    rewards = [1.] * right + [0.] * (20_000 - right)
    assert abs(1 - rl.signal_probability(rewards, group) - silent) < .01


# ---- the loss of a token ------------------------------------------------------------------------------

def test_on_policy_gradient_is_reinforce_bitwise():
    """The derivative by lp of -mean(exp(lp - lp.detach())·A), clipped, is -A/N without a rounding error."""
    gen = generator(0, "test")
    logp = (-3 * torch.rand(1000, generator=gen)).requires_grad_()
    advantage = torch.randn(1000, generator=gen)
    (rl.policy_loss(logp, logp.detach(), advantage, .2, .28).sum() / 1000).backward()
    other = logp.detach().requires_grad_()
    (-(other * advantage).sum() / 1000).backward()
    assert torch.equal(logp.grad, other.grad)


def test_one_update_per_batch_is_reinforce_bitwise(gpt, make_batch):
    """With updates=1 the gradient is REINFORCE's, bit for bit, though the recorded values are a bit off."""
    prompts, completions = (sorted(rows, key=len, reverse=True) for rows in (PROMPTS, COMPLETIONS))
    batch = make_batch(gpt, prompts, completions, .6, 1e-3)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(temperature=.6))
    gpt.zero_grad(set_to_none=True)
    shared = SharedPrompts(gpt, prompts, PAD)
    logp = shared_logprobs(gpt, shared, list(range(6)), completions, PAD, .6)
    each = torch.cat([ADVANTAGE[r].expand(len(c)) for r, c in enumerate(completions)])
    (-(logp * each).sum() / len(each)).backward()
    shared.backward()
    assert all(torch.equal(ours[name], p.grad) for name, p in gpt.named_parameters())
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("low, high, ratio, advantage, loss, slope", [
    (.2, .2, [1.3, 1.3, .7, .7], [1., -1., 1., -1.], [-1.2, 1.3, -.7, .8], [0., 1.3, -.7, 0.]),
    (.2, .28, [1.3, 1.3, .7, .7], [1., -1., 1., -1.], [-1.28, 1.3, -.7, .8], [0., 1.3, -.7, 0.]),
    (.5, .1, [.55, .99, 1.05, .55, 1.05], [2., 2., 2., -2., -2.], *2 * [[-1.1, -1.98, -2.1, 1.1, 2.1]])])
def test_clip_truth_table(low, high, ratio, advantage, loss, slope):
    """The clip ends the pull where A > 0 is above the range and where A < 0 is below it, only there; within
    [1 - low, 1 + high] loss and gradient are -ratio·A."""
    logp = torch.tensor(ratio).log().requires_grad_()
    found = rl.policy_loss(logp, torch.zeros(len(ratio)), torch.tensor(advantage), low, high)
    found.sum().backward()
    assert torch.allclose(found, torch.tensor(loss)) and torch.allclose(logp.grad, torch.tensor(slope))


def test_kl_k3_values():
    """The estimate exp(d) - d - 1 with d = reference - policy: 0, .14872, .10653, 4.38906, 1.13534."""
    d = torch.tensor([0., .5, -.5, 2., -2.])
    expected = torch.tensor([0., .14872, .10653, 4.38906, 1.13534])
    assert torch.allclose(rl.kl_k3(torch.full((5,), -3.), -3 + d), expected, atol=1e-5)


def test_kl_k3_of_small_differences():
    """For d = 1e-4 float32 gives d²/2 = 5e-9, where exp(d) - d - 1 gives 0."""
    assert abs(float(rl.kl_k3(torch.zeros(1), torch.full((1,), 1e-4))) / 5e-9 - 1) < .01
    assert rl.Config().kl == 0                                           # off by default


def test_kl_k3_is_unbiased():
    """The mean of k3 under the policy is KL(policy || reference), for any two distributions."""
    p, q = torch.tensor([[.1, .2, .7], [.5, .3, .2]], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    assert abs(float((p * rl.kl_k3(p.log(), q.log())).sum() - exact)) < 1e-12


# ---- token-mean over the whole update -----------------------------------------------------------------

def test_the_two_row_example(gpt, make_batch, logprobs_of):
    """For A = [1, -1], lengths [1, 3]: loss .5, d/dlogp -.25 and +.25 per token (a mean per row: 0)."""
    batch = make_batch(gpt, [[1, 2], [3]], [[EOS], [4, 5, EOS]])
    metrics, ours = gradient(gpt, batch, torch.tensor([1., -1.]), rl.Config())
    assert abs(metrics["loss"] - .5) < 1e-6
    assert_close(ours, weighted(gpt, logprobs_of, batch, [-.25, .25]))


@pytest.mark.parametrize("changes", [{}, {"temperature": .6}, {"updates": 2, "kl": .1, "clip_low": .05}])
def test_micro_batches_only_sum(gpt, make_batch, changes):
    """Gradients and metrics agree for micro-batches of 1 row, some rows and all rows."""
    reference = moved(gpt)
    batch = make_batch(gpt, temperature=changes.get("temperature", 1.), shift=.1)
    all_rows, expected = gradient(gpt, batch, ADVANTAGE, rl.Config(micro_tokens=1_000, **changes), reference)
    for tokens in (1, 10, 20, 30):
        metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(micro_tokens=tokens, **changes), reference)
        assert_close(ours, expected)
        assert metrics.keys() == all_rows.keys()
        for name, value in metrics.items():
            assert abs(value - all_rows[name]) < 1e-5, name


@pytest.mark.parametrize("temperature", [1., .6])
def test_gradient_equals_the_sum_over_single_rows(gpt, make_batch, logprobs_of, temperature):
    """The gradient is -A/N per token, N = 27, for finished, truncated and one-token rows alike, at any T."""
    batch = make_batch(gpt, temperature=temperature)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(temperature=temperature))
    n = sum(map(len, COMPLETIONS))
    assert_close(ours, weighted(gpt, logprobs_of, batch, [-float(a) / n for a in ADVANTAGE], temperature))
    expected = -sum(float(a) * len(c) for a, c in zip(ADVANTAGE, COMPLETIONS)) / n
    assert n == 27 and abs(metrics["loss"] - expected) < 1e-6


def test_skipping_silent_rows_changes_nothing(gpt, make_batch, logprobs_of):
    """Rows without advantage are not computed, but their tokens stay in the denominator."""
    advantage = torch.tensor([1.5, 0., 0., -.5, 0., -1.])
    batch = make_batch(gpt)
    metrics, ours = gradient(gpt, batch, advantage, rl.Config())
    assert_close(ours, weighted(gpt, logprobs_of, batch, [-float(a) / 27 for a in advantage]))
    assert abs(metrics["loss"] - (-1.5 * 3 + .5 * 1 + 1. * 8) / 27) < 1e-6


def test_rows_of_an_update_have_their_own_denominator(gpt, make_batch, logprobs_of):
    """The denominator counts the tokens of the rows of this optimizer step, none of the others."""
    batch = make_batch(gpt)
    _, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(), rows=range(2, 4))
    assert_close(ours, weighted(gpt, logprobs_of, batch, [0., 0., .5 / 9, -.8 / 9, 0., 0.]))


def test_gradients_add_up(gpt, make_batch):
    """Gradients are added to .grad by policy_gradient, so that two calls give the sum."""
    batch, c = make_batch(gpt), rl.Config()
    _, once = gradient(gpt, batch, ADVANTAGE, c)
    rl.policy_gradient(gpt, gpt, batch, ADVANTAGE, range(6), c, PAD)
    twice = {name: p.grad for name, p in gpt.named_parameters()}
    assert_close(twice, {name: 2 * g for name, g in once.items()})


# ---- several updates per batch ------------------------------------------------------------------------

def test_several_updates_use_the_recorded_logprobs(gpt, make_batch, logprobs_of):
    """With updates=2 the ratio is exp(logp - recorded) = e^.1 here, and weighs every token's gradient."""
    batch = make_batch(gpt, temperature=.6, shift=.1)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(updates=2, temperature=.6))
    assert abs(metrics["ratio"] - math.exp(.1)) < 1e-5 and metrics["clip_fraction"] == 0
    expected = [-math.exp(.1) * float(a) / 27 for a in ADVANTAGE]
    assert_close(ours, weighted(gpt, logprobs_of, batch, expected, .6))


@pytest.mark.parametrize("shift, low, high, clipped", [
    (.3, .2, .2, (0, 3, 5)), (-.3, .2, .2, (1, 2, 4)), (.3, .1, .5, ()), (-.3, .5, .1, ())])
def test_clipped_rows_have_no_gradient(gpt, make_batch, logprobs_of, shift, low, high, clipped):
    """A ratio e^.3 > 1.2 ends the pull up, e^-.3 < .8 the pull down; the share is of 27 tokens."""
    batch = make_batch(gpt, shift=shift)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(updates=2, clip_low=low, clip_high=high))
    pull = [-math.exp(shift) * float(a) / 27 for a in ADVANTAGE]
    weights = [0. if r in clipped else x for r, x in enumerate(pull)]
    assert_close(ours, weighted(gpt, logprobs_of, batch, weights))
    assert abs(metrics["clip_fraction"] - sum(len(COMPLETIONS[r]) for r in clipped) / 27) < 1e-6


def test_the_clip_fraction_counts_silent_tokens_too(gpt, make_batch):
    """Logged metrics have the denominator of the loss: 3 clipped tokens of 27, though 3 were computed."""
    advantage = torch.tensor([1., 0, 0, 0, 0, 0])
    metrics, _ = gradient(gpt, make_batch(gpt, shift=.3), advantage, rl.Config(updates=2))
    assert abs(metrics["clip_fraction"] - 3 / 27) < 1e-6 and abs(metrics["loss"] + 1.2 * 3 / 27) < 1e-6


def test_the_second_update_is_off_policy(gpt, make_batch, logprobs_of):
    """After an optimizer step the ratio to the recorded log-probabilities is no longer 1."""
    batch, c = make_batch(gpt), rl.Config(updates=2)
    first, _ = gradient(gpt, batch, ADVANTAGE, c, rows=range(0, 4))
    torch.optim.SGD(gpt.parameters(), lr=.1).step()
    second, _ = gradient(gpt, batch, ADVANTAGE, c, rows=range(4, 6))
    now = torch.cat([logprobs_of(gpt, PROMPTS[r], COMPLETIONS[r]).detach() for r in (4, 5)])
    ratio = float((now - torch.cat(batch.logprobs[4:])).exp().mean())
    assert abs(first["ratio"] - 1) < 1e-5 and abs(ratio - 1) > .01 and abs(second["ratio"] - ratio) < 1e-5


@pytest.mark.parametrize("shift", [.3, -.3])
def test_without_advantage_nothing_is_clipped(gpt, make_batch, shift):
    """At A = 0 both sides of the clip are 0; tokens computed for the KL penalty alone are not clipped."""
    metrics, _ = gradient(gpt, make_batch(gpt, shift=shift), torch.zeros(6), rl.Config(updates=2, kl=.1))
    assert metrics["clip_fraction"] == 0


# ---- a prompt is computed once for its group ----------------------------------------------------------

GROUPED = dict(prompts=[[1], [2, 3, 4, 5, 6, 7, 8], [9, 10], [11]],
               completions=[[14, 15, EOS], [EOS], [16, PAD, PAD, 17, 18], [19, EOS], [20] * 8, [21, EOS],
                            [22], [23, 24, 25, EOS], [26, 27, EOS], [28, EOS], [29] * 6, [30, EOS]])
GROUPED_ADVANTAGE = torch.tensor([1.1, -.5, -.6, 0., 0., 0., -1.1, .5, .6, 1., -.4, -.6])    # 4 groups of 3


def plain_gradient(model, reference, batch, advantage, c):
    """Gradients of the same loss from one batch of whole rows, prompts and all, without micro-batches."""
    model.zero_grad(set_to_none=True)
    ids, target = pack(*map(list, zip(*rows_of(batch))), PAD)
    logp = completion_logprobs(model, ids, target, c.temperature)
    old = logp.detach() if c.updates == 1 else torch.cat(batch.logprobs)
    each = torch.cat([a.expand(len(completion)) for a, completion in zip(advantage, batch.completions)])
    loss = rl.policy_loss(logp, old, each, c.clip_low, c.clip_high)
    if c.kl:
        with torch.no_grad():
            other = completion_logprobs(reference, ids, target, c.temperature)
        loss = loss + c.kl * rl.kl_k3(logp, other)
    loss.mean().backward()
    return float(loss.detach().mean()), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_tokens", [1, 6, 12, 25, 1_000])
@pytest.mark.parametrize("changes", [{}, {"kl": .3}, {"updates": 3, "temperature": .6, "clip_low": .05},
                                     {"updates": 3, "kl": .3, "clip_high": .05}])
def test_shared_prompts_give_the_plain_gradient(gpt, make_batch, changes, micro_tokens):
    """Prompts of 1 to 7 tokens are computed once per chunk, completions attend to them: the gradients are
    those of whole rows within 1e-5, for one update and several, with and without KL, for any chunks."""
    c = rl.Config(micro_tokens=micro_tokens, **changes)
    reference, batch = moved(gpt), make_batch(gpt, **GROUPED, temperature=c.temperature, shift=.1)
    loss, expected = plain_gradient(gpt, reference, batch, GROUPED_ADVANTAGE, c)
    metrics, ours = gradient(gpt, batch, GROUPED_ADVANTAGE, c, reference)
    assert_close(ours, expected, 1e-5)
    assert abs(metrics["loss"] - loss) < 1e-5


@pytest.mark.parametrize("rows", [range(0, 3), range(3, 9), range(6, 12)])
def test_an_update_takes_its_own_groups(gpt, make_batch, logprobs_of, rows):
    """Row p·G + g belongs to prompt p, also in an update that begins in the middle of the batch."""
    batch, n = make_batch(gpt, **GROUPED), sum(len(GROUPED["completions"][r]) for r in rows)
    _, ours = gradient(gpt, batch, GROUPED_ADVANTAGE, rl.Config(), rows=rows)
    weights = [-float(a) / n if r in rows else 0. for r, a in enumerate(GROUPED_ADVANTAGE)]
    assert_close(ours, weighted(gpt, logprobs_of, batch, weights))


@pytest.mark.parametrize("micro_tokens, chunks", [(1_000, 1), (2, 2), (1, 3)])
def test_a_prompt_is_computed_once(gpt, make_batch, micro_tokens, chunks):
    """Of 12 rows in 4 groups one group is silent: three prompts and nine completions run through the model,
    each once; the metric `positions` counts their tokens."""
    batch, seen, original = make_batch(gpt, **GROUPED), {True: [], False: []}, gpt.hidden

    def hidden(ids, cache):
        seen[cache.prompt_of_row is None].append(len(ids))               # of prompts, of completions
        return original(ids, cache)
    gpt.hidden = hidden
    metrics, _ = gradient(gpt, batch, GROUPED_ADVANTAGE, rl.Config(micro_tokens=micro_tokens))
    assert len(seen[True]) == chunks and sum(seen[True]) == 3 and sum(seen[False]) == 9
    computed = [GROUPED["completions"][r] for r in range(12) if not 3 <= r < 6]
    assert metrics["positions"] == sum(map(len, computed)) + 1 + 2 + 1


@pytest.mark.parametrize("advantage, rows", [([1., 0, 0, 0, 0, 0], 3), ([1., 0, 0, 0, 0, -1.], 11)])
def test_the_ratio_of_a_skipped_token_is_1(gpt, make_batch, advantage, rows):
    """The logged ratio is the mean over all 27 tokens of the update, of which 3 or 11 were computed."""
    metrics, _ = gradient(gpt, make_batch(gpt, shift=.1), torch.tensor(advantage), rl.Config(updates=2))
    assert abs(metrics["ratio"] - (1 + rows * math.expm1(.1) / 27)) < 1e-5


# ---- the KL penalty -----------------------------------------------------------------------------------

def test_kl_penalty_reaches_all_rows(gpt, make_batch, logprobs_of):
    """With kl > 0 silent rows are computed too; each token adds kl·(1 - exp(reference - logp))/N."""
    reference, batch = moved(gpt), make_batch(gpt, temperature=.6)
    advantage = torch.tensor([1., -1., 0., 0., 0., 0.])
    metrics, ours = gradient(gpt, batch, advantage, rl.Config(kl=.5, temperature=.6), reference)
    differences = [(logprobs_of(reference, p, c, .6) - old).detach()
                   for p, c, old in zip(PROMPTS, COMPLETIONS, batch.logprobs)]
    weights = [(-a + .5 * (1 - d.exp())) / 27 for a, d in zip(advantage, differences)]
    assert_close(ours, weighted(gpt, logprobs_of, batch, weights, .6))
    d = torch.cat(differences).double()
    assert abs(metrics["kl_penalty"] - float((d.exp() - d - 1).mean())) < 1e-5
    assert all(p.grad is None for p in reference.parameters())


def test_the_flops_of_a_reference_count(gpt, make_batch):
    """A forward pass of the reference over the trained positions, besides three of the model's."""
    batch = make_batch(gpt)
    plain, with_kl = (rl.grpo_flops(gpt, batch, 10, rl.Config(kl=kl)) for kl in (0., .1))
    assert with_kl - plain == 10 * gpt.flops_per_token(6)        # prompts of 13/6 tokens, answers of 27/6


def test_kl_penalty_alone_is_a_signal(gpt, make_batch):
    """Without any advantage the penalty still pulls back to the reference, where it is 0."""
    batch = make_batch(gpt)
    metrics, grads = gradient(gpt, batch, torch.zeros(6), rl.Config(kl=.1), moved(gpt))
    assert metrics["kl_penalty"] > .01 and float(grads["head.weight"].abs().max()) > 1e-4
    metrics, grads = gradient(gpt, batch, torch.zeros(6), rl.Config(kl=.1), copy.deepcopy(gpt))
    assert abs(metrics["kl_penalty"]) < 1e-9 and float(grads["head.weight"].abs().max()) < 1e-6


def test_kl_to_reference_compares_with_the_recorded_logprobs(gpt, make_batch, logprobs_of):
    """The logged KL is the k3 mean per token of recorded against the reference's log-probabilities, at T."""
    batch, reference, c = make_batch(gpt, temperature=.6), moved(gpt), rl.Config(temperature=.6)
    with torch.inference_mode():
        d = torch.cat([logprobs_of(reference, p, x, .6) - old
                       for p, x, old in zip(PROMPTS, COMPLETIONS, batch.logprobs)]).double()
    exact = float((d.exp() - d - 1).mean())
    assert exact > .01 and abs(rl.kl_to_reference(reference, batch, c, PAD) / exact - 1) < 1e-4
    assert rl.kl_to_reference(gpt, batch, c, PAD) < 1e-9


# ---- rows and groups ----------------------------------------------------------------------------------

def test_eos_is_trained(gpt, make_batch):
    """A rewarded completion [7, EOS] raises both tokens: at EOS's logit the gradient is -A(1 - p)/2."""
    batch, original, seen = make_batch(gpt, [[1, 2]], [[7, EOS]]), gpt.logits, []

    def logits(hidden):
        seen.append(original(hidden))
        seen[-1].retain_grad()
        return seen[-1]
    gpt.logits = logits
    gradient(gpt, batch, torch.tensor([1.]), rl.Config())
    p = seen[0].detach().softmax(-1)
    assert torch.allclose(seen[0].grad[[0, 1], [7, EOS]], -(1 - p[[0, 1], [7, EOS]]) / 2, atol=1e-6)


def test_advantages_follow_their_rows():
    """Shuffling rows within groups, or whole groups, shuffles the advantages likewise."""
    rewards = (torch.rand(6, 8, generator=generator(0, "test")) < .3).float()
    a, gen = rl.advantages(rewards), generator(1, "test")
    for _ in range(5):
        groups, columns = torch.randperm(6, generator=gen), torch.randperm(8, generator=gen)
        assert torch.allclose(rl.advantages(rewards[groups][:, columns]), a[groups][:, columns], atol=1e-6)


def test_gradient_does_not_depend_on_the_order_of_rows(gpt, make_batch):
    """Rows and their advantages in another order give the same gradient: sorting is internal."""
    _, expected = gradient(gpt, make_batch(gpt, shift=.1), ADVANTAGE, rl.Config(updates=2, micro_tokens=20))
    for seed in range(4):
        order = torch.randperm(6, generator=generator(seed, "order")).tolist()
        batch = make_batch(gpt, [PROMPTS[r] for r in order], [COMPLETIONS[r] for r in order], shift=.1)
        _, ours = gradient(gpt, batch, ADVANTAGE[order], rl.Config(updates=2, micro_tokens=20))
        assert_close(ours, expected)


def test_a_duplicated_problem_stays_two_groups(answer_tokenizer, answering):
    """The same question with another answer: row p·G + g is graded against problem p's answer."""
    model = answering(wrong=0.)
    problems = [{"question": "x", "answer": a} for a in ("8", "7", "7", "8")]
    batch = rl.collect(model, answer_tokenizer, problems, 3, rl.Config(max_new=6), generator(0, "test"))
    assert batch.rewards.tolist() == [[0.] * 3, [1.] * 3, [1.] * 3, [0.] * 3]
    assert batch.grades == ["wrong"] * 3 + ["right"] * 6 + ["wrong"] * 3
    prompt = [answer_tokenizer.eos, *answer_tokenizer.encode("x\n")]
    assert batch.texts == ["#### 7"] * 12 and batch.prompts == [prompt] * 4


def test_collect_records_what_was_sampled(answer_tokenizer, answering):
    """The batch has completions with EOS, log-probability of each token, entropy ln 2 in one of four."""
    model = answering()
    problems = [{"question": "a", "answer": "7"}, {"question": "bb", "answer": "8"}]
    batch = rl.collect(model, answer_tokenizer, problems, 200, rl.Config(max_new=8), generator(0, "test"))
    four = answer_tokenizer.encode("####")[0]
    assert all(c in ([four, 32, ord(d), answer_tokenizer.eos] for d in "78") for c in batch.completions)
    expected = torch.tensor([0., 0., math.log(.5), 0.])
    assert all(torch.allclose(x, expected, atol=1e-4) for x in batch.logprobs)
    assert abs(batch.entropy - math.log(2) / 4) < 1e-4 and batch.truncated == 0
    assert (abs(batch.rewards.mean(1) - .5) < .12).all()
    assert [g == "right" for g in batch.grades] == batch.rewards.flatten().bool().tolist()


def test_collect_at_a_temperature(answer_tokenizer, answering):
    """Rollouts at T=.5 turn .8/.2 into 16/17 and 1/17, in draws, records and entropy."""
    model = answering(wrong=.2)
    problems = [{"question": "a", "answer": "7"}]
    c = rl.Config(max_new=8, temperature=.5)
    batch = rl.collect(model, answer_tokenizer, problems, 400, c, generator(0, "test"))
    assert abs(float(batch.rewards.mean()) - 16 / 17) < .04
    for grade, logp in zip(batch.grades, batch.logprobs):
        assert abs(float(logp[2].exp()) - (16 if grade == "right" else 1) / 17) < 1e-4
    entropy = -(16 / 17 * math.log(16 / 17) + math.log(1 / 17) / 17)
    assert abs(batch.entropy - entropy / 4) < 1e-4


def test_truncated_answers(answer_tokenizer, answering):
    """Cut off before EOS '#### 7' is not complete (78 may be meant): reward 0, and it is counted."""
    model = answering(wrong=0.)
    problems = [{"question": "a", "answer": "7"}]
    batch = rl.collect(model, answer_tokenizer, problems, 4, rl.Config(max_new=3), generator(0, "test"))
    assert batch.truncated == 1 and batch.texts == ["#### 7"] * 4
    assert batch.rewards.tolist() == [[0.] * 4] and batch.grades == ["unparsed"] * 4
    assert [len(c) for c in batch.completions] == [3] * 4 and all(len(x) == 3 for x in batch.logprobs)


def test_truncated_share_counts_rollouts(monkeypatch, answer_tokenizer, answering):
    """One of four rollouts cut off is .25; having given a complete answer, it keeps its reward."""
    model, eos = answering(), answer_tokenizer.eos
    rows = [answer_tokenizer.encode(text) + [eos] for text in ("#### 7", "#### 8", "#### 7\n", "x")]
    rows[2].pop()
    tokens = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    entropy = torch.tensor([[.1, .2, .3, .4], [1., 1., 1., 1.], [.5] * 4, [2., 2., 0., 0.]])
    out = Rollouts(tokens, torch.tensor([len(r) for r in rows]), torch.tensor([True, True, False, True]),
                   torch.zeros(4, 4), entropy)
    monkeypatch.setattr(ranks, "sample_together", lambda *args, **kwargs: out)
    problems = [{"question": "a", "answer": "7"}]
    batch = rl.collect(model, answer_tokenizer, problems, 4, rl.Config(), generator(0, "test"))
    assert batch.truncated == .25 and batch.rewards.tolist() == [[1., 0., 1., 0.]]
    assert batch.grades == ["right", "wrong", "right", "unparsed"]
    assert abs(batch.entropy - (1. + 4. + 2. + 4.) / 14) < 1e-6          # per token, not per row
    assert batch.completions == rows


@pytest.mark.parametrize("shaped, wrong, signal", [
    (rl.reward, .5, True), (rl.reward, 1., False),
    (lambda problem, text, grade: {"right": 1., "wrong": .2, "unparsed": 0.}[grade], 1., True),
    (lambda problem, text, grade: .5, .5, False),
    (lambda problem, text, grade: float(text == f"#### {problem['answer']}") / 3, .5, True)])
def test_probe_counts_grades_and_expects_signals_of_rewards(
        answer_tokenizer, answering, monkeypatch, capsys, shaped, wrong, signal):
    """The right and the unparsed share are those of the grades, whatever a shaped reward makes of them; the
    share of groups with a signal is that of the rewards, enumerated here, and its absence has a warning."""
    monkeypatch.setattr(rl, "reward", shaped)
    problems = [{"question": f"q{i}", "answer": "7"} for i in range(4)]
    model, c = answering(wrong, .25), rl.Config(rollouts=3, max_new=8, seed=2)
    rl.probe(model, answer_tokenizer, problems, c)
    said = capsys.readouterr().out
    batch = rl.collect(model, answer_tokenizer, problems, 6, c, generator(2, "probe"))
    each = [shaped(problems[r // 6], batch.texts[r], batch.grades[r]) for r in range(24)]
    assert torch.allclose(batch.rewards.flatten(), torch.tensor(each))
    draws = [draw for p in range(4) for draw in itertools.combinations(each[6 * p:6 * p + 6], 3)]
    share = sum(min(draw) != max(draw) for draw in draws) / len(draws)
    assert (0 < share < 1) if signal else share == 0
    right, unparsed = (batch.grades.count(grade) / 24 for grade in ("right", "unparsed"))
    assert said.startswith(f"before training: {right:.1%} of 24 answers right, {unparsed:.1%} unparsed; "
                           f"about {share:.0%} of groups of 3 will have a signal")
    assert ("WARNING: no group has a signal" in said) == (not signal)


# ---- steps --------------------------------------------------------------------------------------------

def test_no_signal_leaves_no_gradient(gpt, make_batch):
    """With all advantages 0 the result is None, and every .grad is None, not zero."""
    metrics, grads = gradient(gpt, make_batch(gpt), torch.zeros(6), rl.Config())
    assert metrics is None and all(g is None for g in grads.values())
    advantage = ADVANTAGE.where(torch.arange(6) < 4, 0.)
    metrics, grads = gradient(gpt, make_batch(gpt), advantage, rl.Config(), rows=range(4, 6))
    assert metrics is None and all(g is None for g in grads.values())


@pytest.fixture
def run_rl(tmp_path):
    """run_rl(model, tokenizer, answers, **options) -> (model before, model after, steps in the log)."""
    def run(model, tokenizer, answers, **changes):
        for split in ("train", "val"):
            problems = [{"question": f"{split} {i}", "answer": a, "difficulty": "easy"}
                        for i, a in enumerate(answers)]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
        save_checkpoint(tmp_path / "start.pt", model, tokenizer, [])
        c = rl.Config(str(tmp_path / "start.pt"), str(tmp_path), out=str(tmp_path / "run"), max_new=8,
                      eval_problems=2, eval_samples=2, device="cpu", threads=1, **changes)
        after = load_model(worlds.quietly(rl.train, c))[0]
        log = worlds.lines(tmp_path / "run/log.jsonl")
        return load_model(c.init)[0], after, [line for line in log if "reward" in line]
    return run


def test_no_signal_no_step(run_rl, answer_tokenizer, answering):
    """Where all answers are wrong, weight decay (on a zero gradient) must not move the model."""
    model = answering(wrong=1.)
    before, after, log = run_rl(model, answer_tokenizer, ["7", "7"], n_problems=2, rollouts=4, steps=3,
                                weight_decay=.1, lr=.1)
    assert [line["signal"] for line in log] == [0., 0., 0.] and log[-1]["updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_the_log_has_the_metrics_of_the_batch(run_rl, answer_tokenizer, answering):
    """The metrics are reward, share of groups with a signal, unparsed, truncated, entropy of the rollouts."""
    model, answers = answering(wrong=.3), list("787978")
    before, after, log = run_rl(model, answer_tokenizer, answers, n_problems=6, rollouts=3, steps=1, seed=3)
    problems = [{"question": f"train {i}", "answer": a} for i, a in enumerate(answers)]
    chosen = [problems[i] for i in batch_indices(6, 6, 0, 3, "rl")]
    batch = rl.collect(before, answer_tokenizer, chosen, 3, rl.Config(max_new=8), generator(3, "rollouts", 0))
    signals = sum(0 < sum(group) < 3 for group in batch.rewards.tolist()) / 6
    expected = {"reward": sum(batch.grades[r] == "right" for r in range(18)) / 18, "signal": signals,
                "unparsed": 0., "truncated": 0., "entropy": batch.entropy, "length": 4.}
    assert 0 < signals < 1
    for name, value in expected.items():
        assert abs(log[0][name] - value) < 1e-6, name
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_logged_flops_count_a_prompt_once(run_rl, answer_tokenizer, answering):
    """A step of 2 problems x 4 rollouts, prompts of 9 tokens, answers of 4: 18 + 32 positions forward in
    sampling; in the update three times 9 + 4 · 4 per group with a signal."""
    model = answering()
    _, _, log = run_rl(model, answer_tokenizer, ["7", "8"], n_problems=2, rollouts=4, steps=6)
    for before, line in zip([{"flops": 0}, *log], log):
        positions = 18 + 32 + 3 * 2 * line["signal"] * (9 + 16)
        assert line["flops"] - before["flops"] == model.flops_per_token(13) * positions
    assert len({line["signal"] for line in log}) > 1


def test_parameters_are_fp32(gpt):
    """An AdamW step of lr 1e-6 moves fp32 parameters, and none in bf16, where 1 + 1e-6 is 1."""
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    half = copy.deepcopy(gpt).bfloat16()
    for model, moves in ((gpt, True), (half, False)):
        model.embed.weight.data.fill_(.02)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW([model.embed.weight, model.norm], lr=1e-6, weight_decay=0.)
        for p in (model.embed.weight, model.norm):
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name in ("embed.weight", "norm"):
            assert torch.equal(before[name], model.state_dict()[name]) != moves


def test_bf16_through_autocast_only(gpt, make_batch):
    """Under autocast parameters and gradients stay fp32, and the gradient is that of fp32 within 5 %."""
    batch = make_batch(gpt)
    _, exact = gradient(gpt, batch, ADVANTAGE, rl.Config())
    with torch.autocast("cpu", torch.bfloat16):
        metrics, rough = gradient(gpt, batch, ADVANTAGE, rl.Config())
    for name, g in exact.items():
        assert rough[name].dtype == torch.float32
        assert float((rough[name] - g).norm()) < .05 * float(g.norm()) + 1e-6


# ---- does it learn? -----------------------------------------------------------------------------------

@pytest.mark.parametrize("updates", [1, 3])
def test_thirty_steps_raise_the_rewarded_token(make_gpt, updates):
    """GRPO: thirty batches of one-token answers turn a token of probability .09 into the likely answer."""
    model: GPT = make_gpt(vocab_size=16, n_vocab=11)
    prompts, wanted, group = [[1], [2, 3], [4]], [7, 3, 5], 16
    optimizer, c = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.), rl.Config(updates=updates)

    def probability():
        with torch.inference_mode():
            last = [model(torch.tensor([p]))[0, -1].softmax(-1) for p in prompts]
        return sum(float(p[w]) for p, w in zip(last, wanted)) / 3
    start = probability()
    for step in range(30):
        out = sample(model, prompts, group, 1, 10, 9, generator(0, "rollouts", step))
        rewards = (out.tokens.view(3, group) == torch.tensor(wanted)[:, None]).float()
        batch = rl.Batch(prompts, out.completions(), list(out.logprobs), [""] * 48, [""] * 48, rewards, 0.,
                         0.)
        advantage = rl.advantages(rewards).flatten()
        for i in range(0, 48, 48 // updates):
            if rl.policy_gradient(model, model, batch, advantage, range(i, i + 48 // updates), c, 9):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert start < .2 and probability() > .8
