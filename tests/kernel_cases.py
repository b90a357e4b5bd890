"""Inputs of the kernels and their CPU paths, and what these must give by the specifications."""
import torch
from torchvision.transforms import AutoAugment

import kernels
from augment import BatchAugmenter
from augment.fused import FusedBatches
from augment.naive import augment_batch
from augment.policy import build_tables
from augment.sampling import Sampler
from kernels.softmax_kl import softmax_kl_naive
from losses import Targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINING = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}
PLAIN = {"policy": "none", "crop_pad": 0, "flip": False, "random_erasing": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3} | UNMIXED


# --- the loss

def rows(n, classes, scale=3.0, seed=0, dtype=torch.float32):
    """Random logits, and targets of which some are unmixed, some end at lam 0 or 1 and some mix a label with itself."""
    g = torch.Generator().manual_seed(seed)
    z, v = (scale * torch.randn(n, classes, generator=g) for _ in range(2))
    label, other = (torch.randint(classes, (n,), generator=g) for _ in range(2))
    lam = torch.rand(n, generator=g)
    lam[::5], lam[1::7] = 1.0, 0.0
    return z.to(dtype), v.to(dtype), Targets(label, other, lam)


def truth(z, v, targets, weights, **how):
    """Terms and gradient of the specification in float64; how: its keyword arguments."""
    z = z.double().detach().requires_grad_()
    terms = softmax_kl_naive(z, v.double(), *targets, **how)
    (grad,) = torch.autograd.grad(sum(w * t for w, t in zip(weights, terms) if w), z)
    return terms.detach(), grad


# --- the augmentation

def pictures(count, size=32, seed=0):
    """uint8 (count, size, size, 3): noise, smooth, flat, two-valued, gray, dim and bright images, what operations trip over."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255)
    smooth = smooth.to(torch.uint8).permute(0, 2, 3, 1)
    images = torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 > 0, noise, smooth).contiguous()
    images[0::11] = noise[0::11, :1, :1]
    images[1::11] = torch.where(noise[1::11] < 40, 13, 240).to(torch.uint8)
    images[2::11] = noise[2::11, ..., :1]
    images[3::11] = noise[3::11] // 32
    images[4::11] = 255 - smooth[4::11] // 64
    images[5::11, :, :, 1] = 0
    return images


def everything(size):
    """A policy of every operation at every magnitude."""
    space = AutoAugment()._augmentation_space(10, (size, size))
    return [((name, 1.0, float(magnitude), signed),)
            for name, (magnitudes, signed) in space.items() for magnitude in magnitudes.view(-1)]


def augmenter(images, kernel="reference", labels=None, device=None, **options):
    """An augmenter by "triton" on DEVICE or by "reference"; three images to a label, so that partners may be of one class."""
    labels = torch.arange(len(images)) // 3 if labels is None else labels
    device = device or (DEVICE if kernel == "triton" else "cpu")
    kernels.choose(kernel)
    try:
        return BatchAugmenter(images.to(device), labels.to(device), **({"batch_size": 8, "seed": 3} | TRAINING | options))
    finally:
        kernels.choose("auto")


def specified(images, epoch, step, dtype=torch.float32, **options):
    """Batch `step` by the specification: images, label, other, lam."""
    reference = augmenter(images, **options)
    options = {"batch_size": 8} | TRAINING | options
    result, targets = augment_batch(images, torch.arange(len(images)) // 3, reference.sampler, epoch, step,
                                    batch_size=options["batch_size"], mix_each=options.get("mix_mode") == "elem",
                                    mean=options["mean"], std=options["std"])
    return result.to(dtype), *targets


def differing(batch, expected) -> int:
    """In how many numbers an (images, targets) differs from an (images, label, other, lam), bit by bit."""
    images, targets = batch
    found = [column.cpu() for column in (images, *targets)]
    assert [(one.dtype, one.shape) for one in found] == [(two.dtype, two.shape) for two in expected]
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return sum((one.view(bits[one.element_size()]) != two.contiguous().view(bits[two.element_size()])).sum().item()
               for one, two in zip(found, expected))


# --- launches that are compiled without a GPU: tests/ptx.py, tests/sass.py

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def hard_logits(classes: int, kind: str, count: int):
    """Logits of student and teacher, fp32 (count, classes): "normal", "huge", "masked" or "one-hot"; and targets."""
    z, v, targets = rows(count, classes, seed=classes)
    if kind == "huge":
        z, v = 1e3 * z, 1e3 * v
    if kind == "masked" and classes > 3:
        z[:, 1] = v[:, 1] = -torch.inf
    if kind == "one-hot":
        v = 60 * torch.nn.functional.one_hot(targets.other, classes).float()
    return z, v, targets


def fused_batches(policy: str, size: int, mode: str, dtype, batch_size: int, stored: int | None = None):
    """What makes batches by the kernel whatever kernels.choose says, in epoch 5; and step -> batch by the specification.

    stored: side of the images, of which windows are resized; None: images of `size` are padded and cropped.
    """
    g = torch.Generator().manual_seed(size)
    sampler = Sampler(size, build_tables(policy, size), seed=3, crop_pad=4, flip=True, random_erasing=0.5, mixup=0.8, cutmix=1.0,
                      mix_prob=0.8, stored=stored, scale=(0.08, 1.0), ratio=(0.75, 1.3333))
    count, side = 2 * batch_size + 3, stored or size
    coarse = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4, generator=g), (side, side), mode="bilinear")
    images = (200 * coarse + 55 * torch.rand(count, 3, side, side, generator=g)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels = torch.randint(100, (count,), generator=g)
    options = {"batch_size": batch_size, "mix_each": mode == "elem", "mean": (0.5, 0.48, 0.44), "std": (0.2, 0.25, 0.27)}
    batches = FusedBatches(images, labels, None, sampler, dtype=dtype, **options)
    batches.set_epoch(5, sampler.order(5, count))

    def expected(step: int):
        result, targets = augment_batch(images, labels, sampler, 5, step, **options)
        return result.to(dtype), *targets
    return batches, expected
