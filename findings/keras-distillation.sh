#!/usr/bin/env bash
# Keras 3.15.1: LogitsDistillation() takes no softmax.
# Expected: its default loss, "kl_divergence", is the KL divergence of softened probabilities, as in its documentation.
# Seen: only an instance of keras.losses.KLDivergence is treated so. The string becomes a function, which is given the logits and
# clips them to [1e-7, 1]: opposite logits, none below 1, have loss 0.
# So a student of such a run is hardly distilled, and comparisons with Keras need LogitsDistillation(T, KLDivergence()).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.0
cat > "$folder/loss.py" <<'PYTHON'
import keras, numpy
from keras.distillation import LogitsDistillation
teacher, student = numpy.array([[9.0, 2.0, 1.0]]), numpy.array([[1.0, 2.0, 9.0]])
for loss in ("kl_divergence", keras.losses.KLDivergence()):
    print(f"{float(LogitsDistillation(1.0, loss).compute_loss(teacher, student)):.2f}")
PYTHON
KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/loss.py" | tee "$folder/seen"
test "$(tr '\n' ' ' < "$folder/seen")" = "0.00 7.99 "
echo "as described"
