#!/usr/bin/env bash
# torchdistill 1.1.5: DISTPlusLoss, the loss of DIST+ with feature maps.
# Expected: as in DIST, each part is lowest where student and teacher agree.
# Seen: the channel relation is added as a correlation, and not as 1 minus it: with equal logits and equal features it is 1, with
# opposite features -1. A student that minimises it, with the default weights, has the opposite of the teacher's features.
# So DIST+ as trained by torchdistill pulls features apart, also with its sample configuration, where the weight (iota) is 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torchdistill==1.1.5 torch==2.14.1 \
    torchvision==0.29.1 numpy==2.4.0
# Without the spatial relation (kappa).
cat > "$folder/loss.py" <<'PYTHON'
import torch
from torchdistill.losses.mid_level import DISTPlusLoss
torch.manual_seed(0)
logits, features = torch.randn(8, 10), torch.randn(8, 16, 4, 4)
loss = DISTPlusLoss("logits", "output", "logits", "output", "features", "output", "features", "output", kappa=0.0)
def of(student):
    one, other = ({"logits": {"output": logits}, "features": {"output": each}} for each in (student, features))
    return loss(one, other)
print(f"equal {of(features):.2f}, opposite {of(-features):.2f}")
student = torch.randn(8, 16, 4, 4, requires_grad=True)
optimizer = torch.optim.SGD([student], lr=50.0)
for _ in range(200):
    optimizer.zero_grad()
    of(student).backward()
    optimizer.step()
centred = [each - each.mean(1, keepdim=True) for each in (student, features)]
print(f"trained: correlation {torch.nn.functional.cosine_similarity(*centred).mean():.2f}")
PYTHON
"$folder/venv/bin/python" "$folder/loss.py" | tee "$folder/seen"
test "$(tr '\n' ' ' < "$folder/seen")" = "equal 1.00, opposite -1.00 trained: correlation -1.00 "
echo "as described"
