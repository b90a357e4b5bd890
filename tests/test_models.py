"""Networks: published sizes, image sizes, weights from files and from torchvision, trained networks in use."""
import copy
import hashlib
import io
import pickle
import re
from functools import partial
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import Touch, fails
from torch import nn

import models
from models import cifar_networks, foreign
from rundir import checkpoint
from rundir.errors import CHECKPOINT, DATA, USAGE

MEAN, STD = [0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


def scrambled(net):
    """`net` with all parameters and statistics random, so that no two networks are alike by their initialisation."""
    generator = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net


def save_best(path, net, name, num_classes, **other):
    classes = [f"class {i}" for i in range(num_classes)]
    info = dict(model=name, classes=classes, image_size=32, mean=MEAN, std=STD, dataset="synthetic")
    models.save(path, net, **info | other)


def assert_same_body(net, other, but=None):
    head = {key for key in net.state_dict() if key.startswith(("head.", "fc.", "heads.", "classifier."))}
    assert 0 < len(head) < len(net.state_dict())
    for key, tensor in net.state_dict().items():
        if key not in head and not (but and key.endswith(but)):
            torch.testing.assert_close(tensor, other.state_dict()[key], rtol=0, atol=0, msg=f"{key} differs")


# Names and sizes

def test_vgg_pools_once_more_at_64_pixels():
    """Its size and logits at 32 pixels are in test_published_networks."""
    assert models.build("vgg8", 10, 64).features(torch.randn(1, 3, 64, 64)).shape[2:] == (4, 4)


@pytest.mark.parametrize("name, millions, gflop", [("efficientnet_v2_s", 20.3, 0.12), ("efficientnet_v2_l", 117.4, 0.54)])
def test_the_teacher_and_the_student_have_the_published_size(name, millions, gflop):
    with torch.device("meta"):
        net = models.build(name, 100, try_size=False)
    size, head = models.parameters(net), net.classifier[1].in_features + 1
    assert round(size / 1e6, 1) == millions and round(models.flops(net, 32) / 1e9, 2) == gflop
    assert size + 900 * head == torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]


@pytest.mark.parametrize("name, image_size", [
    ("squeezenet1_1", 32), ("mnasnet0_5", 32), ("googlenet", 32), ("inception_v3", 299), ("maxvit_t", 224), ("vit_b_16", 64),
    ("swin_t", 48)])
def test_torchvision_families_take_small_images(name, image_size):
    """Also in training mode; that of evaluation is tried by `build`."""
    with torch.device("meta"):
        net = models.build(name, 7, image_size)
        assert net(torch.empty(2, 3, image_size, image_size)).shape == (2, 7)


def test_our_names_shadow_those_of_torchvision():
    assert models.has_weights("efficientnet_v2_l") and models.has_weights("torchvision/efficientnet_v2_l")
    for name in ("vgg13", "mobilenet_v2"):
        assert not models.has_weights(name) and models.has_weights(f"torchvision/{name}")
    assert not any(map(models.has_weights, ("resnet8", "v2_pico", "torchvision/resnet8", "nothing")))
    with torch.device("meta"):
        assert models.parameters(models.build("torchvision/vgg13", 1000, try_size=False)) == 133_047_848
    names = models.names()
    assert len(names) == len(set(names)) and {*cifar_networks.NETWORKS, "efficientnet_v2_l", "torchvision/vgg13"} <= {*names}
    assert not [name for name in names if "rcnn" in name or "quantized" in name]


@pytest.mark.parametrize("name, image_size, word", [
    ("efficientnet_v2_xl", 32, "(efficientnet_v2_xl). did you mean efficientnet_v2_l"), ("zzz", 32, "(zzz). "),
    ("torchvision/resnet20", 32, "models.names()"), ("inception_v3", 32, "--image-size 299"),
    ("vit_b_16", 40, "--image-size 224"), ("maxvit_t", 32, "--image-size 224"), ("vgg8", 4, "4x4 (")])
def test_names_and_image_sizes_that_do_not_fit_get_a_suggestion(name, image_size, word):
    with fails(USAGE, name, word), torch.device("meta"):
        models.build(name, 10, image_size)


# Image sizes and arithmetic

