#!/usr/bin/env bash
# safetensors 0.8.0 does not keep the order of a state_dict.
# Expected: load() and load_file() return the tensors in the order in which save() was given them, as torch.load does.
# Seen: load(bytes) returns another order in each process; load_file() sorts by dtype and then by name, layer10 before layer2.
# So weights in this format can be matched to a network by name only, or by an order that the names themselves give.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.0
cat > "$folder/order.py" <<'PYTHON'
import sys
import numpy, safetensors.numpy as format
given = {f"layer{k}.weight": numpy.zeros(2, numpy.float32) for k in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)}
given["count"] = numpy.zeros(1, numpy.int64)
content = format.save(given)
open(sys.argv[1], "wb").write(content)
print(" ".join(format.load(content)), "|", " ".join(format.load_file(sys.argv[1])))
PYTHON
for _ in 1 2 3 4; do "$folder/venv/bin/python" "$folder/order.py" "$folder/file.safetensors"; done | tee "$folder/seen"
test "$(cut -d '|' -f 1 "$folder/seen" | sort -u | wc -l)" -gt 1
test "$(cut -d '|' -f 2 "$folder/seen" | sort -u)" = " count layer1.weight layer10.weight layer2.weight layer3.weight layer4.weight \
layer5.weight layer6.weight layer7.weight layer8.weight layer9.weight"
echo "as described"
