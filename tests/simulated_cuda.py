"""A make-believe CUDA device on the CPU: for tests of the CUDA path on machines without a GPU.

    with simulated_cuda() as gpu:
        rl.train(rl.Config(..., device="cuda"))
    gpu.kernels, gpu.waits                 # Counters: (operation, "file.py:line") -> how often

A tensor "on the GPU" is a subclass that holds its values in CPU memory. Every ATen operation on it passes
through GPU.run, below autograd and autocast, and there CUDA's rules are kept: one operation takes tensors of
one device (but for CPU scalars, copies, and CPU indices into a tensor of the GPU); random numbers come from a
generator of the same device; numpy takes no tensor of the GPU. Two books are kept: kernels launched, and
waits, the moments at which Python needs a value or a shape that only the GPU knows. A CUDA graph records its
kernels (in a book of its own: a replay is one launch), refuses waits meanwhile, and repeats them on the same
memory whatever Python has done since; if Python gave that back, an error says so.

RMSNorm counts as one kernel, as in PyTorch from 2.9 on; its backward pass counts as its parts. Left out: the
numerics of CUDA's kernels and their choice among attention kernels, the amount of memory, streams,
torch.compile, gradients through a copy to the CPU, and "cuda" without a number as the device of a copy.
"""
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
COPIES = (aten._to_copy.default, aten.copy_.default)
READS_INDEX = (aten.index.Tensor,)
WRITES_INDEX = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
NEEDS_VALUES = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                aten.equal.default, aten.allclose.default, aten.bincount.default, aten._unique2.default)
NO_KERNEL = ("detach", "_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty",
             "empty_strided")
PLUMBING = ("simulated_cuda.py", "_ops.py", "_compile.py", "eval_frame.py", "mock.py", "contextlib.py")


