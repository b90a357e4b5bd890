#!/usr/bin/env bash
# torchinfo 1.8.0: summary(...).total_mult_adds of networks with nn.Linear on more than one position per image.
# Expected: a Linear on 196 tokens counts 196 times; half of what PyTorch's own FlopCounterMode counts, within 1 %, as for convolutions.
# Seen: so for ResNet-18 and MobileNetV2. A Linear counts once per image, whatever the number of tokens: ConvNeXt-Tiny, with two in every
# block, has 14 times less than PyTorch counts. A 1x1 convolution that computes the same is counted in full.
# So such a teacher looks cheaper than a small convolutional student: count with torch.utils.flop_counter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torchinfo==1.8.0 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cat > "$folder/count.py" <<'PYTHON'
import torch
import torchinfo
import torchvision
from torch.utils.flop_counter import FlopCounterMode
def ratio(name, net, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(shape))
    seen = torchinfo.summary(net, shape, verbose=0).total_mult_adds
    print(f"{name}: PyTorch {counter.get_total_flops() / 2e6:.2f} M, torchinfo {seen / 1e6:.2f} M")
    return counter.get_total_flops() / 2 / seen
one = ratio("1x1 convolution", torch.nn.Conv2d(192, 192, 1, bias=False), (1, 192, 14, 14))
other = ratio("Linear", torch.nn.Linear(192, 192, bias=False), (1, 196, 192))
assert round(one, 2) == 1 and round(other) == 196
for name, expected in (("resnet18", 1), ("mobilenet_v2", 1), ("convnext_tiny", 14)):
    assert round(ratio(name, torchvision.models.get_model(name), (1, 3, 224, 224))) == expected
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
