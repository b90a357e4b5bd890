#!/usr/bin/env bash
# NVIDIA Model Optimizer 0.47.0 (nvidia-modelopt), modelopt.torch.distill.LogitsDistillationLoss(temperature).
# Expected: T² times the KL divergence, averaged over the rows, as in the paper it names (arXiv 1503.02531) and as MFTLoss beside it.
# Seen: reduction="mean" is the default, which divides by the number of classes, too. Loss and gradient are 1/C of the
# expected: with 100 classes a hundredth, with 1000 a thousandth. PyTorch warns once.
# So in a sum with the cross-entropy the teacher hardly counts: pass reduction="batchmean".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check nvidia-modelopt==0.47.0 torch==2.14.1 \
    numpy==2.4.6 requests==2.32.5 huggingface_hub==2.4.0
cat > "$folder/loss.py" <<'PYTHON'
import inspect

import torch
from modelopt.torch.distill import LogitsDistillationLoss, MFTLoss

torch.manual_seed(0)
for classes in (10, 100, 1000):
    student, teacher = 3 * torch.randn(64, classes), 3 * torch.randn(64, classes)
    p, q = ((logits / 4).softmax(1) for logits in (teacher, student))
    formula = 16 * (p * (p.log() - q.log())).sum(1).mean()
    default, batchmean = (loss(student, teacher)
                          for loss in (LogitsDistillationLoss(4.0), LogitsDistillationLoss(4.0, reduction="batchmean")))
    print(f"{classes} classes: by the formula {formula:.3f}, with batchmean {batchmean:.3f}, by default {default:.6f}")
    assert torch.isclose(batchmean, formula) and torch.isclose(default * classes, formula)
assert inspect.signature(MFTLoss).parameters["reduction"].default == "batchmean"
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/loss.py"