class OnGPU(torch.Tensor):
    """To Python a tensor on cuda:0, to PyTorch's C++ one on the CPU; `held` has the values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGPU":
        tensor = torch.Tensor._make_subclass(cls, held)
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.now.run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args, **kwargs):
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            GPU.now.leaving = True               # C++ takes this tensor for one of the CPU already
            return aten._to_copy(self, device=device, dtype=dtype)
        return self if dtype in (None, self.dtype) else aten._to_copy(self, dtype=dtype)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self):
        return f"OnGPU({self.held})"

    def __reduce_ex__(self, protocol):           # of torch.save
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        new = self.detach().clone()
        return torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new

    def _set_data(self, value):
        torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))

    data = property(lambda self: self.detach(), _set_data)


class GPU(TorchDispatchMode):
    """The device and its books."""
    now: "GPU"

    def __init__(self):
        super().__init__()
        self.kernels = Counter()
        self.waits = Counter()
        self.generators = {}                     # those that were made for this device, kept: ids are reused
        self.graphs = []                         # recorded so far
        self.leaving = False                     # the next copy goes to the CPU
        self.graph = None                        # being recorded
        self.inside = False                      # a fused kernel, counted already

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if func._can_decompose():                # without gradients, composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        leaves = tensors((args, kwargs))
        ours = {id(x.held): x for x in leaves if isinstance(x, OnGPU)}
        others = [x for x in leaves if not isinstance(x, OnGPU)]
        leaving = self.leaving and func is aten._to_copy.default
        self.leaving = self.leaving and not leaving
        wanted = kwargs.get("device")
        made_here = wanted is not None and wanted.type == "cuda"

        self.refuse_foreign_generators(func, args, kwargs, ours or made_here)
        if not ours and not made_here:
            result = func(*args, **kwargs)
            # autograd puts zeros in the place of a gradient that is missing, on the device of its tensor
            missing = func is aten.zeros.default and where()[0] == "_engine_run_backward"
            return OnGPU(result) if missing else result

        self.refuse_mixtures(func, args, ours, others)
        self.book(func, args, kwargs, others, leaving)

        inner_args, inner_kwargs = mapped(lambda x: getattr(x, "held", x), (args, kwargs))
        if made_here:
            inner_kwargs["device"] = torch.device("cpu")
        if self.graph is not None:
            result = self.graph.add(func, inner_args, inner_kwargs, ours)
        else:
            result = func(*inner_args, **inner_kwargs)
        foreign = {id(x) for x in others}

        def wrapped(x):
            if leaving or id(x) in foreign:
                return x
            return ours.get(id(x)) if id(x) in ours else OnGPU(x)
        return mapped(wrapped, result)

    def refuse_mixtures(self, func, args, ours, others):
        wrong = [] if func in COPIES else [x for x in others if x.dim() > 0]
        if func in READS_INDEX + WRITES_INDEX and isinstance(args[0], OnGPU):
            values = args[2:3]                   # CPU indices are moved, CPU values are not
            wrong = [x for x in wrong if any(x is value for value in values)]
        if writes(func) and func not in COPIES:  # not even a CPU scalar can take a value of the GPU
            wrong += [x for x in tensors(args[0]) if not isinstance(x, OnGPU)]
        if ours and wrong:
            shapes = [tuple(x.shape) for x in wrong]
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least "
                               f"two devices, cuda:0 and cpu! (shapes {shapes})")

    def refuse_foreign_generators(self, func, args, kwargs, here):
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch._C.Generator) and (x._cdata in self.generators) != bool(here):
                raise RuntimeError(f"{func}: Expected a generator of the same device, found another")

    def book(self, func, args, kwargs, others, leaving):
        if self.inside or not leaving and (func.is_view or func.overloadpacket.__name__ in NO_KERNEL):
            return
        moved = func in COPIES and others and not kwargs.get("non_blocking")
        place = self.launch(str(func))
        unknown_size = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if leaving or moved or unknown_size or func in NEEDS_VALUES or indexing_waits(func, args, others):
            self.waits[str(func), place] += 1
            if self.graph is not None:
                raise RuntimeError(f"{func} at {place}: operation not permitted when stream is capturing")

    def launch(self, name) -> str:
        """Book a kernel, with the place in the code, which is returned."""
        place = "{1}:{2}".format(*where(outside_torch=True))
        book = self.kernels if self.graph is None else self.graph.kernels
        book[name, place] += 1
        return place

    @contextmanager
    def one_kernel(self, name):
        if not self.inside:
            self.launch(name)
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


def mapped(function: Callable, x, kind: type = torch.Tensor):
    """Nested lists, tuples and dicts with function(tensor) in the place of each tensor."""
    if isinstance(x, kind):
        return function(x)
    if isinstance(x, (list, tuple)):
        return type(x)(mapped(function, part, kind) for part in x)
    if isinstance(x, dict):
        return {name: mapped(function, part, kind) for name, part in x.items()}
    return x


def tensors(x) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    found = []
    mapped(found.append, x)
    return found


def writes(func) -> bool:
    """Whether an operation writes into its first argument."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and alias.is_write


def indexing_waits(func, args, others) -> bool:
    """x[mask] must know how many it finds, CPU indices must arrive, and x[i] = number sends the number; but
    x[mask] = number is one kernel."""
    if func not in READS_INDEX + WRITES_INDEX:
        return False
    mask = any(i is not None and i.dtype == torch.bool for i in args[1])
    number = func in WRITES_INDEX and any(args[2] is x for x in others)
    return number != mask if number else mask or bool(others)


def where(outside_torch: bool = False) -> tuple[str, str, int]:
    """(function, file, line) that asked for the operation."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.endswith(PLUMBING)
                            or outside_torch and "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_name, frame.f_code.co_filename.rsplit("/", 1)[-1], frame.f_lineno


class Graph:
    """torch.cuda.CUDAGraph: recording computes nothing, replaying does what was recorded. What a graph made
    lives as long as it does; other memory it does not keep."""

    def __init__(self):
        self.calls = []                          # (operation, arguments, result)
        self.made = {}                           # id -> tensor
        self.kernels = Counter()

    def add(self, func, args, kwargs, ours):
        """Record an operation; its result is memory without values, but that of a view has its tensor's."""
        def kept(x):
            if id(x) in self.made:
                return x
            return weakref.ref(x) if id(x) in ours else x.clone()        # scalars of the CPU go by value

        result = None
        if func.is_view:
            result = func(*args, **kwargs)
        elif not writes(func):
            meta_args, meta_kwargs = mapped(like("meta"), (args, kwargs))
            result = mapped(like("cpu"), func(*meta_args, **meta_kwargs))
        self.calls.append((func, *mapped(kept, (args, kwargs)), result))
        self.made |= {id(x): x for x in tensors(result)}
        return args[0] if writes(func) else result

    def there(self, x: weakref.ref) -> torch.Tensor:
        if x() is None:
            raise RuntimeError("a graph was replayed after memory that it uses was given back")
        return x()

    @torch.no_grad()
    def replay(self):
        with torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, result in self.calls:
                args, kwargs = mapped(self.there, (args, kwargs), weakref.ref)
                again = func(*args, **kwargs)
                if not writes(func) and not func.is_view:
                    for old, new in zip(tensors(result), tensors(again)):
                        old.copy_(new)
        GPU.now.launch("replay")


