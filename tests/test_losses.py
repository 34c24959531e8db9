"""Losses, learning rate and reward by hand: what the scripts' gradients begin with."""
import pytest
import torch

import pretrain
import rl
import sft

ROWS = [[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]]
EXAMPLES = [([1, 2, 3], [4, 60]), ([5], [6, 7, 8, 9, 60]), ([10, 11], [60])]         # 8 solution tokens


def test_pretraining_is_the_mean_over_all_tokens(gpt, logprobs_of):
    """Minus the mean log-probability of every token but a sequence's first, each sequence computed alone."""
    alone = [logprobs_of(gpt, row[:1], row[1:]) for row in ROWS]
    loss = pretrain.next_token_loss(gpt, torch.tensor(ROWS))
    assert loss.shape == () and loss.requires_grad
    assert loss.item() == pytest.approx(-torch.cat(alone).mean().item(), rel=1e-5)


@pytest.mark.parametrize("warmup, decay, expected", [
    (4, .5, [.5, 1., 1.5, 2., 2., 1.5, 1., .5]), (2, 0., [1.] + [2.] * 7), (0, .25, [2.] * 7 + [1.])])
def test_the_learning_rate_by_hand(warmup, decay, expected):
    """Of eight updates at a peak of 2: up in equal steps, flat, then down so that a ninth would have 0."""
    c = pretrain.Config(lr=2., warmup=warmup, decay=decay)
    assert [pretrain.learning_rate(c, step, 8) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("micro_tokens", [1, 8, 0])
def test_sft_is_the_mean_over_solution_tokens(gpt, logprobs_of, micro_tokens):
    """Gradient and loss are those of minus the mean log-probability of all eight, EOS included and questions
    left out, whatever the micro-batches; the gradient is added to what is there."""
    alone = torch.cat([logprobs_of(gpt, prompt, solution) for prompt, solution in EXAMPLES])
    (-alone.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    metrics = sft.sft_gradient(gpt, EXAMPLES, sft.Config(micro_tokens=micro_tokens), 59)
    twice = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    assert metrics["loss"] == pytest.approx(-alone.mean().item(), rel=1e-5)
    assert (twice - 2 * expected).abs().max() < 1e-5 * expected.norm()


@pytest.mark.parametrize("grade, expected", [("right", 1.), ("wrong", 0.), ("unparsed", 0.)])
def test_a_right_answer_is_worth_1(grade, expected):
    """By the verifier's grade alone."""
    value = rl.reward({"question": "", "answer": "7"}, "#### 7", grade)
    assert isinstance(value, float) and value == expected
