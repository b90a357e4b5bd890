#!/usr/bin/env bash
# Keras 3.15.1: RandAugment(factor=...), whose `factor` is the strength of every operation, 0.5 by default.
# Expected: as in the paper and in torchvision, rotations by at most 30 degrees to both sides, brightness up and down, and each operation
# stronger with a larger factor.
# Seen: by default images are turned by up to 180 degrees, all to one side, and only made brighter. Posterization is the stronger the
# smaller the factor: at 0.1 two levels of a channel are left, at 1.0 up to 128.
# So its strength compares neither with RandAugment's published magnitudes nor with torchvision's, and upright objects do not stay upright.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.0
# A white dot to the right of the centre, gray images, and images with every level.
cat > "$folder/strength.py" <<'PYTHON'
import numpy as np
from keras.layers import RandAugment
count, (y, x) = 400, np.mgrid[-32:33, -32:33]
dot, gray = np.zeros((count, 65, 65, 3), np.float32), np.full((count, 8, 8, 3), 100, np.float32)
dot[:, 32, 52] = 255
levels = np.tile(np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1), (count, 1, 1, 3))
near = (x**2 + y**2 < 28**2).ravel()
for factor in (0.1, 0.5, 1.0):
    layer = RandAugment(factor=factor, seed=0)
    turned = (np.asarray(layer.random_rotation(dot, training=True))[..., 0].reshape(count, -1) * near).argmax(1)
    angles = np.degrees(np.arctan2(-y.ravel()[turned], x.ravel()[turned])) % 360
    brightness = np.asarray(layer.random_brightness(gray, training=True)).mean((1, 2, 3)) - 100
    left = [len(np.unique(image)) for image in np.asarray(layer.random_posterization(levels, training=True))]
    print(f"factor {factor}: turned by {angles.min():.0f} to {angles.max():.0f} degrees, brightness {brightness.min():+.0f} to "
          f"{brightness.max():+.0f}, {min(left)} to {max(left)} levels")
PYTHON
KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/strength.py" | tee "$folder/seen"
test "$(cat "$folder/seen")" = "factor 0.1: turned by 0 to 37 degrees, brightness +0 to +25, 2 to 2 levels
factor 0.5: turned by 0 to 180 degrees, brightness +0 to +127, 2 to 8 levels
factor 1.0: turned by 0 to 357 degrees, brightness +0 to +155, 2 to 128 levels"
echo "as described"