def like(device: str) -> Callable:
    """From a tensor to memory of its shape on a device."""
    return lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    GPU.now.graph = graph
    GPU.now.graphs.append(graph)
    try:
        yield
    finally:
        GPU.now.graph = None


class Generator(torch.Generator):
    """torch.Generator("cuda") without CUDA: one of the CPU, remembered."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            GPU.now.generators[made._cdata] = made
        return made

    def __init__(self, device="cpu"):
        pass


class Autocast(torch.autocast):
    """The CPU's in the place of CUDA's: both convert what models here do under it, linear and attention."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextmanager
def simulated_cuda(gib: float = 24.0) -> Iterator[GPU]:
    """Inside, everything believes in one GPU with so much memory."""
    memory = (int(gib * 2 ** 30), int(gib * 2 ** 30))
    plain_norm = F.rms_norm

    def rms_norm(x, *args, **kwargs):
        if not isinstance(x, OnGPU):
            return plain_norm(x, *args, **kwargs)
        with gpu.one_kernel("rms_norm"):
            return plain_norm(x, *args, **kwargs)
    cuda = dict(is_available=lambda: True, device_count=lambda: 1, _lazy_init=lambda: None,
                set_device=lambda device: None, mem_get_info=lambda device=None: memory,
                is_bf16_supported=lambda *a: True, CUDAGraph=Graph, graph=recording,
                device=lambda device: nullcontext(),
                set_per_process_memory_fraction=lambda share, device=None: None,
                get_device_name=lambda device=None: "a simulated GPU")
    gpu = GPU()
    with (mock.patch.multiple(torch.cuda, **cuda), mock.patch.object(torch, "Generator", Generator),
          mock.patch.object(torch, "autocast", Autocast), mock.patch.object(F, "rms_norm", rms_norm),
          mock.patch.object(torch, "compile", lambda model, **options: model)):
        torch.__future__.set_overwrite_module_params_on_conversion(True)     # Module.to makes new parameters
        torch._C._set_only_lift_cpu_tensors(True)        # torch.tensor(..., device=): made here, then moved
        try:
            with gpu:
                GPU.now = gpu
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)


def count() -> None:
    """Print the kernels, launches and waits of the default model: per decoded token, per micro-batch."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import rl
    from model import GPT, ModelConfig, sample

    with simulated_cuda() as gpu:
        model = GPT(ModelConfig()).to(CUDA)
        books = {}
        for max_new in (17, 49):                 # two stretches of 16 tokens more
            before = (gpu.kernels.total(), gpu.waits.total())
            sample(model, [[1, 2, 3], [4, 5]], 4, max_new, -1, 0, torch.Generator())
            books[max_new] = (gpu.kernels.total() - before[0], gpu.waits.total() - before[1])
        launches, waits = ((long - short) / 32 for short, long in zip(books[17], books[49]))
        print(f"a decoded token: {gpu.graphs[-1].kernels.total()} kernels, {launches:.2f} launches with "
              f"graphs, {waits:.3f} waits")
        for kl in (0., .1):
            before = gpu.waits.total()
            batch = rl.Batch([[1, 2], [3]], [[4] * 10] * 8, [torch.zeros(10)] * 8, [], [],
                             torch.zeros(2, 4), 0., 0.)
            c = rl.Config(kl=kl, micro_tokens=20)
            rl.policy_gradient(model, model, batch, torch.tensor([1., -1.] * 4), range(8), c, 0)
            print(f"an update of 4 micro-batches, KL {kl:g}: {gpu.waits.total() - before} waits")


if __name__ == "__main__":
    count()
