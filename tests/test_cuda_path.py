"""Both scripts, from their flags to the summary, on fake CUDA tensors: devices agree, no step waits for the GPU, few launches
are our own."""
import itertools
import random
from pkgutil import resolve_name

import pytest
import torch
from cuda_path import BOOKKEEPING, CudaPath, MixedDevices, NotRepeatable, Wait
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import kernels
from augment import cpu
from diagnostics.gradients import LOG_EVERY
from kernels import augment
from losses import Targets
from losses.methods import METHODS
from training import evaluation, run
from training.metrics import Metrics

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # a deep copy of one asks for it
CAPTURED = "--method dkd --model-ema 0.9 --dkd-warmup 2 --grad-accum 2 --class-weights balanced --match-norm kd"
STUDENTS = (CAPTURED, "--method kd --amp bf16 --opt sgd --clip-grad 0 --device cuda --deterministic --grad-checkpoint",
            "--method dkd --kernels reference --mixed-target dominant --opt sgd --momentum 0 --amp off")
TEACHERS = ("--amp off --mixup 0 --cutmix 0 --crop resized --image-size 40 --opt sgd --model-ema 0.9 --device cuda:0",
            "--amp bf16 --kernels reference --policy randaugment --crop resized --image-size 24 "
            "--deterministic --class-weights balanced")


@pytest.fixture
def evaluated(monkeypatch):
    """How many images each evaluation takes at once."""
    sizes, evaluate = [], evaluation.evaluate
    for user in (run, evaluation):
        monkeypatch.setattr(user, "evaluate", lambda *args, **named: sizes.append(args[5]) or evaluate(*args, **named))
    return sizes


@pytest.mark.parametrize("flags", STUDENTS)
def test_a_student_is_distilled_without_waiting(tmp_path, flags, evaluated):
    with CudaPath(tmp_path) as path:
        path.distill(flags)
    watch = path.watch
    assert watch.steps == 6 and (tmp_path / "run" / "summary.json").exists()
    assert len(evaluated) >= 4 and set(evaluated) == {16 if flags == CAPTURED else 32}, "as many images at once as in training"
    launch_by_launch = "--deterministic" in flags or "--kernels reference" in flags
    assert watch.recordings == (0 if launch_by_launch else 2), "a step with diagnostics, and one without"
    if flags == CAPTURED:
        eager, *replays = (watch.by_step[step] for step in range(3, 7))
        assert eager > 100 and len(replays) == 3
        assert max(replays) <= 4, "position, learning rate, the graph, and a copy of rows to the host, which is frequent here"


@pytest.mark.parametrize("flags", TEACHERS)
def test_a_teacher_is_trained_without_waiting(tmp_path, flags, evaluated):
    with CudaPath(tmp_path) as path:
        path.train_teacher(flags)
        assert torch.backends.cudnn.allow_tf32 == ("--amp off" not in flags), "fp32 is exact, or it was not asked for"
        assert not torch.utils.deterministic.fill_uninitialized_memory, "a launch more for every new tensor"
    assert path.watch.steps == 6 and (tmp_path / "run" / "summary.json").exists() and set(evaluated) == {32}
    assert path.watch.recordings == (0 if "--kernels reference" in flags else 2), "the batches of 40 pixels are captured, too"
    # What is cached on the way, such as the constants of the augmentation on a CPU, is real again afterwards.
    pixels = torch.full((1, 12), 255, dtype=torch.uint8)
    assert torch.equal(cpu.normalise(pixels, torch.zeros(12), torch.ones(12)), torch.ones(1, 12))


@pytest.mark.parametrize("method, options", [
    *((method, {}) for method in METHODS), ("kd", {"kl": "reverse", "standardize": True}), ("dkd", {"mixed_target": "first"})])
def test_the_losses_in_plain_pytorch_do_not_wait(tmp_path, method, options):
    with CudaPath(tmp_path) as path, path.mode, path.watch:
        kernels.choose("reference")
        path.watch.inside = True
        student, teacher = torch.empty(8, 4, device="cuda", requires_grad=True), torch.empty(8, 4, device="cuda")
        targets = Targets.unmixed(torch.empty(8, dtype=torch.int64, device="cuda"))
        for path.watch.steps in (1, 2):
            loss, _ = resolve_name(METHODS[method].function)(student, teacher, targets, **options)
            loss.backward()
    assert student.grad.is_cuda and path.watch.by_step[2]


def read(logits, labels=None):
    logits.sum().item()


@pytest.mark.parametrize("plant, refused, reason", [
    (lambda logits, labels: logits * random.random(), NotRepeatable, "mul"),
    (lambda logits, labels, counter=itertools.count(): logits[next(counter) % len(logits)].sum(), NotRepeatable, "select"),
    (lambda logits, labels: logits * torch.tensor(0.5), MixedDevices, "on the CPU"),
    (read, Wait, "a value is read"), (lambda logits, labels: labels.cpu(), Wait, "from cuda to cpu"),
    (lambda logits, labels: torch.tensor([0.5, 0.5], device=logits.device), Wait, "from cpu to cuda"),
    (lambda logits, labels: logits[labels > 3], DynamicOutputShapeException, "nonzero"),
    (lambda logits, labels: labels + torch.zeros(len(labels), dtype=torch.int64), RuntimeError, "cuda:0(,| and) cpu"),
    (lambda logits, labels: torch.cuda.synchronize(), Wait, "synchronize"),
    (lambda logits, labels: augment._augment_kernel[(1,)](logits, torch.ones(8)), MixedDevices, "a tensor on cpu")])
def test_a_planted_fault_is_caught(tmp_path, plant, refused, reason):
    """In a step after the first, or while it is recorded."""
    with CudaPath(tmp_path) as path, path.mode, path.watch:
        logits, labels = torch.empty(8, 4, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
        path.watch.steps, path.watch.inside = 2, True
        with pytest.raises(refused, match=reason):
            plant(logits, labels)
            path.watch.record(lambda: plant(logits, labels), None, None)


def test_a_read_in_the_step_of_a_script_is_caught(tmp_path, monkeypatch):
    def add(self, logits, targets, *losses, add=Metrics.add):
        read(logits)
        add(self, logits, targets, *losses)

    with CudaPath(tmp_path) as path:
        monkeypatch.setattr(Metrics, "add", add)
        with pytest.raises(Wait, match="a value is read"):
            path.distill("--method kd --debug")


def test_few_launches_are_our_own(tmp_path):
    """PyTorch's networks and optimizers take what they take; at most as many as here are ours, and none is added unseen."""
    with CudaPath(tmp_path) as path:
        path.distill("--method dkd --amp fp16 --no-cuda-graph")
    launches = path.watch.launches
    assert launches["augmentation"] == 1 and launches["loss"] <= 2
    assert launches[BOOKKEEPING] <= 12, "copies of rows to the host, frequent here, included"
    looks = launches.pop("diagnostics") * (path.watch.steps - 1)  # of the second epoch's first step, which alone is looked at
    assert launches["scaler, clip and optimizer"] <= 20 and sum(launches.values()) <= 95, launches
    assert looks / LOG_EVERY < 1.85, "what is looked at costs less than a hundredth of a step of resnet8x4"
