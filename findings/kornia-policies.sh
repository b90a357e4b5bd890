#!/usr/bin/env bash
# kornia 0.9.0: AutoAugment(), RandAugment() and TrivialAugment() of a batch.
# Expected: as in the papers, each image draws its own sub-policy or operations; kornia's other augmentations draw for each image.
# Seen: one sub-policy, or one set of operations, is drawn for the whole batch; only whether an operation is applied, its sign and for
# some its strength differ between images. Below are, of 100 batches of 16 equal images, those with at most 4 different results.
# torchvision 0.29, which draws for each image, has 1, 0 and 0.
# So a batch is augmented far less variedly than with torchvision, and its statistics change from batch to batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check kornia==0.9.0 torch==2.14.1 numpy==2.4.0
cat > "$folder/count.py" <<'PYTHON'
import torch
from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
torch.manual_seed(0)
images = torch.rand(1, 3, 32, 32).repeat(16, 1, 1, 1)
for augment in (AutoAugment("cifar10"), RandAugment(n=2, m=10), TrivialAugment()):
    different = [len(torch.unique(augment(images).flatten(1), dim=0)) for _ in range(100)]
    print(type(augment).__name__, sum(count <= 4 for count in different))
PYTHON
"$folder/venv/bin/python" "$folder/count.py" | tee "$folder/seen"
test "$(tr '\n' ' ' < "$folder/seen")" = "AutoAugment 31 RandAugment 87 TrivialAugment 16 "
echo "as described"
