"""The CUDA path of both scripts on a machine without a GPU: every tensor is a fake CUDA tensor, which has a device and a shape
and no numbers.

    with CudaPath(tmp_path) as path:
        path.distill("--method dkd --amp fp16")      the real main(), from the flags to the last line
    path.launches                                    what a step launches, by what it is for

PyTorch's own fake tensors refuse operations between devices, and results whose size depends on data.  Here a mode on top of them
sees each operation, and raises `Wait` for one that makes the host wait for the GPU inside a step: reading a value, a copy that
blocks. The first step of a run is free to wait, since it makes what is made once.  Triton's kernels are not run; their arguments
are looked at. What cannot be seen here: time, bandwidth, what cuDNN chooses, and how many launches one operator of PyTorch
really makes.
"""
import functools
import itertools
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import kernels

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
IMAGES = 96  # of each split; also what every float64 value reads as, so that evaluation finds all of them
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
NO_LAUNCH = set("""view _unsafe_view detach alias t transpose permute select slice unsqueeze squeeze expand as_strided split
    unbind empty empty_like empty_strided new_empty new_empty_strided is_pinned
    lift_fresh _reshape_alias is_same_size unfold""".split())
BOOKKEEPING = "book-keeping"


class Wait(AssertionError):
    """Something inside a step makes the host wait for the GPU."""


class NotRepeatable(AssertionError):
    """What is recorded as a CUDA graph would do something else each time it is called."""


class MixedDevices(AssertionError):
    """A kernel was given tensors that are not on the GPU."""


def tensors(tree) -> list:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def fake(tensor, device=CUDA):
    """A fake tensor of the same shape, strides and type."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


@functools.cache
def name_in_project(file: str) -> str | None:
    """The path of a file below the project's folder; None for others, those of packages, and this one."""
    path = Path(file)
    ours = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv") and path != Path(__file__)
    return str(path.relative_to(ROOT)) if ours else None


