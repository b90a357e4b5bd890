"""A recorded step is the step: on a CPU, where a recording of its operations stands in for a CUDA graph.

As in a graph, recording has no effect and a replay runs no Python: the operations run again on the very tensors of the recording,
and what they make is written over what they made then.  So a step that keeps anything on the host, or reads anything from it,
comes to other numbers.  tests/test_cuda_path.py has the other half, on fake CUDA tensors.
"""
import csv
import itertools
import json
import random
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torture
from command import run
from cuda_path import tensors
from helpers import make_images
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import kernels.augment
import kernels.softmax_kl
from cli import options
from diagnostics import gradients
from losses import cross_entropy
from rundir import errors
from training import cuda_graph, evaluation
from training import run as running
from training.device import RunContext
from training.distributed import Ranks

EVERY = 2
CAPTURE = cuda_graph.capture
FLAGS = ("--dataset imagefolder --data-dir {place}/images --epochs 3 --warmup-epochs 1 --batch-size 4 --val-size 12 "
         "--policy none --device cpu --kernels triton --seed 3")


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """The operations of one call, in `calls`; what they overwrite that was there before is put back at the end."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        given = {one.name: value for one, value in zip(function._schema.arguments, args)} | kwargs
        written = tensors([given.get(one.name) for one in function._schema.arguments
                           if (one.alias_info and one.alias_info.is_write) or one.name.startswith("running_")])
        self.overwrite(written)
        result = function(*args, **kwargs)
        self.made |= set(map(memory, tensors(result))) - set(map(memory, tensors((args, kwargs))))  # without views
        self.note(lambda: function(*args, **kwargs), result)
        return result

    def overwrite(self, written) -> None:
        for tensor in written:
            if memory(tensor) not in self.made | self.before.keys():
                storage = tensor.untyped_storage()
                self.before[memory(tensor)] = storage, storage.clone()

    def note(self, call, result=()) -> None:
        self.calls.append((call, tensors(result)))

    def put_back(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        for call, old in self.calls:
            for then, now in zip(old, tensors(call())):
                if memory(then) != memory(now):
                    then.copy_(now)


class Launch:
    """In the place of a Triton kernel, which the recording does not see by itself."""

    def __init__(self, kernel, graphs):
        self.kernel, self.graphs = kernel, graphs

    def __getitem__(self, grid):
        def launch(*args, **options):
            with _disable_current_modes():
                self.kernel[grid](*args, **options)
            if self.graphs.recording:
                self.graphs.recording.note(lambda: self.kernel[grid](*args, **options))
        return launch


class Graphs:
    """In the place of training.cuda_graph.capture."""
    recording, replays, made = None, 0, 0

    def record(self, function, pool, stream):
        self.recording, self.made = Recording(), self.made + 1
        recording = self.recording
        try:
            with recording:
                function()
        finally:
            self.recording = None
            recording.put_back()

        def replay():
            self.replays += 1
            recording.replay()
        return replay


@pytest.fixture
def often(monkeypatch):
    """Steps are looked at sooner than in a run of hours."""
    monkeypatch.setattr(gradients, "LOG_EVERY", EVERY)


@pytest.fixture
def graphs(monkeypatch, often):
    """Steps are recorded on the CPU; its learning rate has the digits of the number it is given otherwise."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles and takes no CPU tensors")
    found = Graphs()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, answer in {"Stream": stream, "current_stream": stream, "stream": nullcontext(), "graph_pool_handle": None,
                         "is_current_stream_capturing": False}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)

    class CudaGraph(cuda_graph.CudaGraph):
        def __init__(self, step, device):
            super().__init__(step, device)
            self.lr = self.lr.double()

    monkeypatch.setattr(cuda_graph, "CudaGraph", CudaGraph)
    monkeypatch.setattr(running, "use_cuda_graph", lambda wanted, context, *, fused, **reasons: wanted and fused)
    monkeypatch.setattr(cuda_graph, "capture", found.record)
    monkeypatch.setattr(kernels.softmax_kl, "use_triton", lambda tensor: False)  # its operator is recorded whatever it calls
    monkeypatch.setattr(kernels.augment, "_augment_kernel", Launch(kernels.augment._augment_kernel, found))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("capture")
    make_images(place / "images" / "train", ["a", "b", "c"], 8, seed=0, size=32)
    make_images(place / "images" / "test", ["a", "b", "c"], 5, seed=1, size=32)
    return place


EAGER, RECORDED = "--no-cuda-graph", "--cuda-graph"


@pytest.mark.parametrize("script, flags, order", [
    ("train_teacher.py", "--model v2_pico --model-ema 0.9", (EAGER, RECORDED)),
    # The second run reads the logits of the first.
    ("distill.py", "--student resnet8 --teacher-logits {place}/eager", (EAGER, RECORDED)),
    ("distill.py", "--student resnet8 --method dkd --dkd-warmup 2 --grad-accum 2 --opt sgd --lr 0.05 --match-norm kd "
     "--teacher-logits {place}/recorded", (RECORDED, EAGER))])
