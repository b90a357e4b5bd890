#!/usr/bin/env bash
# Pillow 13.0.0, Image.resize with BILINEAR (other filters were not tried), beside 12.3.0.
# Expected: the same pixels for the same image; the filter is the same, and rounds to whole levels between its two passes.
# Seen: other pixels, by up to one level, for images that are taller than wide; the same for those that are wider than tall. 13.0 filters
# the columns of some tall images first, 12.3 always the rows.
# So a data set of resized photographs, its hash, and what is trained on it can change with Pillow's version: note it with the data.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resize.py" <<'PYTHON'
import hashlib, sys
import numpy as np
from PIL import Image
pixels = np.random.default_rng(0).integers(0, 256, 427 * 640 * 3, dtype=np.uint8)
for width, height in ((640, 427), (427, 640)):
    small = Image.fromarray(pixels.reshape(height, width, 3)).resize((224, 224), Image.Resampling.BILINEAR)
    np.save(f"{sys.argv[1]}-{width}.npy", np.asarray(small).astype(int))
PYTHON
for version in 12.3.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check pillow==$version numpy==2.4.6
    "$folder/$version/bin/python" "$folder/resize.py" "$folder/pixels-$version"
done
"$folder/13.0.0/bin/python" - "$folder" <<'PYTHON' | tee "$folder/seen"
import sys
import numpy as np
for width, name in ((640, "wide"), (427, "tall")):
    old, new = (np.load(f"{sys.argv[1]}/pixels-{version}-{width}.npy") for version in ("12.3.0", "13.0.0"))
    print(name, "largest difference", np.abs(old - new).max())
PYTHON
test "$(tr '\n' ' ' < "$folder/seen")" = "wide largest difference 0 tall largest difference 1 "
echo "as described"