def place() -> str:
    """The line of the project that is being executed."""
    frame = sys._getframe(1)
    while frame:
        if name := name_in_project(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project"


class Watch(TorchDispatchMode):
    """Sees every operation: refuses those that wait inside a step, answers reads, and counts launches by phase."""

    def __init__(self):
        super().__init__()
        self.steps, self.inside, self.phase, self.counts = 0, False, BOOKKEEPING, Counter()
        self.by_step, self.recording, self.recordings = Counter(), None, 0

    @property
    def launches(self) -> dict:
        """Launches in a step by what they are for, without the first step; a call over many tensors counts as one."""
        return {phase: count / (self.steps - 1) for phase, count in self.counts.items()}

    def wait(self, what: str) -> None:
        if self.inside and self.steps > 1:
            raise Wait(f"{what} at {place()}")

    def note(self, name: str, *arguments) -> None:
        """Into a recording: an operation, and all numbers that it is given from Python."""
        if self.recording is not None and not name.startswith("profiler::"):
            numbers = [leaf for leaf in tree_leaves(arguments) if not isinstance(leaf, torch.Tensor)]
            self.recording.append(f"{name} {numbers} at {place()}")

    def record(self, function, pool, stream):
        """In the place of training.cuda_graph.record: a recording twice over must be the same; a replay is one launch."""
        both = []
        for _ in range(2):
            self.recording = []
            function()
            both.append(self.recording)
            self.recording = None
        self.recordings += 1
        for one, other in itertools.zip_longest(*both):
            if one != other:
                raise NotRepeatable(f"{one}, and then {other}")
        return self.launch

    def launch(self, count: int = 1) -> None:
        if self.inside and self.steps > 1 and self.recording is None:
            self.counts[self.phase] += count
            self.by_step[self.steps] += count

    @contextmanager
    def during(self, phase: str):
        """What is launched in here is for `phase`, unless it is part of another one."""
        before = self.phase
        self.phase = phase if before == BOOKKEEPING else before
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        name = function.name().removeprefix("aten::").split(".")[0]
        inputs = tensors((args, kwargs))
        if function in READS:
            if any(tensor.is_cuda for tensor in inputs):
                self.wait(f"a value is read ({name})")
            return {torch.bool: False, torch.int64: 0, torch.float64: float(IMAGES)}.get(args[0].dtype, 0.0)
        if name.startswith(("_fused_sgd", "_fused_adamw")):  # without a fake form, the latter with such a rate; in place
            assert all(tensor.is_cuda for tensor in inputs)
            result = None
        else:
            result = function(*args, **kwargs)
        outputs = tensors(result)
        self.note(name, args, kwargs)
        if self.recording is not None and not all(tensor.is_cuda for tensor in (*inputs, *outputs)):
            raise MixedDevices(f"a tensor on the CPU would be read once and never again ({name}) at {place()}")
        if function in COPIES:
            source, target = (args[1], args[0]) if function is aten.copy_.default else (args[0], result)
            if source.device != target.device and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.wait(f"a blocking copy from {source.device.type} to {target.device.type}")
        if name not in NO_LAUNCH and not name.startswith("prim::") and any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            self.launch(2 if name == "convolution_backward" else 1)
        return result


class StandIn:
    """Takes the place of a Triton kernel: looks at its arguments and counts, or records, one launch."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def __getitem__(self, grid):
        def launch(*args, **options):
            wrong = [tensor for tensor in tensors(args) if not tensor.is_cuda]
            if wrong:
                raise MixedDevices(f"a kernel was given a tensor on {wrong[0].device} at {place()}")
            self.watch.launch()
            self.watch.note("a kernel of ours", args, options)
        return launch


# --- what PyTorch asks the driver for, in Python ------------------------------------------------------------------------

def item(self, index):
    """Indexing by operators: in C++ it asks the driver for the current device."""
    index, dim, lists = index if isinstance(index, tuple) else (index,), 0, []
    if any(one is Ellipsis for one in index):
        at = next(number for number, one in enumerate(index) if one is Ellipsis)
        named = sum(one is not None and one is not Ellipsis for one in index)
        index = (*index[:at], *[slice(None)] * (self.dim() - named), *index[at + 1:])
    for one in index:
        if one is None:
            self, dim = self.unsqueeze(dim), dim + 1
            lists.append(None)
        elif isinstance(one, int):
            self = aten.select.int(self, dim, one)
        elif isinstance(one, slice):
            self, dim = aten.slice.Tensor(self, dim, one.start, one.stop, one.step or 1), dim + 1
            lists.append(None)
        else:
            lists.append(one)
            dim += 1
    return aten.index.Tensor(self, lists) if any(one is not None for one in lists) else self


def set_item(self, index, value):
    target = item(self, index)
    target.copy_(value) if isinstance(value, torch.Tensor) else target.fill_(value)


def backward(loss, gradient):
    """Walks the graph as the engine does, which would ask the driver for streams; checks devices and types of what it hands
    on."""
    waiting, stack = Counter(), [loss.grad_fn]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    given, ready = defaultdict(dict), [loss.grad_fn]
    given[loss.grad_fn][0] = gradient
    while ready:
        node = ready.pop()
        gradients = given.pop(node, {})
        if type(node).__name__ == "AccumulateGrad":
            parameter, gradient = node.variable, gradients[0].detach()
            assert (gradient.device, gradient.dtype, gradient.shape) == (parameter.device, parameter.dtype, parameter.shape)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            continue
        arguments = [gradients.get(number) for number in range(max(gradients, default=0) + 1)]
        outputs = node.apply(*arguments) if hasattr(type(node), "_forward_cls") else node(*arguments)
        for (following, number), gradient in zip(node.next_functions, outputs if isinstance(outputs, tuple) else (outputs,)):
            if following is None:
                continue
            if gradient is not None:
                wanted = following._input_metadata[number]
                assert gradient.device == wanted.device
                gradient = gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
                there = given[following].get(number)
                given[following][number] = gradient if there is None else there + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def gradients_of(loss, parameters, gradient):
    """As torch.autograd.grad, by `backward`."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward(loss, gradient)
    found = tuple(parameter.grad for parameter in parameters)
    for parameter, gradient in zip(parameters, before):
        parameter.grad = gradient
    return found


# --- the run ------------------------------------------------------------------------------------------------------------

class CudaPath(ExitStack):
    """While it is entered, `distill` and `train_teacher` run those scripts on fake CUDA tensors."""

    def __init__(self, folder: Path, teacher: str = "resnet4", student: str = "resnet4"):
        super().__init__()
        self.folder, self.teacher, self.student = folder, teacher, student
        self.watch, self.mode = Watch(), FakeTensorMode(allow_non_fake_inputs=True)

    def replace(self, target, **attributes) -> None:
        for name, value in attributes.items():
            self.enter_context(mock.patch.object(target, name, value, create=not hasattr(target, name)))

    def outside(self, function):
        """`function` on real tensors; those that it returns become fake ones on their device."""
        @functools.wraps(function)
        def call(*args, **kwargs):
            with unset_fake_temporarily(), _disable_current_modes():
                result = function(*args, **kwargs)
            with self.mode:
                return tree_map(lambda leaf: fake(leaf, leaf.device) if isinstance(leaf, torch.Tensor) else leaf, result)
        return call

    def phase(self, target, name: str, phase: str) -> None:
        """Count what `target.name` launches as that of `phase`."""
        function = getattr(target, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            with self.watch.during(phase):
                return function(*args, **kwargs)
        self.replace(target, **{name: call})

    def __enter__(self):
        super().__enter__()
        self.callback(self._restore, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                      torch.backends.cudnn.allow_tf32)
        self._replace_driver()
        self._replace_project()
        self._mark_steps()
        return self

    @staticmethod
    def _restore(deterministic, benchmark, allow_tf32) -> None:
        """What setup_context sets in this process."""
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
        kernels.choose("auto")

    def _replace_driver(self) -> None:
        event = SimpleNamespace(record=lambda: None, query=lambda: True, elapsed_time=lambda end: 1.0)
        stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
        answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
                   "is_bf16_supported": True,
                   "max_memory_allocated": 0, "max_memory_reserved": 0, "mem_get_info": (80 << 30, 80 << 30),
                   "get_device_name": "fake", "Event": event, "current_stream": stream,
                   "Stream": stream, "stream": nullcontext(), "graph_pool_handle": (0, 1)}
        self.replace(torch.cuda, **{name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()},
                     synchronize=lambda *_: self.watch.wait("synchronize"), manual_seed_all=lambda seed: None,
                     is_current_stream_capturing=lambda: self.watch.recording is not None,
                     get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *_: None,
                     _initialized=True, _exchange_device=lambda index: index, _maybe_exchange_device=lambda index: index)
        # Gradient checkpointing asks for the number of the backward pass, and computes a block again once in each.
        self.replace(torch._C, _cuda_setDevice=lambda index: None, _current_graph_task_id=lambda: self.watch.steps)
        self.replace(torch.backends.cudnn, version=lambda: 90000)
        self.replace(fake_tensor, init_gpu_context=lambda *_: None)
        self.replace(FakeTensorMode, avoid_device_init=True, __deepcopy__=lambda mode, memo: mode)
        self.replace(FakeTensor, __getitem__=item, __setitem__=set_item,  # all values of a tensor are the same: one is read
                     tolist=lambda tensor: np.full(tensor.shape, tensor.flatten()[0].item() if tensor.numel() else 0).tolist())
        self.replace(torch.nn.Module, to=self._move(torch.nn.Module.to))
        self.replace(torch.amp.GradScaler, get_scale=lambda scaler: 1024.0)
        clip = sys.modules["torch.nn.utils.clip_grad"]
        self.replace(clip, _has_foreach_support=lambda *_: True, _device_has_foreach_support=lambda *_: True)

    def _move(self, to):
        """Module.to, which for a CUDA device gives the network fake weights there."""
        def move(net, *args, **kwargs):
            device = torch.device(args[0]) if args and isinstance(args[0], (str, torch.device)) else None
            if device is None or device.type != "cuda":
                return to(net, *args, **kwargs)
            with self.mode:
                for module in net.modules():
                    for table in (module._parameters, module._buffers):
                        for key, value in table.items():
                            if value is not None and not value.is_cuda:
                                moved = fake(value, device)
                                table[key] = torch.nn.Parameter(moved,
                                                                value.requires_grad) if table is module._parameters else moved
            return net
        return move

    def _replace_project(self) -> None:
        import models
        from augment import augmenter, cpu, sampling
        from data import datasets
        from kernels import augment, softmax_kl
        from models import cifar_networks
        from rundir import checkpoint
        from training import cuda_graph, metrics

        real_write = checkpoint.write

        def write(path, *, previous=None, **content):
            """The real file, of zeros; every tensor must be on the CPU by now."""
            assert not any(tensor.is_cuda for tensor in tensors(content)), f"{Path(path).name} holds CUDA tensors"
            with unset_fake_temporarily(), _disable_current_modes():
                content = tree_map(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor)
                                   else leaf, content)
                real_write(path, previous=previous, **content)

        def load(**options):
            with self.mode:
                split = datasets.Split(torch.empty(IMAGES, 32, 32, 3, dtype=torch.uint8, device=CUDA),
                                   torch.empty(IMAGES, dtype=torch.int64, device=CUDA))
            return datasets.Dataset("cifar100", split, split, split, self.classes, (0.5,) * 3, (0.25,) * 3, "validation", "")

        resnet4 = functools.partial(cifar_networks.resnet, widths=(16, 16), blocks=(1,))  # few operations to go through
        self.enter_context(mock.patch.dict(cifar_networks.NETWORKS, resnet4=resnet4))
        self.classes = [f"class {number}" for number in range(100)]
        checkpoint.write(
            self.folder / "teacher.pt", kind="weights", state_dict=models.build(self.teacher, 100).state_dict(),
            model=self.teacher, classes=self.classes,
            image_size=32, mean=[0.5] * 3, std=[0.25] * 3, dataset="cifar100", seed=0, epoch=1, val_acc1=100.0, test_acc1=100.0)
        self.replace(cuda_graph, capture=self.watch.record)
        self.replace(checkpoint, write=write)
        self.replace(datasets, load=load)
        self.replace(metrics, MAX_SKIPPED=2)  # so that rows are copied to the host within a few steps
        self.replace(models, build=self.outside(models.build), load=self.outside(models.load), flops=lambda *_: 1,
                     read_teachers=self.outside(models.read_teachers), load_teachers=self.outside(models.load_teachers),
                     initialise=lambda *_, **__: None)
        self.replace(augmenter, build_tables=self.outside(augmenter.build_tables))
        self.replace(sampling, crop_sizes=self.outside(sampling.crop_sizes), erase_sizes=self.outside(sampling.erase_sizes),
                     beta_quantiles=self.outside(sampling.beta_quantiles))
        self.replace(augment, **{name: StandIn(self.watch) for name in vars(augment) if name.endswith("_kernel")})
        self.replace(softmax_kl, _softmax_kl_kernel=StandIn(self.watch), _hyperparameters={})
        self.replace(torch.ops.fusekd, softmax_kl=softmax_kl._softmax_kl)  # the launcher, not the operator's fake form
        for cached in (softmax_kl._counter, *(each for each in vars(cpu).values() if hasattr(each, "cache_clear"))):
            cached.cache_clear()
            self.callback(cached.cache_clear)  # fake tensors would compute nothing, silently, in a real run of this process

    def _mark_steps(self) -> None:
        """A step begins where the loop asks for its learning rate and ends after the progress line."""
        from augment import BatchAugmenter
        from diagnostics.gradients import Diagnostics
        from losses import cross_entropy
        from losses.methods import METHODS
        from training import metrics, optimization
        from training.optimization import Update

        begin, end = optimization.learning_rate, metrics.Progress.step

        def begin_step(*args):
            self.watch.steps, self.watch.inside = self.watch.steps + 1, True
            return begin(*args)

        def end_step(*args):
            end(*args)
            self.watch.inside = False

        def call(net, *args, plain=torch.nn.Module.__call__, **kwargs):
            with self.watch.during("student" if net.training else "teacher"):
                return plain(net, *args, **kwargs)

        def walk(loss, gradient=None):
            with self.watch.during("backward"), torch.no_grad():
                backward(loss, torch.ones_like(loss) if gradient is None else gradient)

        self.replace(optimization, learning_rate=begin_step)
        self.phase(BatchAugmenter, "__call__", "augmentation")
        self.replace(metrics.Progress, step=end_step)
        self.replace(torch.nn.Module, __call__=call)
        def walk_twice(loss, parameters, gradient, *, retain_graph, materialize_grads):
            with self.watch.during("backward"), torch.no_grad():
                return gradients_of(loss, parameters, gradient)

        self.replace(torch.Tensor, backward=walk)
        self.replace(torch.autograd, grad=walk_twice)
        for target, name in ((torch.amp.GradScaler, "scale"), (torch.amp.GradScaler, "unscale_"),
                             (torch.amp.GradScaler, "update"),
                             (torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"), (torch.optim.SGD, "step")):
            self.phase(target, name, "scaler, clip and optimizer")
        for target, name in ((Diagnostics, "add"), (Update, "copy_parameters"), (Update, "relative_update")):
            self.phase(target, name, "diagnostics")
        self.phase(cross_entropy, "mixed_ce", "loss")
        for method in METHODS.values():
            module, name = method.function.split(":")
            self.phase(import_module(module), name, "loss")

    def distill(self, flags: str) -> None:
        import distill
        from cli import options
        self._run(distill.main, options.parse_distill,
                  f"--teacher-checkpoint {self.folder / 'teacher.pt'} --allow-weak-teacher --student {self.student} {flags}")

    def train_teacher(self, flags: str) -> None:
        import train_teacher
        from cli import options
        self._run(train_teacher.main, options.parse_teacher, f"--model {self.student} {flags}")

    def _run(self, main, parse, flags: str) -> None:
        common = f"--epochs 2 --warmup-epochs 1 --batch-size 32 --output {self.folder / 'run'}"
        arguments = parse("", "", f"{common} {flags}".split())
        with self.mode, self.watch:
            main(arguments)