def test_a_recorded_run_leaves_what_an_eager_one_leaves(capsys, place, graphs, script, flags, order):
    """The student's teacher is the teacher's own run."""
    if script == "distill.py":
        flags += " --allow-weak-teacher --teacher-checkpoint {place}/train_teacher.py" + EAGER + "/best.pt"
    for how in order:
        line = f"{FLAGS} {flags} {how} --overwrite --output {{place}}/{script}{how}"
        code, _, err = run(capsys, script, line.format(place=place))
        assert code == 0, err
    assert torture.difference(place / f"{script}{RECORDED}", place / f"{script}{EAGER}") == ""
    assert graphs.made == 2 and graphs.replays == 6
    if "teacher-logits" in flags:
        read = [json.loads((place / f"{script}{how}" / "summary.json").read_text())["teacher_logits_read"] for how in order]
        assert read == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_a_gpu_records_steps(capsys, place, often, monkeypatch, precision):
    """Both scripts, recorded and launch by launch: the same losses, but for the order in which a GPU adds numbers."""
    monkeypatch.setattr(evaluation, "tolerance", lambda *args: 100.0)  # of 15 images one more or less is 7 %
    monkeypatch.setattr(RunContext, "scaler", lambda context: torch.amp.GradScaler(  # which needs no search in so few steps
        "cuda", init_scale=256.0, enabled=context.precision == "fp16"))
    flags = FLAGS.format(place=place).replace("--device cpu", "--device cuda --epochs 5 --opt sgd --lr 0.01 --amp " + precision)
    student = f"--student v2_pico --method dkd --allow-weak-teacher --teacher-checkpoint {place}/gpu-teacher-cuda-graph/best.pt"
    for script, network, more in (("train_teacher.py", "teacher", "--model resnet8"), ("distill.py", "student", student)):
        tables = []
        for how in ("cuda-graph", "no-cuda-graph"):
            output = place / f"gpu-{network}-{how}"
            code, out, err = run(capsys, script, f"{flags} {more} --{how} --overwrite --output {output}")
            assert code == 0, err
            assert "CUDA graph disabled" not in out
            with open(output / "log.csv") as file:
                tables.append(list(csv.DictReader(file)))
        for recorded, launched in zip(*tables, strict=True):
            for column in ("train_loss", "val_loss", "grad_norm_mean"):
                assert float(recorded[column]) == pytest.approx(float(launched[column]), rel=0.05), (network, column)


@pytest.mark.parametrize("failure, code", [
    (RuntimeError("operation not permitted when stream is capturing\nand more"), errors.USAGE),
    (torch.OutOfMemoryError("CUDA out of memory\nand more"), errors.OUT_OF_MEMORY)])
def test_a_recording_that_fails_ends_the_run(capsys, place, graphs, monkeypatch, failure, code):
    """For PyTorch's random generator may be left in it, and then a network with dropout cannot go on."""
    recording = []

    @contextmanager
    def graph(*args, **named):
        recording.append(True)
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def loss(*args, mixed_ce=cross_entropy.mixed_ce, **named):
        if recording:
            raise failure
        return mixed_ce(*args, **named)

    monkeypatch.setattr(cuda_graph, "capture", CAPTURE)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(cross_entropy, "mixed_ce", loss)
    flags = f"{FLAGS.format(place=place)} --model v2_pico --cuda-graph --output {place / str(code)}"
    ended, _, err = run(capsys, "train_teacher.py", flags)
    reason = str(failure).partition("\n")[0]
    assert (ended, err) == (code, f"error: a CUDA graph cannot be captured ({reason}). use --no-cuda-graph\n")


@pytest.mark.parametrize("plant", [
    lambda weight: random.random(), lambda weight, count=itertools.count(): next(count), lambda weight: weight.amax().item(),
    lambda weight, kept=[0.0]: kept.__setitem__(0, weight.mean() + kept[0]) or kept[0], None])
def test_a_planted_state_on_the_host_is_noticed(graphs, plant):
    """A random number of Python, a count, a value that is read, and a tensor that is new each time."""
    weights = []
    for recorded in (False, True):
        random.seed(0)
        weights.append(torch.ones(3))

        def step(position, lr, diagnose):
            weights[-1].add_(lr * (plant(weights[-1]) if plant else weights[-1]) + position)
        take = cuda_graph.CudaGraph(step, torch.device("cpu")) if recorded else step
        try:
            for number in range(9):
                take(number, 0.5, number % EVERY == 0)
        except AssertionError as failure:
            assert "a value is read" in str(failure)
    assert torch.equal(*weights) == (plant is None) and graphs.made


@pytest.mark.parametrize("flags, device, fused, ranks, reason", [
    ("", "cpu", True, 1, ""), ("--no-cuda-graph", "cuda", True, 1, ""), ("--cuda-graph", "cpu", True, 1, "it needs a GPU"),
    ("", "cuda", False, 1, "plain PyTorch augmentation"), ("", "cuda", True, 2, "DDP"),
    ("--deterministic", "cuda", True, 1, "--deterministic"), ("--grad-checkpoint", "cuda", True, 1, "--grad-checkpoint"),
    ("", "cuda", True, 1, None), ("--cuda-graph --compile", "cuda", True, 1, None)])
def test_where_a_step_is_recorded(capsys, flags, device, fused, ranks, reason):
    context = RunContext(torch.device(device), "off", ranks=Ranks(size=ranks))
    args = options.parse_teacher("", "", flags.split())
    captured = cuda_graph.use_cuda_graph(args.cuda_graph, context, deterministic=args.deterministic,
                                         grad_checkpoint=args.grad_checkpoint, fused=fused)
    out = capsys.readouterr().out
    assert captured == (reason is None)
    assert out.startswith(f"CUDA graph disabled: {reason}") if reason else not out