def test_other_image_sizes_are_resized_on_the_way_in():
    net = models.build("v2_pico", 10, image_size=48).eval()
    assert not (weight := net.features[0][0].weight).is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    small = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    large = F.interpolate(small, size=(48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(small), net(large), rtol=0, atol=0)

    seen = []
    net.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(large)
    assert seen[0] is large, "an image of the right size was touched"
    net.bfloat16()(small.bfloat16())
    assert seen[1].shape[-2:] == (48, 48) and seen[1].dtype == torch.bfloat16
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_flops_count_two_per_multiply_add_and_change_nothing():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5),
    )
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    expected = 2 * (16 * 16 * 4 * 3 * 9 + 8 * 8 * 8 * (4 // 2) * 9 + 8 * 5)
    assert models.flops(net, 16) == expected, f"{models.flops(net, 16)} instead of {expected}"
    assert net.training and not net[1].training and net[6].training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_normalise_is_totensor_and_normalize():
    images = torch.arange(2 * 16 * 8 * 3).remainder(256).to(torch.uint8).reshape(2, 16, 8, 3)  # every value in every channel
    transform = torchvision.transforms.Compose([torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(MEAN, STD)])
    expected = torch.stack([transform(image.numpy()) for image in images])
    normalised = models.normalise(images, MEAN, STD)
    torch.testing.assert_close(normalised, expected, rtol=0, atol=0)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(models.normalise(images, torch.tensor(MEAN), torch.tensor(STD)), normalised)
    with pytest.raises(ValueError, match="uint8"):
        models.normalise(images.float(), MEAN, STD)


# Weights to start from

def test_init_takes_all_but_a_head_of_other_classes(tmp_path):
    source = scrambled(models.build("resnet8", 100))
    save_best(tmp_path / "best.pt", source, "resnet8", 100)
    torch.save(dict(source.state_dict()), tmp_path / "bare.pt")
    for path in (tmp_path / "best.pt", tmp_path / "bare.pt"):
        for num_classes in (100, 10):
            net = models.build("resnet8", num_classes)
            head = net.head.weight.clone()
            models.initialise(net, "resnet8", pretrained=True, init=path)
            assert_same_body(net, source)
            torch.testing.assert_close(net.head.weight, source.head.weight if num_classes == 100 else head, rtol=0, atol=0)


def test_init_refuses_other_networks(tmp_path):
    net = models.build("resnet14", 10)
    state = net.state_dict()
    path = tmp_path / "init.pt"
    with fails(DATA, f"no such file ({path})"):
        models.initialise(net, "resnet14", init=path)

    def attempt(content, *words):
        torch.save(content, path)
        with fails(DATA, f"({path}: ", *words):
            models.initialise(net, "resnet14", init=path)

    attempt(models.build("resnet8", 10).state_dict(), "resnet14", "features.2.conv1.weight", "[32, 16, 3, 3]", "[16, 16, 3, 3]")
    attempt(models.build("resnet18", 10).state_dict(), "conv1.weight (64, 3, 7, 7) in place of features.0.0.weight (16, 3, 3, 3)")
    attempt(state | {"extra": torch.zeros(1)}, "extra is unexpected")
    attempt({key: state[key] for key in state if key != "features.1.conv1.weight"}, "features.1.conv1.weight is missing")
    attempt(state | {"features.0.0.weight": torch.zeros(16, 3, 5, 5)}, "features.0.0.weight", "[16, 3, 5, 5]")
    for nothing, found in ((state | {"features.0.0.weight": "text"}, "features.0.0.weight"), (7, "int"),
                           ([state], "list"), ({}, "dict"), ({"state_dict": None}, "keys are state_dict"),
                           ({3: torch.zeros(1)}, "keys are 3"), ({"one": state, "two": state}, "keys are one, two")):
        attempt(nothing, "no weights", found, *foreign.ENTRIES)


def small_vit(image_size, **options):
    return torchvision.models.VisionTransformer(image_size, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, **options)


LAYOUTS = {  # a network of each family, and how files of torchvision name a key, or "" for a key that they lack
    "densenet121": (lambda: torchvision.models.DenseNet(4, (2, 2), 8),
                    lambda key: re.sub(r"(denselayer\d\.(?:norm|conv))(\d)", r"\1.\2", key)),
    "vit_b_16": (lambda: small_vit(32), lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")),
    "resnet8": (lambda: models.build("resnet8", 5), lambda key: "" if key.endswith("num_batches_tracked") else key),
    "mnasnet0_5": (lambda: models.build("mnasnet0_5", 5), str),  # and without the layer versions that a plain dict has lost
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_init_reads_the_layouts_of_torchvision(tmp_path, name):
    """With the training-time heads of GoogLeNet and Inception."""
    make, rename = LAYOUTS[name]
    source = scrambled(copy.deepcopy(net := make()))
    found = {rename(key): tensor for key, tensor in source.state_dict().items() if rename(key)}
    torch.save(found | {"aux1.fc2.bias": torch.zeros(9), "AuxLogits.fc.bias": torch.zeros(9)}, tmp_path / "old.pt")
    models.initialise(net, name, init=tmp_path / "old.pt")
    assert_same_body(net, source, but="num_batches_tracked" if name == "resnet8" else None)


# ImageNet weights

@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value"), TimeoutError(),
                                   ConnectionResetError(104, "reset"), OSError(28, "No space left on device")], ids=repr)
def test_pretrained_download_that_breaks(hub, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    words = ["squeezenet1_1 (https://download.pytorch.org/", hub, "--init PATH", "--no-pretrained"]
    full = error.args[:1] == (28,)  # which errors.run turns into exit code 8
    with pytest.raises(OSError, match="No space left") if full else fails(DATA, *words):
        models.initialise(models.build("squeezenet1_1", 10), "squeezenet1_1", pretrained=True)


def test_pretrained_names_a_damaged_cached_file_and_leaves_it(hub):
    hub.mkdir(parents=True)
    cached = hub / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    cached.write_bytes(b"half a download")
    with fails(DATA, "squeezenet1_1", cached, "delete"):
        models.initialise(models.build("squeezenet1_1", 10), "squeezenet1_1", pretrained=True)
    assert cached.read_bytes() == b"half a download"


def offer(monkeypatch, data):
    """Let torchvision publish `data` as every network's ImageNet weights; returns the downloads made, and one as it should be."""
    digest = hashlib.sha256(data).hexdigest()[:8]
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://example.org/net-{digest}.pth"))
    downloads = []

    def download(url, path, hash_prefix, progress):
        downloads.append((url, hash_prefix))
        with open(path, "wb") as file:
            file.write(data)

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return downloads, (weights.DEFAULT.url, digest)


def test_pretrained_takes_all_but_the_head_and_downloads_once(hub, monkeypatch):
    source, file = scrambled(models.build("squeezenet1_1", 1000)), io.BytesIO()
    torch.save(source.state_dict(), file)
    downloads, once = offer(monkeypatch, file.getvalue())
    for name in ("squeezenet1_1", "torchvision/squeezenet1_1"):
        net = models.build(name, 10)
        models.initialise(net, name, pretrained=True)
        assert_same_body(net, source)
        assert not (net.classifier[1].weight >= 0.5).all(), "the ImageNet head was taken too"
    assert downloads == [once]
    offer(monkeypatch, pickle.dumps(Touch(hub / "owned"), protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        models.initialise(models.build("squeezenet1_1", 10), "squeezenet1_1", pretrained=True)
    assert not (hub / "owned").exists(), "the file ran code"


def test_pretrained_is_refused_where_no_such_weights_fit(monkeypatch):
    for name in ("resnet20", "vgg13"):
        with fails(USAGE, name, "--no-pretrained"):
            models.initialise(nn.Linear(2, 2), name, pretrained=True)
    monkeypatch.setattr(models.weights, "_imagenet_weights", lambda name: small_vit(64).state_dict())
    with fails(USAGE, "vit_b_16", "pos_embedding", "--image-size 224"):
        models.initialise(small_vit(32), "vit_b_16", pretrained=True)


# Trained networks in use

def test_a_written_network_predicts_what_it_did(tmp_path):
    torch.manual_seed(0)
    net = models.build("resnet8", 7)
    for _ in range(3):
        net(torch.randn(8, 3, 32, 32) * 2 + 1)  # running statistics away from their initial values
    net.eval()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    save_best(tmp_path / "best.pt", net, "resnet8", 7, epoch=3)

    before = torch.get_rng_state()
    loaded = models.load(tmp_path / "best.pt")
    assert torch.equal(torch.get_rng_state(), before), "loading a teacher drew random numbers"
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.info["classes"] == [f"class {i}" for i in range(7)] and loaded.info["epoch"] == 3
    assert "state_dict" not in loaded.info

    with torch.no_grad():
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
        expected = net((images.permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1)
    probabilities = models.predict(loaded, images, batch_size=2)
    assert probabilities.dtype == torch.float32 and probabilities.device.type == "cpu" and not probabilities.requires_grad
    torch.testing.assert_close(probabilities, expected)
    assert expected.std(0).max() > 1e-3, "the images are not told apart, so their order is not tested"
    torch.testing.assert_close(models.predict(loaded, images.numpy()), expected)
    assert models.predict(loaded, images[:0]).shape == (0, 7)

    models.save(tmp_path / "again.pt", loaded, **loaded.info | {"test_acc1": 71.5})
    again = models.load(tmp_path / "again.pt")
    assert again.info == loaded.info | {"test_acc1": 71.5}
    torch.testing.assert_close(again.state_dict(), loaded.state_dict(), rtol=0, atol=0)


def test_the_digest_is_that_of_the_weights_that_are_used(tmp_path):
    path = tmp_path / "best.pt"
    save_best(path, net := models.build("resnet8", 3), "resnet8", 3)
    sha256, read = hashlib.sha256(path.read_bytes()).hexdigest(), models.read(path)
    save_best(path, models.build("resnet8", 3), "resnet8", 3)
    loaded = models.load(read)
    assert read["sha256"] == sha256 != hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not {"sha256", "path", "state_dict"} & loaded.info.keys()


def test_load_refuses_what_is_not_a_trained_network(tmp_path):
    path = tmp_path / "best.pt"
    net = models.build("v2_pico", 7)

    save_best(path, net, "v2_pico", 7)
    content = checkpoint.read(path)

    def attempt(words, **other):
        checkpoint.write(path, **content | other)
        with fails(CHECKPOINT, str(path), words):
            models.load(path)

    attempt("its kind is resume", kind="resume")
    attempt(f"({path}: resnet9)", model="resnet9")
    attempt("not a resnet8", model="resnet8")
    attempt("size mismatch", classes=["only one"])
    attempt("no weights in it", state_dict=None)
    attempt("is missing", state_dict=net.features.state_dict(prefix="features."))
    attempt("cannot build", image_size=40, model="vit_b_16")
    for key in models.weights.METADATA:
        checkpoint.write(path, **{name: value for name, value in content.items() if name not in (key, "format")})
        with fails(CHECKPOINT, f"{key} is missing"):
            models.load(path)


@pytest.fixture
def small_networks(monkeypatch):
    """torchvision's transformer and DenseNet under names of ours, with few layers."""
    densenet = partial(torchvision.models.DenseNet, 8, (2, 2), 8)
    for name, make in (("small_vit", partial(small_vit, 32)), ("small_densenet", densenet)):
        monkeypatch.setitem(cifar_networks.NETWORKS, name, lambda classes, make=make: make(num_classes=classes))


@pytest.mark.parametrize("name", ["v2_pico", "resnet8", "small_vit"])
def test_weights_held_in_the_type_of_autocast_give_the_same_logits(tmp_path, small_networks, name):
    save_best(tmp_path / "best.pt", models.build(name, 10), name, 10)
    plain, held = models.load(tmp_path / "best.pt"), models.load(tmp_path / "best.pt", dtype=torch.bfloat16)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(plain(images), held(images))
    kinds = {type(module): weight.dtype for module in held.modules() for weight in module.parameters(recurse=False)}
    assert kinds[nn.Linear] == torch.bfloat16 and kinds.get(nn.BatchNorm2d, torch.float32) == torch.float32


@pytest.mark.parametrize("name, left", [("v2_pico", 0), ("resnet8", 0), ("vgg8", 0), ("mobilenet_v2", 0), ("wrn_16_2", 6),
                                        ("small_densenet", 6), ("small_vit", 0)])
def test_a_folded_network_gives_the_same_logits_without_its_batch_norms(tmp_path, small_networks, name, left):
    """Those in front of a convolution cannot be folded.  Images of another size are still resized."""
    net = models.build(name, 10)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # as training leaves them, not as they begin
                for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5), (module.running_mean, -0.5, 0.5),
                                          (module.running_var, 0.5, 2.0)):
                    values.uniform_(low, high)
    save_best(tmp_path / "best.pt", net, name, 10)
    plain, folded = (models.load(tmp_path / "best.pt", folded=folded) for folded in (False, True))
    assert folded.info == plain.info and folded.size == plain.size == models.parameters(net) and not folded.training
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    for size in (32, 16):
        images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
        logits = plain(images)
        assert (folded(images) - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_a_network_that_cannot_be_traced_is_not_folded():
    class Moody(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    net = Moody()
    assert models.fold(net, 32) is net
