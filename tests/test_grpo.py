"""GRPO on numbers worked out by hand, on enumerations and on tiny models."""
import copy
import itertools
import json
import math

import pytest
import torch
import worlds
from conftest import on_cpu, on_every_device

import ranks
import rl
from checkpoint import batch_indices, generator, load_model, save_checkpoint
from model import Rollouts, SharedPrompts, sample, shared_logprobs

EOS, PAD = 60, 59           # of gpt, which has 61 tokens in use
SIX = dict(prompts=[[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13]],
           completions=[[14, 15, EOS], [16, EOS], [17, 18, 19, 20, PAD, 21, 22, 23], [EOS],
                        [24, 25, 26, 27, EOS], [28] * 8])                # 27 tokens, rows 2 and 5 without EOS
ADVANTAGE = torch.tensor([1.5, -.5, -.5, .8, -1.2, .3])
GROUPED = dict(prompts=[[1], [2, 3, 4, 5, 6, 7, 8], [9, 10], [11]],
               completions=[[14, 15, EOS], [EOS], [16, PAD, PAD, 17, 18], [19, EOS], [20] * 8, [21, EOS],
                            [22], [23, 24, 25, EOS], [26, 27, EOS], [28, EOS], [29] * 6, [30, EOS]])
GROUPED_ADVANTAGE = torch.tensor([1.1, -.5, -.6, 0., 0., 0., -1.1, .5, .6, 1., -.4, -.6])    # 4 groups of 3
SEVEN = [{"question": "a", "answer": "7"}]


