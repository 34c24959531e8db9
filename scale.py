"""What a model larger than the tiny world needs: options that save memory, and a plan before anything runs.

    python scale.py                                   which settings fit 8, 12 and 24 GiB, for every size
    python scale.py --size olmo-1b --memory 24        one model: what every combination of options needs
    python scale.py --init olmo.pt --memory 24        the same for a checkpoint

Everything here is computed from shapes; nobody has compared it with a GPU. On a GPU weights, gradients and
AdamW's arithmetic are fp32, matrix products bf16, but for the head (model.mixed). Weights in bf16 would be
half as large, but a step of RL is far below their last bit (numbers in bf16 near .02 lie 1e-4 apart, a step
is 1e-6): to nearest, nothing would ever change; at random, the noise of rounding would be ten times the step.
Left out: moving anything to the CPU, 8-bit moments, low-rank adapters.
"""
import copy
import itertools
import typing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoint import UserError, load_checkpoint, main, require, require_positive
from model import GPT, SIZES, ModelConfig


@dataclass(kw_only=True)
class Memory:
    """The options of rl.py, sft.py and merge.py about memory. The defaults save nothing."""
    freeze_embeddings: bool = False     # do not train embedding and head: no gradient, no moments for them
    moments: str = "fp32"           # AdamW's two running averages per weight: fp32, or bf16 (half the size)
    checkpointing: bool = False     # compute activations a second time in the backward pass: a third slower
    reference: str = "fp32"         # the start, kept by RL for the KL: fp32, bf16, none (no KL is logged)
    decode_rows: int = 1024         # rows sampled at once (one problem's at least): bounds keys and values
    memory: float = 0.0             # GiB to stay within; 0 = what is free on the GPU, no limit on a CPU


GIB, CONTEXT, SPARE = 2 ** 30, 1.0, 1.1         # assumed: 1 GiB for CUDA itself, 10 % lost between tensors
CARD = .97                                      # assumed: what a card has of the GiB that it is sold with
SLICE = 2 ** 24                                 # weights that AdamW takes at once: temporaries of 64 MiB


# ---- weights and moments ---------------------------------------------------------------------------------

class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (Loshchilov and Hutter 2019) with its moments in `dtype`; in fp32 the same bits.

    In bf16 the second moment is rounded up or down at random, in proportion: its decay by a thousandth is
    less than half of the last of 8 bits, so that rounded to nearest it would never fall. The random bits are
    a function of the step. Arithmetic is fp32, on a slice of the weights at a time."""

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.bfloat16):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, step=0))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            lr, t = group["lr"], group["step"]
            gen = torch.Generator(group["params"][0].device).manual_seed(t)
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p] = {name: torch.zeros_like(p, dtype=self.dtype) for name in ("m", "v")}
                whole = (p.view(-1), p.grad.flatten(), *(x.view(-1) for x in self.state[p].values()))
                for w, g, m, v in zip(*(x.split(SLICE) for x in whole)):
                    m_new = m.float().lerp_(g, 1 - .9)
                    v_new = v.float().mul_(.999).addcmul_(g, g, value=1 - .999)
                    m.copy_(m_new)
                    v.copy_(round_at_random(v_new, gen) if v.dtype == torch.bfloat16 else v_new)
                    w.mul_(1 - lr * group["weight_decay"])
                    w.addcdiv_(m_new, v_new.sqrt().div_((1 - .999 ** t) ** .5).add_(1e-8),
                               value=-lr / (1 - .9 ** t))

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)           # gives them the dtype of the weights
        for moments in self.state.values():
            moments.update({name: x.to(self.dtype) for name, x in moments.items()})


def round_at_random(x: Tensor, gen: torch.Generator) -> Tensor:
    """x in fp32 -> bf16, up with the probability that makes the mean exact: 16 random bits are added below
    the 16 that stay."""
    noise = torch.randint(1 << 16, x.shape, generator=gen, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def make_optimizer(model: GPT, c: Memory, lr: float) -> torch.optim.Optimizer:
    """AdamW over everything that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if c.moments == "bf16":
        return AdamW(trained, lr, c.weight_decay)
    return torch.optim.AdamW(trained, lr=lr, weight_decay=c.weight_decay, fused=True)


