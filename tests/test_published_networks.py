"""CIFAR networks of the published tables: size, arithmetic, order of tensors and logits, as in the code behind the tables."""
import hashlib

import pytest
import torch
import torch.nn.functional as F
from helpers import fails

import models
from models.cifar_networks import NETWORKS
from rundir.errors import USAGE

# Name: parameters, FLOPs of one image, digest of the order of tensors, a logit; with 100 classes.  All were computed on the
# networks of mdistiller, and equal on those of RepDistiller, which lacks ResNet18.
PUBLISHED = {
    "resnet8": (83_892, 25_014_784, "87818023", 0.6811320442),
    "resnet14": (181_108, 53_326_336, "79cd1a8e", 48.33630353),
    "resnet20": (278_324, 81_637_888, "ead690e1", 496.5688174),
    "resnet32": (472_756, 138_260_992, "0574783c", 34458.63913),
    "resnet44": (667_188, 194_884_096, "8b531a4f", 2537852.676),
    "resnet56": (861_620, 251_507_200, "5cd61e6f", 204248050.2),
    "resnet110": (1_736_564, 506_311_168, "fc44deea", 1.074630949e+17),
    "resnet8x4": (1_233_540, 354_142_208, "29b18841", 2.471604051),
    "resnet32x4": (7_433_860, 2_166_081_536, "674e8813", 3604.790887),
    "cifar_resnet18": (11_220_132, 1_110_937_600, "2d82b475", 26.45817486),
    "cifar_resnet50": (23_705_252, 2_596_028_416, "835487ae", -2250.434661),
    "wrn_16_1": (180_916, 53_326_336, "8f8d9176", 33.6233482),
    "wrn_16_2": (703_284, 202_236_928, "851c7131", 17.56472308),
    "wrn_40_1": (569_780, 166_572_544, "78931b77", 237832.4819),
    "wrn_40_2": (2_255_156, 655_221_760, "2d08f623", 211726.3709),
    "vgg8": (3_965_028, 192_385_024, "f66b4486", 1.896726386),
    "vgg11": (9_277_284, 418_877_440, "453977b7", 1.851828084),
    "vgg13": (9_462_180, 569_872_384, "5fce0a5c", 1.373254653),
    "vgg16": (14_774_436, 796_364_800, "41b53976", 1.101103048),
    "vgg19": (20_086_692, 1_022_857_216, "22964f4a", 1.308413591),
    "mobilenet_v2": (812_836, 13_047_296, "b8dd4e20", -7147.452397),
    "shufflenet_v1": (949_258, 77_382_912, "fd9cb930", 235.2521008),
    "shufflenet_v2": (1_355_528, 89_008_896, "6da3b995", 14.27942274),
}
DEMO = {"v2_pico": (29_042, "bae6abe5"), "v2_tiny": (309_300, "cff583af")}


def order(net) -> str:
    """A digest of the shapes of the tensors in state_dict() and the last part of their names, in order."""
    entries = [(tuple(tensor.shape), key.rpartition(".")[2]) for key, tensor in net.state_dict().items()]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:8]


def fill(net):
    """`net`, from the meta device, in float64 and eval mode, with a fixed number in every weight and statistic."""
    net = net.to_empty(device="cpu").double().eval()
    for key, tensor in net.state_dict().items():
        if tensor.ndim:
            wave = torch.arange(tensor.numel(), dtype=torch.float64).square().mul(0.37).sin().view(tensor.shape)
            one = 1 if key.endswith(("weight", "var")) else 0
            tensor.copy_(wave * 2 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else one + 0.1 * wave)
    return net


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_is_the_published_one(name):
    """A published file can be loaded by order: same order and shapes, and the same logits with the same tensors."""
    parameters, flops, digest, logit = PUBLISHED[name]
    with torch.device("meta"):
        net = models.build(name, 100, try_size=False)
    assert (models.parameters(net), models.flops(net, 32), order(net)) == (parameters, flops, digest)
    with torch.no_grad():
        logits = fill(net)(torch.linspace(-2, 2, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32))
    assert logits[0, 0].item() == pytest.approx(logit, rel=1e-8)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", *DEMO])
def test_every_weight_of_our_networks_learns(name):
    """One network of each family, and of each kind of block that is defined here."""
    torch.manual_seed(0)
    net = models.build(name, 100)
    before = [parameter.clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    logits = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    optimizer.step()
    still = [key for (key, new), old in zip(net.named_parameters(), before) if torch.equal(new, old)]
    # The bias of a convolution before batch norm has no gradient but rounding.
    assert all(key.endswith("0.bias") for key in still), f"the step did not move {still}"


def test_the_tables_here_have_every_network_and_tell_them_apart():
    """By the order of tensors, so that a guess of the network of a file is never ambiguous."""
    nets = {name: models.build(name, 100) for name in DEMO}
    assert DEMO == {name: (models.parameters(net), order(net)) for name, net in nets.items()}
    assert {*PUBLISHED, *DEMO} == {*NETWORKS}
    assert len({digest for *_, digest in DEMO.values()} | {row[2] for row in PUBLISHED.values()}) == len(NETWORKS)


@pytest.mark.parametrize("name, suggestion", [
    ("ResNet50", "cifar_resnet50 (CIFAR network) or resnet50 (torchvision, for 224 pixels)?"),
    ("MobileNetV2", "mobilenet_v2 (CIFAR network) or torchvision/mobilenet_v2 (torchvision, for 224 pixels)?"),
    ("WRN-40-2", "wrn_40_2 (CIFAR network)?"), ("torchvision/resnet20", "resnet20 (CIFAR network)?"),
    ("ShuffleV1", "shufflenet_v1 (CIFAR network) or")])
def test_a_suggestion_names_the_kind_of_network(name, suggestion):
    with fails(USAGE, f"({name})", f"did you mean {suggestion}"):
        models.check_name(name)


@pytest.mark.parametrize("name, image_size, small", [
    ("resnet18", 32, True), ("resnet18", 64, False), ("resnet8", 4, False),  # which ends on 1x1 by design
    ("torchvision/vgg11", 48, True), ("mobilenet_v3_small", 32, True), ("mnasnet0_5", 33, False)])
def test_a_network_of_torchvision_with_one_position_left_is_noted(name, image_size, small):
    """Pooling is a module in ResNet, also part of each block in MobileNetV3, and a function in MNASNet."""
    with torch.device("meta"):
        net = models.build(name, 10, image_size)
    line = models.describe(name, net, image_size)
    assert line.startswith(f"{name}: {models.parameters(net) / 1e6:.2f} M parameters") and "\n" not in line
    assert (f"1x1 at {image_size} pixels" in line) == small
