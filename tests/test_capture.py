"""A recorded step is the step: on a CPU, where a recording of its operations stands in for a CUDA graph.

As in a graph, recording has no effect and a replay runs no Python: the operations run again on the very tensors of the recording,
and what they make is written over what they made then.  So a step that keeps anything on the host, or reads anything from it,
comes to other numbers.  What is done on a second stream is replayed as late as it may be, and nothing that it touches may be
written on the first meanwhile.  tests/test_cuda_path.py has the other half, on fake CUDA tensors.
"""
import csv
import itertools
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from cuda_path import tensors
from test_scripts import make_images, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import kernels.augment
import losses
from training import ahead, capture, checkpoint, diagnostics, evaluation, models, options
from training import run as running
from training import step as stepping
from training.distributed import Ranks
from training.machine import Machine

EVERY = 2
CLOCK = 5  # columns at the end of log.csv
FLAGS = ("--dataset imagefolder --data-dir {place}/images --epochs 3 --warmup-epochs 1 --batch-size 8 --val-size 12 "
         "--device cpu --kernels triton --seed 3")


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """The operations of one call, in `calls`; what they overwrite that was there before is put back at the end.

    graphs: whose streams they are on.  late: those on another stream than the first, until the first waits for it.
    """

    def __init__(self, graphs):
        super().__init__()
        self.graphs, self.calls, self.late, self.made, self.before = graphs, [], [], set(), {}
        self.first, self.touched, self.overlapped = graphs.stream, {}, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        given = {one.name: value for one, value in zip(function._schema.arguments, args)} | kwargs
        written = tensors([given.get(one.name) for one in function._schema.arguments
                           if (one.alias_info and one.alias_info.is_write) or one.name.startswith("running_")])
        self.overwrite(written)
        result, read = function(*args, **kwargs), tensors((args, kwargs))
        new = set(map(memory, tensors(result))) - set(map(memory, read))  # without views
        self.made |= new
        self.note(lambda: function(*args, **kwargs), result, read=set(map(memory, read)), written=new | set(map(memory, written)))
        return result

    def overwrite(self, written) -> None:
        for tensor in written:
            if memory(tensor) not in self.made | self.before.keys():
                storage = tensor.untyped_storage()
                self.before[memory(tensor)] = storage, storage.clone()

    def note(self, call, result=(), *, read=frozenset(), written) -> None:
        """An operation that reads and writes these places in memory."""
        (self.calls if self.graphs.stream is self.first else self.late).append((call, tensors(result)))
        for place in read | written:
            self.touch(place, place in written)

    def touch(self, place: int, writes: bool) -> None:
        """No stream may write what another reads or writes at the same time."""
        others = self.touched.setdefault(place, {})
        for stream, (wrote, when) in others.items():
            assert not (wrote or writes) or stream is self.graphs.stream or when <= self.graphs.stream.seen(stream), "a race"
        before, _ = others.get(self.graphs.stream, (False, 0))
        others[self.graphs.stream] = before or writes, self.graphs.stream.now

    def waits(self, stream, other) -> None:
        if stream is self.first:
            self.calls, self.late = [*self.calls, *self.late], []
        self.overlapped |= stream is not other

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
                self.graphs.recording.note(lambda: self.kernel[grid](*args, **options),
                                           written=set(map(memory, tensors(args))))
        return launch


class Stream:
    """Counts its waits, and knows which of another stream's operations are done when its own next one begins."""

    def __init__(self, graphs):
        self.graphs, self.now, self.known = graphs, 1, {}

    def seen(self, other) -> int:
        return self.known.get(other, 0)

    def wait_stream(self, other) -> None:
        for stream, when in [*other.known.items(), (other, other.now)]:
            self.known[stream] = max(when, self.seen(stream))
        other.now += 1
        if self.graphs.recording:
            self.graphs.recording.waits(self, other)


class Graphs:
    """In the place of training.capture.record, and of CUDA's streams and events.  ms: of a replay without a second stream."""
    recording, replays, made, clock, ms = None, 0, 0, 0, 2

    def __init__(self):
        self.stream = Stream(self)

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def event(self, enable_timing):
        event = SimpleNamespace(query=lambda: True, elapsed_time=lambda end: end.at - event.at)
        event.record = lambda: setattr(event, "at", self.clock)
        return event

    def record(self, function, pool, stream):
        with self.on(stream):
            recording = Recording(self)
            self.recording, self.made = recording, self.made + 1
            try:
                with recording:
                    function()
            finally:
                self.recording = None
                recording.put_back()
        assert not recording.late, "nobody waits for the second stream"

        def replay():
            self.replays += 1
            self.clock += 1 if recording.overlapped else self.ms
            recording.replay()
        return replay