def keep_start(model: GPT, c: Memory) -> GPT | None:
    """A copy of the model as it is now, the reference of the KL. Its matrices may be bf16, which products
    take anyway on a GPU; the gains of its norms, a few thousand numbers, stay fp32."""
    if c.reference == "none":
        return None
    reference = copy.deepcopy(model).requires_grad_(False)
    for p in reference.parameters():
        if c.reference == "bf16" and p.dim() == 2:
            p.data = p.data.bfloat16()
    return reference


# ---- the plan --------------------------------------------------------------------------------------------

def plan(m: ModelConfig, c: typing.Any, prompt: int, half: bool) -> dict[str, int]:
    """Bytes of everything large in a run of rl.py, sft.py or merge.py, its longest prompt of `prompt` tokens.
    `half`: products in bf16, as on a GPU. Exact: parameters, moments, reference, gradients, cache. The others
    count what autograd keeps with PyTorch's unfused RMSNorm and fused attention, and large temporaries."""
    d, f, L, V, b = m.d_model, m.d_ff, m.n_layers, m.n_vocab, 2 if half else 4
    kv = m.kv_width
    embeddings, matrices, gains = (2 * m.vocab_size * d, L * (2 * d * d + 2 * d * kv + 3 * d * f),
                                   L * (3 * d + kv) + d)
    weights = embeddings + matrices + gains
    trained, optimizers = weights - c.freeze_embeddings * embeddings, 1
    G, mode = getattr(c, "rollouts", 0), getattr(c, "mode", "")          # no rollouts: sft.py
    if mode in ("parallel", "alternating"):
        optimizers = 2
    # sampling: rl.probe takes 2 G answers of each problem; the cache grows by 16 columns
    groups = [(c.eval_samples, c.eval_problems), (2 * G, c.n_problems)] if G else [
        (c.eval_samples, c.eval_problems)]
    rows = max(n * min(problems, max(1, c.decode_rows // n)) for n, problems in groups)
    start = max(16, prompt)
    columns = start + 16 * -(-max(0, prompt + c.max_new - 1 - start) // 16)
    # update: a micro-batch of answers (in SFT: of prompts and answers) and, in RL, one of prompts; answers a
    # quarter as long as allowed make four times the rows, each with a copy of its prompt's keys and values
    tokens, prompts, keys = max(c.micro_batch, prompt + c.max_new), 0, 0
    if G:
        tokens = min(max(c.micro_batch, c.max_new), c.n_problems * G * c.max_new)
        prompts = prompt * min(max(1, c.micro_batch // prompt), c.n_problems)
        keys = 2 * d * b * prompt * min(max(1, 4 * tokens // c.max_new), c.n_problems * G)   # of one layer
    kept = (50 if half else 60) * d + 4 * b * f + 4 * m.n_heads + 16     # by a layer for a token
    activations = L * ((tokens + prompts) * kept + keys)
    backward = max(tokens, prompts) * kept       # temporaries of a layer
    if c.checkpointing:                          # every block's input; one layer computed again
        activations, backward = L * 4 * d * (tokens + prompts), 2 * backward + keys
    shared = 3 * L * 2 * kv * b * prompts        # SharedPrompts: keys and values, their gradient, parts of it
    matrix = max(2 * d * f, 0 if c.freeze_embeddings else m.vocab_size * d)          # the largest to train
    cache = rows * columns * L * kv * b          # keys; as much for values
    # rl.kl_to_start, which has no cache: logits, log-softmax, and the head of a reference in bf16
    scoring = 12 * min(64 * c.max_new * V, max(2 ** 27, c.max_new * V)) + 4 * V * d * (c.reference == "bf16")
    return {
        "parameters": 4 * weights,
        "moments": optimizers * 2 * trained * (2 if c.moments == "bf16" else 4),
        "reference": {"none": 0, "bf16": 2 * weights + 2 * gains, "fp32": 4 * weights}[c.reference] * (G > 0),
        "snapshots": 2 * 4 * trained * (mode == "parallel"),
        "gradients": 4 * trained,
        "newest gradient": 8 * matrix,           # before it is added: as it comes, and converted or padded
        # without checkpointing the graphs of prompts and of answers each hold a copy
        "weights in bf16": 2 * matrices * half,
        "for the prompts": 2 * matrices * (half and G > 0 and not c.checkpointing),
        "activations": activations + shared,
        "logits": max(12 * V * tokens, backward),        # log-softmax, two gradients: gone before a layer's
        "cache": 2 * cache,
        "growing": cache,                        # the keys once more while they get longer, then the values
        "distributions": max(20 * V * rows, (scoring - 3 * cache) * (G > 0)),
    }


PHASES = {"always": ("parameters", "moments", "reference", "snapshots"),
          "sampling": ("weights in bf16", "cache", "growing", "distributions"),
          "update": ("gradients", "newest gradient", "weights in bf16", "for the prompts", "activations",
                     "logits")}


def needed(parts: dict[str, int], phase: str = "") -> float:
    """GiB in a phase, or at the worst moment: what stays, and 1.1 times what comes and goes."""
    always, sampling, update = (sum(parts[name] for name in names) for names in PHASES.values())
    passing = {"sampling": sampling, "update": update, "": max(sampling, update)}[phase]
    return (always + SPARE * passing) / GIB


def arithmetic(parts: dict[str, int]) -> str:
    """The sum as people write it."""
    def listed(phase: str) -> str:
        return " + ".join(f"{name} {parts[name] / GIB:.2f}" for name in PHASES[phase] if parts[name])
    worst = max(("sampling", "update"), key=lambda phase: needed(parts, phase))
    return f"{listed('always')} + {SPARE} x ({listed(worst)}; in {worst}) = {needed(parts):.2f} GiB"


# what costs time only, and how much of it is used in a column of the table; what changes the run
TIME = {"plain": {}, "rows": {"decode_rows": 128},
        "frugal": {"decode_rows": 64, "micro_batch": 512, "checkpointing": True}}
CHANGES = {"reference": ("fp32", "bf16", "none"), "moments": ("fp32", "bf16"),
           "freeze_embeddings": (False, True)}
SAVINGS = [{name: x} for name, x in TIME["frugal"].items()] + [
    {name: x} for name, values in CHANGES.items() for x in values[1:]]


def words(changes: dict[str, typing.Any]) -> str:
    """Options as they are typed."""
    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                    for name, value in changes.items() if value not in (False, "fp32")) or "no option"


def fit(c: typing.Any, model: GPT, prompt: int, device: torch.device) -> None:
    """Check the memory options of a training run, print its plan and refuse it if it cannot fit (UserError
    with the arithmetic, and what each option would save); then prepare the model, which is still on the CPU.
    A small model on a CPU is not worth a line, unless --memory asks for one."""
    for name in ("reference", "moments"):
        require(getattr(c, name) in CHANGES[name],
                f"--{name} {getattr(c, name)}: must be {' or '.join(CHANGES[name])}")
    require(c.reference != "none" or getattr(c, "kl", 0) == 0, "--reference none: --kl needs a reference")
    require_positive(c, "decode_rows")
    require_positive(c, "memory", zero=True)
    cuda, m = device.type == "cuda", model.config
    parts = plan(m, c, prompt, cuda)
    total = needed(parts) + CONTEXT * (cuda and c.memory > 0)            # else it is in use already
    room = c.memory or (torch.cuda.mem_get_info(device)[0] / GIB if cuda else float("inf"))
    if cuda or c.memory or total > 4:
        print(f"memory, computed and not measured: {arithmetic(parts)}; last.pt: "
              f"{(parts['parameters'] + parts['moments']) / GIB:.2f} GiB")
    if total > room:
        saved = {words(x): needed(parts) - needed(plan(m, replace(c, **x), prompt, cuda)) for x in SAVINGS}
        options = ", ".join(f"{option} {gib:.2f}" for option, gib in saved.items() if gib > .005)
        cuda_itself = f", {CONTEXT:g} more for CUDA" * (total > needed(parts))
        raise UserError(f"{room:.2f} GiB are not enough: {arithmetic(parts)}{cuda_itself}. Each alone would "
                        f"save: {options or 'nothing'}")
    model.checkpointing, model.decode_rows = c.checkpointing, c.decode_rows
    for weight in (model.embed.weight, model.head.weight):
        weight.requires_grad_(not c.freeze_embeddings)


# ---- the table -------------------------------------------------------------------------------------------

MODELS = {name: ModelConfig(512, 512, 256, *shape) for name, shape in SIZES.items()} | {
    "olmo-1b": ModelConfig(100_352, 100_278, 4096, 2048, 16, 16, 8192, 5e5)}


@dataclass
class Config(Memory):
    init: str = ""                  # checkpoint to plan for
    size: str = ""                  # or: 0.3M 0.5M 1M 3M 10M 30M 124M (at a vocabulary of 512), olmo-1b
    prompt: int = 160               # longest prompt, tokens
    max_new: int = 256              # longest answer, tokens
    n_problems: int = 64            # P, problems per step
    rollouts: int = 16              # G, sampled answers per problem
    micro_batch: int = 2_048        # tokens per forward pass of the update
    eval_problems: int = 100        # validation problems
    eval_samples: int = 16          # samples of each
    context: int = 256              # tokens of a sequence in pretraining


def combinations() -> list[dict[str, typing.Any]]:
    """Every choice among CHANGES, those that change least first."""
    choices = [dict(zip(CHANGES, values)) for values in itertools.product(*CHANGES.values())]
    return sorted(choices, key=lambda x: sum(values.index(x[name]) for name, values in CHANGES.items()))


def gpu_plan(m: ModelConfig, c: Config, **changes: typing.Any) -> float:
    """GiB on a GPU, everything included."""
    return needed(plan(m, replace(c, **changes), c.prompt, True)) + CONTEXT


def pretraining(m: ModelConfig, c: Config, gpu: float) -> int:
    """The largest power of two of sequences that pretrain.py can take at once (--micro-batch), 0 if none."""
    fits = [n for n in (2 ** i for i in range(11)) if CARD * gpu >= gpu_plan(
        m, c, rollouts=0, max_new=1, eval_problems=1, micro_batch=n * c.context, moments="fp32")]
    return max(fits, default=0)


def show(c: Config) -> None:
    """Print the table."""
    require(c.size in ("", *MODELS), f"--size {c.size}: must be one of {' '.join(MODELS)}")
    require_positive(c, "prompt max_new n_problems rollouts micro_batch eval_problems eval_samples context "
                        "decode_rows")
    require_positive(c, "memory", zero=True)
    models = {c.size: MODELS[c.size]} if c.size else MODELS
    if c.init:
        models = {c.init: ModelConfig(**load_checkpoint(c.init)["config"])}
    print(f"GiB on a GPU, with {CONTEXT:g} for CUDA and {SPARE - 1:.0%} of what comes and goes; computed, "
          f"not measured.\nRL: {c.n_problems} x {c.rollouts} answers of up to {c.max_new} tokens, prompts "
          f"of up to {c.prompt}, {c.micro_batch} tokens at once.")
    for name, options in TIME.items():
        print(f"  {name}: {words(options)}")
    for name, m in models.items():
        print(f"\n{name}, {plan(m, c, c.prompt, True)['parameters'] / 4e6:,.1f} M parameters")
        if len(models) == 1:
            print(f"with the options given: {arithmetic(plan(m, c, c.prompt, True))}")
            print("".join(f"{column:>9s}" for column in TIME))
            for x in combinations():
                gib = [gpu_plan(m, c, **x | options) for options in TIME.values()]
                print("".join(f"{g:9.2f}" for g in gib) + f"  {words(x)}")
        for gpu in [c.memory] if c.memory else [8, 12, 24]:
            fits = [x | options for x in combinations() for options in TIME.values()
                    if gpu_plan(m, c, **x | options) <= CARD * gpu]
            best = f"{gpu_plan(m, c, **fits[0]):.2f} with {words(fits[0])}" if fits else "RL does not fit"
            print(f"  {gpu:g} GiB: {best}; pretraining: "
                  f"{pretraining(m, c, gpu)} sequences of {c.context} tokens at once")


if __name__ == "__main__":
    main(show, Config)