@pytest.fixture
def row_logprobs(logprobs_of):
    """row_logprobs(model, batch, T) -> log-probabilities (length,) of every row, each computed alone."""
    def compute(model, batch, temperature=1.) -> list[torch.Tensor]:
        group = batch.rewards.shape[1]
        return [logprobs_of(model, batch.prompts[r // group], completion, temperature)
                for r, completion in enumerate(batch.completions)]
    return compute


@pytest.fixture
def make_batch(row_logprobs):
    """make_batch(model, ..., shift) -> rl.Batch that recorded the model's log-probabilities minus `shift`;
    with more completions than prompts each prompt has a group of them."""
    def make(model, prompts=SIX["prompts"], completions=SIX["completions"], temperature=1., shift=0.):
        B, P = len(completions), len(prompts)
        batch = rl.Batch(prompts, completions, [], ["wrong"] * B, [""] * B, torch.zeros(P, B // P), 0., 0.)
        alone = row_logprobs(on_cpu(model), batch, temperature)
        batch.logprobs = [logp.detach() - shift for logp in alone]
        return batch
    return make


@pytest.fixture
def weighted(row_logprobs):
    """weighted(model, batch, weights, T) -> gradient of sum(weight · logp), weights by row or token."""
    def compute(model, batch, weights, temperature=1.) -> torch.Tensor:
        model = on_cpu(model)
        for logp, weight in zip(row_logprobs(model, batch, temperature), weights):
            (logp * weight).sum().backward()
        return gradient_of(model)
    return compute


def gradient_of(model) -> torch.Tensor:
    """All gradients in one vector, on the CPU."""
    return torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters()).cpu()


def gradient(model, batch, advantage, c, reference=None, rows=None) -> tuple[dict, torch.Tensor]:
    """(metrics, gradient) of rl.policy_gradient on a fresh .grad."""
    model.zero_grad()
    rows = range(len(batch.completions)) if rows is None else rows
    metrics = rl.policy_gradient(model, reference or model, batch, advantage, rows, c, PAD)
    return metrics, gradient_of(model)


def moved(model):
    """The model a little further on: log-probabilities differ by some tenths of a nat."""
    other, gen = copy.deepcopy(model), generator(1, "moved")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(.15 * p.std().nan_to_num(1.) * torch.randn(p.shape, generator=gen).to(p.device))
    return other.requires_grad_(False)


def assert_close(a, b, tolerance=1e-6):
    """No entry differs by more than `tolerance` times the norm of the whole gradient, which is not small."""
    assert b.norm() > .1
    assert (a - b).abs().max() <= tolerance * b.norm()


# ---- advantages ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("rewards, std, expected", [
    ([1., 0, 0, 0], True, [1.5, -.5, -.5, -.5]),
    ([1., 1, 0, 0], True, [.8660, .8660, -.8660, -.8660]),
    ([0., 1, 1, 1], True, [-1.5, .5, .5, .5]),
    ([1.] + 31 * [0.], True, [5.48] + 31 * [-.1768]),
    ([1., 0, 0, 0], False, [.75, -.25, -.25, -.25]),
    ([0., 1e-6], True, [-.2929, .2929]),
    ([1., 1, 1, 1 + 2 ** -20], True, 3 * [-.1614] + [.4843])])
def test_advantage_is_the_groups_z_score(rewards, std, expected):
    """The reward minus the mean, over the unbiased std (if any) + 1e-6: ±.5e-6 / (7.07e-7 + 1e-6) = ±.2929. A
    small one silences no group, and neither does another group, whose rewards are equal."""
    a = rl.advantages(torch.tensor([rewards, [.1] * len(rewards)]), std)
    assert torch.allclose(a[0], torch.tensor(expected), rtol=0, atol=1e-4) and (a[1] == 0).all()


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("value", [0., 1., .1, .3, .7, -.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(value, std):
    """A group is silent if max == min: the mean of eight 0.1 is not 0.1 in float32, which gives -.0074."""
    for n in range(2, 40):
        assert (rl.advantages(torch.full((3, n), value), std) == 0).all()


def test_signal_probability_is_the_enumeration():
    """The share of groups, drawn from n <= 6 answers, in which two rewards differ, however little."""
    for n in range(1, 7):
        for rewards in itertools.product([1., -1., .3, .1 + .2], repeat=n):
            for group in range(1, n + 1):
                draws = list(itertools.combinations(rewards, group))
                expected = sum(min(d) != max(d) for d in draws) / len(draws)
                assert abs(rl.signal_probability(rewards, group) - expected) < 1e-12


@pytest.mark.parametrize("group, rate, silent",
                         [(8, .01, .92), (8, .05, .66), (32, .01, .73), (32, .05, .19)])
def test_signal_probability_at_low_success_rates(group, rate, silent):
    """The reason why RL does nothing in early checkpoints: P(no signal) = p^G + (1-p)^G."""
    right = int(rate * 20_000)
    rewards = [1.] * right + [0.] * (20_000 - right)
    assert abs(1 - rl.signal_probability(rewards, group) - silent) < .01


# ---- the loss of a token ------------------------------------------------------------------------------

def test_one_update_per_batch_is_reinforce_bitwise(gpt, make_batch):
    """With updates=1 the gradient is REINFORCE's, bit for bit, though the recorded values are a bit off."""
    prompts, completions = (sorted(rows, key=len, reverse=True) for rows in SIX.values())
    batch = make_batch(gpt, prompts, completions, .6, 1e-3)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, rl.Config(temperature=.6))
    gpt.zero_grad()
    shared = SharedPrompts(gpt, prompts, PAD)
    logp = shared_logprobs(gpt, shared, list(range(6)), completions, PAD, .6)
    each = ADVANTAGE.repeat_interleave(torch.tensor([len(c) for c in completions]))
    (-(logp * each).sum() / len(each)).backward()
    shared.backward()
    assert torch.equal(ours, gradient_of(gpt))
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

@pytest.mark.parametrize("temperature", [1., .6])
@pytest.mark.parametrize("of, advantage, rows, n", [
    pytest.param(dict(prompts=[[1, 2]], completions=[[7, EOS]]), [1.], range(1), 2, id="EOS is trained"),
    pytest.param(dict(prompts=[[1, 2], [3]], completions=[[EOS], [4, 5, EOS]]), [1., -1.], range(2), 4,
                 id="a mean over tokens, .5, not over rows, 0"),
    pytest.param(SIX, ADVANTAGE, range(6), 27, id="finished, truncated and one-token rows"),
    pytest.param(SIX, [1.5, 0., 0., -.5, 0., -1.], range(6), 27, id="the tokens of silent rows are in N"),
    pytest.param(SIX, ADVANTAGE, range(2, 4), 9, id="those of another update are not"),
    pytest.param(GROUPED, GROUPED_ADVANTAGE, range(0, 3), 9, id="a group"),
    pytest.param(GROUPED, GROUPED_ADVANTAGE, range(3, 9), 20, id="groups in the middle"),
    pytest.param(GROUPED, GROUPED_ADVANTAGE, range(6, 12), 18, id="groups at the end")])
def test_every_token_counts_the_same(gpt, make_batch, weighted, of, advantage, rows, n, temperature):
    """The gradient by a log-probability is -A/N, N being the tokens of this optimizer step; the loss is what
    that sums up to. Row p·G + g belongs to prompt p, also if the update begins in the middle of the batch."""
    batch, advantage = make_batch(gpt, **of, temperature=temperature), torch.as_tensor(advantage)
    metrics, ours = gradient(gpt, batch, advantage, rl.Config(temperature=temperature), rows=rows)
    weights = [-float(a) / n if r in rows else 0. for r, a in enumerate(advantage)]
    assert_close(ours, weighted(gpt, batch, weights, temperature))
    loss = sum(weight * len(completion) for weight, completion in zip(weights, batch.completions))
    assert abs(metrics["loss"] - loss) < 1e-6


@on_every_device
def test_gradients_add_up(gpt, make_batch):
    """Gradients are added to .grad by policy_gradient, so that two calls give the sum."""
    batch, c = make_batch(gpt), rl.Config()
    _, once = gradient(gpt, batch, ADVANTAGE, c)
    rl.policy_gradient(gpt, gpt, batch, ADVANTAGE, range(6), c, PAD)
    assert_close(gradient_of(gpt), 2 * once)


# ---- several updates per batch ------------------------------------------------------------------------

@on_every_device
@pytest.mark.parametrize("shift, low, high, clipped, share", [
    (.1, .2, .2, (), 0),
    (.3, .2, .2, (0, 3, 5), 12 / 27), (-.3, .2, .2, (1, 2, 4), 15 / 27),
    (.3, .1, .5, (), 0), (-.3, .5, .1, (), 0)])
def test_the_ratio_weighs_and_clips(gpt, make_batch, weighted, shift, low, high, clipped, share):
    """With updates=2 the ratio to the recorded log-probabilities, here e^shift, weighs a token's gradient.
    e^.3 > 1.2 ends the pull up, e^-.3 < .8 the pull down; the share is of 27 tokens."""
    batch = make_batch(gpt, temperature=.6, shift=shift)
    c = rl.Config(updates=2, temperature=.6, clip_low=low, clip_high=high)
    metrics, ours = gradient(gpt, batch, ADVANTAGE, c)
    weights = [0. if r in clipped else -math.exp(shift) * a / 27 for r, a in enumerate(ADVANTAGE)]
    assert_close(ours, weighted(gpt, batch, weights, .6))
    assert metrics["clip_fraction"] == pytest.approx(share)
    assert metrics["ratio"] == pytest.approx(math.exp(shift), abs=1e-5)


@on_every_device
@pytest.mark.parametrize("advantage, shift, kl, expected", [
    pytest.param([1., 0, 0, 0, 0, 0], .3, 0., dict(clip_fraction=3 / 27, loss=-1.2 * 3 / 27), id="clipped"),
    pytest.param([1., 0, 0, 0, 0, 0], .1, 0., dict(ratio=1 + 3 * math.expm1(.1) / 27), id="ratio of one row"),
    pytest.param([1., 0, 0, 0, 0, -1], .1, 0., dict(ratio=1 + 11 * math.expm1(.1) / 27), id="of two rows"),
    pytest.param([0.] * 6, .3, .1, dict(clip_fraction=0), id="nothing to clip above at A = 0"),
    pytest.param([0.] * 6, -.3, .1, dict(clip_fraction=0), id="nothing to clip below at A = 0")])
def test_metrics_are_means_over_all_tokens(gpt, make_batch, advantage, shift, kl, expected):
    """Logged metrics have the denominator of the loss, 27 tokens, though only 3 or 11 are computed: the ratio
    of the others counts as 1. Tokens computed for the KL penalty alone are not clipped."""
    c = rl.Config(updates=2, kl=kl)
    metrics, _ = gradient(gpt, make_batch(gpt, shift=shift), torch.tensor(advantage), c)
    for name, value in expected.items():
        assert abs(metrics[name] - value) < 1e-5, name


@on_every_device
def test_the_second_update_is_off_policy(gpt, make_batch, row_logprobs):
    """After an optimizer step the ratio to the recorded log-probabilities is no longer 1."""
    batch, c = make_batch(gpt), rl.Config(updates=2)
    first, _ = gradient(gpt, batch, ADVANTAGE, c, rows=range(0, 4))
    torch.optim.SGD(gpt.parameters(), lr=.1).step()
    second, _ = gradient(gpt, batch, ADVANTAGE, c, rows=range(4, 6))
    change = torch.cat(row_logprobs(on_cpu(gpt), batch)[4:]) - torch.cat(batch.logprobs[4:])
    ratio = change.exp().mean().item()
    assert abs(first["ratio"] - 1) < 1e-5 and abs(ratio - 1) > .01 and abs(second["ratio"] - ratio) < 1e-5


# ---- a prompt is computed once for its group ----------------------------------------------------------

@on_every_device
@pytest.mark.parametrize("micro_tokens", [1, 6, 12, 25, 1_000])
@pytest.mark.parametrize("changes", [{}, {"kl": .3, "temperature": .6},
                                     {"updates": 3, "temperature": .6, "clip_low": .05},
                                     {"updates": 3, "kl": .3, "clip_high": .05}])
def test_shared_prompts_give_the_plain_gradient(gpt, make_batch, row_logprobs, changes, micro_tokens):
    """Prompts are computed once per chunk, completions attend to them: the gradient is that of whole rows,
    for one update and several, with and without KL; no metric depends on the micro-batches either."""
    c, reference = rl.Config(micro_tokens=micro_tokens, **changes), moved(gpt)
    batch = make_batch(gpt, **GROUPED, temperature=c.temperature, shift=.1)
    metrics, ours = gradient(gpt, batch, GROUPED_ADVANTAGE, c, reference)
    whole, _ = gradient(gpt, batch, GROUPED_ADVANTAGE, rl.Config(**changes), reference)

    alone = on_cpu(gpt)
    logp = torch.cat(row_logprobs(alone, batch, c.temperature))
    old = logp.detach() if c.updates == 1 else torch.cat(batch.logprobs)
    each = GROUPED_ADVANTAGE.repeat_interleave(torch.tensor([len(x) for x in batch.completions]))
    penalty = rl.kl_k3(logp, torch.cat(row_logprobs(on_cpu(reference), batch, c.temperature)))
    loss = (rl.policy_loss(logp, old, each, c.clip_low, c.clip_high) + c.kl * penalty).mean()
    loss.backward()
    assert_close(ours, gradient_of(alone), 1e-5)
    assert abs(metrics["loss"] - float(loss.detach())) < 1e-5
    assert metrics == pytest.approx(whole, abs=1e-5)


@on_every_device
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
    assert metrics["positions"] == 27 + 4


# ---- the noise of the gradient ------------------------------------------------------------------------

@on_every_device
@pytest.mark.parametrize("P, advantage", [
    pytest.param(4, GROUPED_ADVANTAGE, id="two halves of two problems"),
    pytest.param(3, GROUPED_ADVANTAGE.roll(6), id="one silent half, and a problem too many")])
def test_gradient_noise_is_that_of_two_halves(gpt, make_batch, weighted, P, advantage):
    """The variance of two half batches' gradients, each computed alone, times their problems; |G|² is the
    square of their mean less its share of the variance. No gradient is left."""
    batch = make_batch(gpt, GROUPED["prompts"][:P], GROUPED["completions"][:3 * P])
    problems = P // 2
    gradients = []
    for rows in (range(3 * problems), range(3 * problems, 6 * problems)):
        tokens = sum(len(batch.completions[r]) for r in rows)
        weights = [-a / tokens if r in rows else 0. for r, a in enumerate(advantage[:3 * P])]
        gradients.append(weighted(gpt, batch, weights))
    halves = torch.stack(gradients)
    trace = problems * float(halves.var(0).sum())
    square = float(halves.mean(0).square().sum()) - trace / (2 * problems)
    found = rl.gradient_noise(gpt, None, batch, advantage[:3 * P], rl.Config(), PAD)
    assert trace > .1 and found["gradient_trace"] == pytest.approx(trace, rel=1e-4)
    assert found["gradient_square"] == pytest.approx(square, abs=1e-4 * trace)
    assert all(p.grad is None for p in gpt.parameters())


def test_gradient_noise_is_unbiased(monkeypatch):
    """The means of 4,000 measurements are the known |mean|² and trace of the covariance of a problem's
    gradient, here drawn from a normal distribution."""
    mean, deviation = torch.tensor([1., -2., 0., .5]), torch.tensor([3., .1, 1., 2.])
    gen, model = generator(0, "noise"), torch.nn.Linear(4, 1, bias=False)

    def drawn(model, reference, batch, advantage, rows, c, pad):
        problems = mean + deviation * torch.randn(len(rows) // 2, 4, generator=gen)
        model.weight.grad = problems.mean(0, keepdim=True)
    monkeypatch.setattr(rl, "policy_gradient", drawn)
    batch = rl.Batch([], [], [], [], [], torch.zeros(6, 2), 0., 0.)
    found = [rl.gradient_noise(model, None, batch, None, rl.Config(), PAD) for _ in range(4_000)]
    for name, expected in (("gradient_square", 5.25), ("gradient_trace", 14.01)):
        assert sum(each[name] for each in found) / 4_000 == pytest.approx(expected, rel=.05), name


# ---- the KL penalty -----------------------------------------------------------------------------------

@on_every_device
def test_kl_penalty_reaches_all_rows(gpt, make_batch, row_logprobs, weighted):
    """With kl > 0 silent rows are computed too; each token adds kl·(1 - exp(reference - logp))/N."""
    reference, batch = moved(gpt), make_batch(gpt, temperature=.6)
    advantage = torch.tensor([1., -1., 0., 0., 0., 0.])
    metrics, ours = gradient(gpt, batch, advantage, rl.Config(kl=.5, temperature=.6), reference)
    assert all(p.grad is None for p in reference.parameters())
    differences = [new - old for new, old in zip(row_logprobs(on_cpu(reference), batch, .6), batch.logprobs)]
    weights = [(-a + .5 * (1 - d.exp())) / 27 for a, d in zip(advantage, differences)]
    assert_close(ours, weighted(gpt, batch, weights, .6))
    d = torch.cat(differences).double()
    assert abs(metrics["kl_penalty"] - float((d.exp() - d - 1).mean())) < 1e-5


@on_every_device
def test_kl_penalty_alone_is_a_signal(gpt, make_batch):
    """Without any advantage the penalty still pulls back to the reference, where it is 0."""
    batch, c = make_batch(gpt), rl.Config(kl=.1)
    metrics, pull = gradient(gpt, batch, torch.zeros(6), c, moved(gpt))
    assert metrics["kl_penalty"] > .01 and pull.abs().max() > 1e-4
    metrics, pull = gradient(gpt, batch, torch.zeros(6), c, copy.deepcopy(gpt))
    assert abs(metrics["kl_penalty"]) < 1e-9 and pull.abs().max() < 1e-6


@on_every_device
def test_kl_to_reference_compares_with_the_recorded_logprobs(gpt, make_batch, row_logprobs):
    """The logged KL is the k3 mean per token of recorded against the reference's log-probabilities, at T."""
    batch, reference, c = make_batch(gpt, temperature=.6), moved(gpt), rl.Config(temperature=.6)
    d = (torch.cat(row_logprobs(on_cpu(reference), batch, .6)) - torch.cat(batch.logprobs)).double()
    exact = float((d.exp() - d - 1).mean())
    assert exact > .01 and abs(rl.kl_to_reference(reference, batch, c, PAD) / exact - 1) < 1e-4
    assert rl.kl_to_reference(gpt, batch, c, PAD) < 1e-9


# ---- rows and groups ----------------------------------------------------------------------------------

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
        batch = make_batch(gpt, *([rows[r] for r in order] for rows in SIX.values()), shift=.1)
        _, ours = gradient(gpt, batch, ADVANTAGE[order], rl.Config(updates=2, micro_tokens=20))
        assert_close(ours, expected)


@on_every_device
def test_a_duplicated_problem_stays_two_groups(answer_tokenizer, answering):
    """The same question with another answer: row p·G + g is graded against problem p's answer."""
    problems = [{"question": "x", "answer": a} for a in ("8", "7", "7", "8")]
    c = rl.Config(max_new=6)
    batch = rl.collect(answering(0.), answer_tokenizer, problems, 3, c, generator(0, "test"))
    assert batch.rewards.tolist() == [[0.] * 3, [1.] * 3, [1.] * 3, [0.] * 3]
    assert batch.grades == ["wrong"] * 3 + ["right"] * 6 + ["wrong"] * 3
    prompt = [answer_tokenizer.eos, *answer_tokenizer.encode("x\n")]
    assert batch.texts == ["#### 7"] * 12 and batch.prompts == [prompt] * 4


@on_every_device
@pytest.mark.parametrize("temperature, wrong, p", [(1., .5, 1 / 2), (.5, .2, 16 / 17)])
def test_collect_records_what_was_sampled(answer_tokenizer, answering, temperature, wrong, p):
    """T=.5 turns .8/.2 into 16/17 and 1/17. So it is in the draws, completions with EOS, log-probabilities of
    each token, and in the entropy, which only one token of four has."""
    problems = [*SEVEN, {"question": "bb", "answer": "8"}]
    c = rl.Config(max_new=8, temperature=temperature)
    batch = rl.collect(answering(wrong), answer_tokenizer, problems, 400, c, generator(0, "test"))
    chance = {"#### 7": p, "#### 8": 1 - p}
    for completion, text, logp in zip(batch.completions, batch.texts, batch.logprobs):
        assert completion == [*answer_tokenizer.encode(text), answer_tokenizer.eos]
        expected = torch.tensor([0., 0., math.log(chance[text]), 0.])
        assert torch.allclose(logp, expected, atol=1e-4)
    assert abs(batch.entropy + sum(q * math.log(q) for q in chance.values()) / 4) < 1e-4
    assert batch.truncated == 0 and (batch.rewards.mean(1) - torch.tensor([p, 1 - p])).abs().max() < .06
    assert [g == "right" for g in batch.grades] == batch.rewards.flatten().bool().tolist()


def test_truncated_answers(monkeypatch, answer_tokenizer, answering):
    """Two of five rollouts cut off are .4. One of them had given a complete answer and keeps its reward; the
    other's is not complete ('#### 7' may become 78). Neither are four at max_new=3."""
    cut = rl.collect(answering(0.), answer_tokenizer, SEVEN, 4, rl.Config(max_new=3), generator(0, "test"))
    assert cut.truncated == 1 and cut.rewards.tolist() == [[0.] * 4] and cut.texts == ["#### 7"] * 4
    texts = ["#### 7", "#### 8", "x", "#### 7\n", "#### 7"]
    rows = [answer_tokenizer.encode(text) for text in texts]
    for row in rows[:3]:
        row.append(answer_tokenizer.eos)
    lengths = [4, 4, 2, 4, 3]
    tokens = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    entropy = torch.tensor([[.1, .2, .3, .4], [1.] * 4, [2., 2., 0., 0.], [.5] * 4, [1., 1., 1., 0.]])
    out = Rollouts(tokens, torch.tensor(lengths), torch.tensor([True] * 3 + [False] * 2),
                   torch.zeros(5, 4), entropy)
    monkeypatch.setattr(ranks, "sample_together", lambda *args, **kwargs: out)
    batch = rl.collect(answering(), answer_tokenizer, SEVEN, 5, rl.Config(), generator(0, "test"))
    assert batch.truncated == pytest.approx(.4) and batch.rewards.tolist() == [[1., 0., 0., 1., 0.]]
    assert batch.grades == ["right", "wrong", "unparsed", "right", "unparsed"]
    assert batch.texts == texts
    assert abs(batch.entropy - (1. + 4. + 4. + 2. + 3.) / 17) < 1e-6     # per token, not per row
    assert batch.completions == rows and [len(x) for x in batch.logprobs] == lengths


@pytest.mark.parametrize("kind, expected", [("answer", [1., 1., 0., 1.]), ("steps", [1., 0., 0., 0.])])
def test_what_is_rewarded(monkeypatch, answer_tokenizer, gpt, kind, expected):
    """Right answers, or only those whose derivation is true."""
    batch = rewarded(monkeypatch, answer_tokenizer, gpt, kind, 1)
    assert batch.rewards.tolist() == [expected] and list(batch.sound) == [True, False, False, False]


def test_an_answer_that_is_cut_off_is_not_sound(monkeypatch, answer_tokenizer, gpt):
    """Its last digit may have been the first of two: unparsed, so neither right nor sound, and no reward."""
    batch = rewarded(monkeypatch, answer_tokenizer, gpt, "steps", 1, finished=False)
    assert batch.grades == ["unparsed"] * 4 and not any(batch.sound) and batch.rewards.sum() == 0


def test_random_rewards_are_as_many_as_right_answers(monkeypatch, answer_tokenizer, gpt):
    """The control rewards 75 % of 4,000 answers, right or wrong alike; the same seed, the same answers."""
    a, b = (rewarded(monkeypatch, answer_tokenizer, gpt, "random", 1000).rewards.flatten() for _ in range(2))
    assert torch.equal(a, b)
    for place in range(4):                       # right, right, wrong, right
        assert abs(a[place::4].mean() - .75) < .06


def rewarded(monkeypatch, tokenizer, gpt, kind: str, times: int, finished: bool = True) -> rl.Batch:
    """A batch of four answers, `times` over: derived, bare, wrong, right by two mistakes."""
    problem = {"question": "Tom has 3 pens. Tom gets 4. Tom loses 2. How many pens?", "answer": "5"}
    texts = ["3+4=7\n7-2=5\n#### 5", "#### 5", "3+4=7\n7-2=4\n#### 4", "3+4=8\n8-2=5\n#### 5"] * times
    rows = [tokenizer.encode(text) + [tokenizer.eos] * finished for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    out = Rollouts(tokens, torch.tensor(list(map(len, rows))), torch.full((len(rows),), finished),
                   torch.zeros(tokens.shape), torch.zeros(tokens.shape))
    monkeypatch.setattr(ranks, "sample_together", lambda *args: out)
    return rl.collect(gpt, tokenizer, [problem], len(rows), rl.Config(reward=kind), generator(0, "test"))


@pytest.mark.parametrize("shaped, wrong, signal", [
    (rl.reward, .5, True), (rl.reward, 1., False),
    (lambda problem, text, grade: {"right": 1., "wrong": .2, "unparsed": 0.}[grade], 1., True),
    (lambda problem, text, grade: .5, .5, False),
    (lambda problem, text, grade: float(text == f"#### {problem['answer']}") / 3, .5, True)])
def test_the_probe_before_training(answer_tokenizer, answering, monkeypatch, capsys, shaped, wrong, signal):
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

@on_every_device
@pytest.mark.parametrize("rows", [range(6), range(4, 6)])
def test_no_signal_leaves_no_gradient(gpt, make_batch, rows):
    """With all advantages of an update 0 the result is None, and every .grad is None, not zero."""
    advantage = torch.tensor([0. if r in rows else 1. for r in range(6)])
    assert rl.policy_gradient(gpt, gpt, make_batch(gpt), advantage, rows, rl.Config(), PAD) is None
    assert all(p.grad is None for p in gpt.parameters())


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
    before, after, log = run_rl(answering(wrong=1.), answer_tokenizer, ["7", "7"], n_problems=2, rollouts=4,
                                steps=3, weight_decay=.1, lr=.1)
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


@pytest.mark.parametrize("kl", [0., .1])
def test_logged_flops_count_a_prompt_once(run_rl, answer_tokenizer, answering, kl):
    """A step of 2 problems x 4 rollouts, prompts of 9 tokens, answers of 4: 18 + 32 positions forward in
    sampling; in the update three times 9 + 4 · 4 per group with a signal, with a KL penalty four times."""
    model = answering()
    _, _, log = run_rl(model, answer_tokenizer, ["7", "8"], n_problems=2, rollouts=4, steps=6, kl=kl)
    for before, line in zip([{"flops": 0}, *log], log):
        update = 4 * 2 if kl else 3 * 2 * line["signal"]
        positions = 18 + 32 + update * (9 + 16)
        assert line["flops"] - before["flops"] == model.flops_per_token(13) * positions
    assert len({line["signal"] for line in log}) > 1


@pytest.mark.parametrize("dtype, moves", [(torch.float32, True), (torch.bfloat16, False)])
def test_parameters_are_fp32(gpt, dtype, moves):
    """An AdamW step of lr 1e-6 moves fp32 parameters, and none in bf16, where 1 + 1e-6 is 1."""
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    before = gpt.norm.detach().to(dtype)
    gain = before.clone().requires_grad_()
    gain.grad = torch.ones_like(gain)
    torch.optim.AdamW([gain], lr=1e-6, weight_decay=0.).step()
    assert ((gain != before) == moves).all()


def test_bf16_through_autocast_only(gpt, make_batch):
    """Under autocast parameters and gradients stay fp32, and the gradient is that of fp32 within 5 %."""
    batch = make_batch(gpt)
    gradient(gpt, batch, ADVANTAGE, rl.Config())
    exact = [p.grad for p in gpt.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        gradient(gpt, batch, ADVANTAGE, rl.Config())
    for p, g in zip(gpt.parameters(), exact):
        assert p.grad.dtype == torch.float32
        assert (p.grad - g).norm() < .05 * g.norm() + 1e-6


# ---- does it learn? -----------------------------------------------------------------------------------

@pytest.mark.parametrize("updates", [1, 3])
def test_thirty_steps_raise_the_rewarded_token(make_gpt, updates):
    """GRPO: thirty batches of one-token answers turn a token of probability .09 into the likely answer."""
    model = make_gpt(vocab_size=16, n_vocab=11)
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
        batch = rl.Batch(prompts, out.completions(), list(out.logprobs), [], [], rewards, 0., 0.)
        advantage = rl.advantages(rewards).flatten()
        for i in range(0, 48, 48 // updates):
            if rl.policy_gradient(model, model, batch, advantage, range(i, i + 48 // updates), c, 9):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert start < .2 and probability() > .8