@pytest.fixture
def often(monkeypatch):
    """Steps are looked at, and decide between one stream and two, sooner than in a run of hours."""
    monkeypatch.setattr(ahead, "TIMES", 1)
    for module in (capture, diagnostics, stepping):
        monkeypatch.setattr(module, "EVERY", EVERY)


@pytest.fixture
def graphs(monkeypatch, often):
    """Steps are recorded on the CPU; its learning rate has the digits of the number it is given otherwise."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles and takes no CPU tensors")
    found = Graphs()
    for name, answer in {"Stream": lambda: Stream(found), "current_stream": lambda: found.stream, "stream": found.on,
                         "Event": found.event, "graph_pool_handle": lambda: None,
                         "is_current_stream_capturing": lambda: False}.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    class Step(capture.Step):
        def __init__(self, *args):
            super().__init__(*args)
            if self.captured:
                self.lr = self.lr.double()

    monkeypatch.setattr(running, "Step", Step)
    monkeypatch.setattr(running, "captures", lambda args, machine, fused: args.cuda_graph and fused)
    monkeypatch.setattr(capture, "record", found.record)
    monkeypatch.setattr(kernels.augment, "_augment_kernel", Launch(kernels.augment._augment_kernel, found))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("capture")
    make_images(place / "images" / "train", ["a", "b", "c"], 12, seed=0, size=32)
    make_images(place / "images" / "test", ["a", "b", "c"], 5, seed=1, size=32)
    return place


@pytest.fixture
def teacher(graphs, place, capsys):
    """The checkpoint of one, after an epoch."""
    if not (place / "teacher" / "best.pt").exists():
        flags = FLAGS.format(place=place).replace("--epochs 3 --warmup-epochs 1", "--epochs 1 --warmup-epochs 0")
        code, _, err = run(capsys, "train_teacher.py", f"{flags} --model v2_pico --output {place / 'teacher'}")
        assert code == 0, err
    return place / "teacher" / "best.pt"


def left(folder):
    """What a run leaves, without the clock: rows of both tables, and all its weights and moments."""
    tables = [[line.split(",")[:-cut or None] for line in (folder / name).read_text().splitlines()]
              for name, cut in (("log.csv", CLOCK), ("diagnostics.csv", 0))]
    return tables, checkpoint.read(folder / "last.pt")["update"]


def one(capsys, place, script, flags, how="--cuda-graph"):
    code, _, err = run(capsys, script, f"{FLAGS.format(place=place)} {flags} {how} --overwrite --output {place / 'run'}")
    assert code == 0, err
    return left(place / "run")


def both(capsys, place, script, flags):
    return [one(capsys, place, script, flags, how) for how in ("--no-cuda-graph", "--cuda-graph")]


@pytest.fixture(scope="module")
def eager():
    """Flags -> what a run leaves that records nothing."""
    return {}


@pytest.fixture
def distilled(capsys, place, teacher, graphs, eager):
    """Compares a run that records its steps with one that does not, which nothing that is planted may change."""
    def compare(flags="--method kd"):
        command = f"--student v2_pico {flags} --debug --teacher-checkpoint {teacher}"
        if flags not in eager:
            eager[flags] = one(capsys, place, "distill.py", command, "--no-cuda-graph")
        same(eager[flags], one(capsys, place, "distill.py", command))
    return compare


def same(eager, graph):
    assert eager[0] == graph[0]
    for one, other in zip(tree_leaves(eager[1]), tree_leaves(graph[1]), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("script, flags, replays", [
    ("train_teacher.py", "--model v2_pico --opt sgd --lr 0.05 --model-ema 0.9", 6),
    ("distill.py", "--student resnet8 --method kd --grad-accum 2", 6),
    ("distill.py", "--student v2_pico --method dkd --dkd-warmup 2 --opt sgd --lr 0.05", 4)])
def test_a_recorded_run_leaves_what_an_eager_one_leaves(capsys, place, teacher, graphs, script, flags, replays):
    if script == "distill.py":
        flags += f" --teacher-checkpoint {teacher}"
    same(*both(capsys, place, script, flags))
    assert graphs.made == 2 and graphs.replays == replays


@pytest.mark.parametrize("ms, winner, made", [(2, "side by side", 4), (0.5, "one after the other", 3)])
def test_the_next_batch_is_taught_on_a_second_stream_where_that_is_faster(distilled, graphs, monkeypatch, ms, winner, made):
    said = []
    monkeypatch.setattr(graphs, "ms", ms)
    monkeypatch.setattr(ahead, "say", said.append)
    distilled("--method dkd --epochs 5")
    assert said == [f"teacher and student {winner}; one after the other {ms:.2f} ms a step, side by side 1.00 ms a step"]
    assert graphs.made == made, "a step that is looked at, and both kinds that are tried; then the former side by side"
    assert graphs.replays == 12


def return_the_wrong_batch(self, position, rows, call=ahead.Ahead.__call__):
    call(self, position, rows)
    return self.next


def wait_for_nobody(self):
    self.keep(self.next)


def keep_other_tensors(self, made):
    self.kept = made


def overwrite_too_early(self, position, rows, call=ahead.Ahead.__call__):
    kept = call(self, position, rows)
    with torch.cuda.stream(self.there):
        self.keep(self.next)
    return kept


def begin_no_epoch(self, begin=ahead.Ahead.begin_epoch):
    if self.kept is None:
        begin(self)


@pytest.mark.parametrize("name, plant, noticed", [
    ("__call__", return_the_wrong_batch, "a race"), ("end_step", wait_for_nobody, "a race"),
    ("__call__", overwrite_too_early, "a race"), ("keep", keep_other_tensors, None), ("begin_epoch", begin_no_epoch, None)])
def test_a_planted_fault_of_the_second_stream_is_noticed(distilled, monkeypatch, name, plant, noticed):
    monkeypatch.setattr(ahead.Ahead, name, plant)
    with pytest.raises(AssertionError, match=noticed):
        distilled()


def test_a_second_stream_that_cannot_be_recorded_leaves_the_first(capsys, place, teacher, graphs, monkeypatch):
    """As where memory runs out between the fork and the join.  The loss scale goes on: no recording makes its tensors."""
    def fail(self, position, rows, call=ahead.Ahead.__call__):
        kept = call(self, position, rows)
        if self.overlapped:
            raise RuntimeError("CUDA out of memory\nand more")
        return kept

    joined, join = [], ahead.Ahead.join
    monkeypatch.setattr(ahead.Ahead, "__call__", fail)
    monkeypatch.setattr(ahead.Ahead, "join", lambda self: joined.append(self.overlapped) or join(self))
    monkeypatch.setattr(Machine, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2))
    said = []
    monkeypatch.setattr(capture, "say", said.append)
    eager, graph = both(capsys, place, "distill.py", f"--student v2_pico --method kd --epochs 4 --teacher-checkpoint {teacher}")
    same(eager, graph)
    assert graph[1]["scaler"]["scale"] > 64
    assert said == ["teacher and student one after the other: CUDA out of memory"]
    assert joined.count(True) == 1, "or the recording could not even end"
    assert graphs.made == 5 and graphs.replays == 9, "all that was recorded is forgotten, and recorded again on one stream"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_a_gpu_records_steps(capsys, place, often, monkeypatch, precision):
    """Both scripts, recorded and launch by launch: the same losses, but for the order in which a GPU adds numbers."""
    monkeypatch.setattr(evaluation, "ACCURACY_TOLERANCE", 100.0)  # of 15 images one more or less is 7 %
    monkeypatch.setattr(Machine, "scaler", lambda machine: torch.amp.GradScaler(  # which needs no search in so few steps
        "cuda", init_scale=256.0, enabled=machine.precision == "fp16"))
    flags = FLAGS.format(place=place).replace("--device cpu", "--device cuda --epochs 5 --opt sgd --lr 0.01 --amp " + precision)
    student = f"--student v2_pico --method dkd --teacher-checkpoint {place}/gpu-teacher-cuda-graph/best.pt"
    for script, network, more in (("train_teacher.py", "teacher", "--model resnet8"), ("distill.py", "student", student)):
        tables = []
        for how in ("cuda-graph", "no-cuda-graph"):
            output = place / f"gpu-{network}-{how}"
            code, out, err = run(capsys, script, f"{flags} {more} --{how} --overwrite --output {output}")
            assert code == 0, err
            assert "no CUDA graph" not in out
            tried = "teacher and student " in out  # one after the other, or side by side
            assert tried == (network == "student" and how == "cuda-graph")
            with open(output / "log.csv") as file:
                tables.append(list(csv.DictReader(file)))
        for recorded, launched in zip(*tables, strict=True):
            for column in ("train_loss", "val_loss", "grad_norm_mean"):
                assert float(recorded[column]) == pytest.approx(float(launched[column]), rel=0.05), (network, column)


def test_a_recorded_teacher_says_the_same(graphs):
    teacher = models.build("resnet8", 10).eval().requires_grad_(False)
    recorded = capture.Replayed(teacher)
    for seed in range(6):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(memory_format=torch.channels_last)
        assert torch.equal(recorded(images), teacher(images))
    assert (graphs.made, graphs.replays) == (1, 6 - capture.WARM_UP)


def test_a_teacher_that_cannot_be_recorded_is_called(graphs, monkeypatch, capsys):
    def fail(function, pool, stream):
        raise RuntimeError("operation not permitted\nand more")

    monkeypatch.setattr(capture, "record", fail)
    recorded = capture.Replayed(torch.nn.Identity())
    assert [recorded(number) for number in map(torch.tensor, range(6))] == list(range(6))
    assert capsys.readouterr().out == "no CUDA graph of the teacher: operation not permitted\n"


def test_a_recording_that_fails_leaves_an_eager_run(distilled, graphs, monkeypatch):
    def fail(function, pool, stream):
        Graphs.record(graphs, function, pool, stream)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(capture, "record", fail)
    said = []
    monkeypatch.setattr(capture, "say", said.append)
    distilled()
    assert graphs.made == 1 and not graphs.replays
    assert said == ["no CUDA graph of the step: operation not permitted when stream is capturing"]


def plant_a_random_number_of_python(logits):
    return logits * (1 + random.random())


def plant_a_count_on_the_host(logits, counter=itertools.count()):
    return logits + 0.1 * next(counter)


def plant_a_tensor_that_is_new_each_time(logits, kept=[0.0]):
    kept[0] = logits.detach().mean() + kept[0]
    return logits * kept[0]


@pytest.mark.parametrize("plant", [
    plant_a_random_number_of_python, plant_a_count_on_the_host, plant_a_tensor_that_is_new_each_time])
def test_a_planted_state_on_the_host_is_noticed(capsys, place, teacher, graphs, monkeypatch, plant):
    monkeypatch.setattr(random, "random", random.Random(0).random)
    loss = losses.mixed_ce
    monkeypatch.setattr(losses, "mixed_ce", lambda logits, *args, **named: loss(plant(logits), *args, **named))
    with pytest.raises(AssertionError):
        same(*both(capsys, place, "train_teacher.py", "--model v2_pico"))
    assert graphs.replays


def test_a_planted_read_is_noticed(capsys, place, teacher, graphs, monkeypatch):
    loss = losses.mixed_ce
    monkeypatch.setattr(losses, "mixed_ce", lambda logits, *args, **named: loss(logits * logits.amax().item(), *args, **named))
    with pytest.raises(AssertionError, match="a value is read"):
        both(capsys, place, "train_teacher.py", "--model v2_pico --debug")


@pytest.mark.parametrize("flags, device, fused, ranks, reason", [
    ("", "cpu", True, 1, ""), ("--no-cuda-graph", "cuda", True, 1, ""), ("--cuda-graph", "cpu", True, 1, "it needs a GPU"),
    ("", "cuda", False, 1, "the batch is made by plain PyTorch"), ("", "cuda", True, 2, "several processes"),
    ("--deterministic", "cuda", True, 1, "--deterministic"), ("--grad-checkpoint", "cuda", True, 1, "--grad-checkpoint"),
    ("", "cuda", True, 1, None), ("--cuda-graph --compile", "cuda", True, 1, None)])
def test_where_a_step_is_recorded(capsys, flags, device, fused, ranks, reason):
    machine = Machine(torch.device(device), "off", ranks=Ranks(size=ranks))
    recorded = capture.captures(options.parse_teacher("", "", flags.split()), machine, fused)
    out = capsys.readouterr().out
    assert recorded == (reason is None)
    assert out.startswith(f"no CUDA graph of the step: {reason}") if reason else not out
