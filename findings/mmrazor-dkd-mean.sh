#!/usr/bin/env bash
# MMRazor 1.0.0: DKDLoss(reduction="mean"), as in its configuration of DKD, beside KLDivergence(reduction="mean").
# Expected: with "mean" the sum divided by the number of elements, as the documentation of both says; with "none" no reduction.
# Seen: so in KLDivergence. In DKDLoss both give the sum over the batch, which grows with the batch size; "batchmean", the default, is right.
# So alpha 1 and beta 0.5 of its ImageNet configuration are, with its 32 images per GPU, 32 and 16 by the paper's formula: they compare
# neither with other projects' nor between batch sizes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mmrazor==1.0.0 mmengine==0.10.7 mmcv-lite==2.1.0 \
    torch==2.14.1 numpy==2.4.6
cat > "$folder/loss.py" <<'PYTHON'
import importlib.util
import pathlib
import warnings
import mmrazor
import torch
warnings.filterwarnings("ignore")

def of(file):  # alone, as the whole package does not import with this PyTorch
    spec = importlib.util.spec_from_file_location(file, pathlib.Path(mmrazor.__file__).parent / f"models/losses/{file}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module
DKDLoss, KLDivergence = of("decoupled_kd").DKDLoss, of("kl_divergence").KLDivergence

configuration = next(pathlib.Path(mmrazor.__file__).parent.glob(".mim/configs/**/dkd_resnet34_resnet18_8xb32_in1k.py")).read_text()
assert all(text in configuration for text in ("beta=0.5", "reduction='mean'"))
torch.manual_seed(0)
for batch in (32, 128):
    student, teacher, labels = 3 * torch.randn(batch, 100), 3 * torch.randn(batch, 100), torch.randint(100, (batch,))
    target = torch.nn.functional.one_hot(labels, 100).bool()
    p, q = (logits.softmax(1) for logits in (teacher, student))
    binary = [torch.stack((each[target], 1 - each[target]), 1) for each in (p, q)]
    others = [each[~target].view(batch, 99).softmax(1) for each in (teacher, student)]
    terms = [(a * (a / b).log()).sum() / batch for a, b in (binary, others)]
    paper = terms[0] + 0.5 * terms[1]
    dkd = [DKDLoss(beta=0.5, reduction=each)(student, teacher, labels) for each in ("batchmean", "mean", "none")]
    kl = [KLDivergence(reduction=each)(student, teacher) for each in ("batchmean", "mean")]
    print(f"batch of {batch}: DKD by the formula {paper:.3f}, batchmean {dkd[0]:.3f}, mean {dkd[1]:.3f}, none {dkd[2]:.3f}; "
          f"KL batchmean {kl[0]:.3f}, mean {kl[1]:.5f}")
    assert torch.isclose(dkd[0], paper) and all(torch.isclose(each, batch * paper) for each in dkd[1:])
    assert dkd[2].dim() == 0 and torch.isclose(kl[1], kl[0] / 100)
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/loss.py"
