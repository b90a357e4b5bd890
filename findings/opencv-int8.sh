#!/usr/bin/env bash
# OpenCV 5.0.0 (opencv-python-headless 5.0.0.93), cv2.dnn: int8 convolutions of an ONNX file with QuantizeLinear and DequantizeLinear.
# Expected: within one step of the output's quantisation of ONNX Runtime, or an error for what is not supported.
# Seen: equal to ONNX Runtime, on 4x4 pixels. On one pixel, as in the gate of a squeeze-and-excite block, other values of the same range,
# without an error. Followed by a sigmoid, they are wrong on 4x4 pixels, too, unless the zero points are 0.
# So an int8 file can lose its accuracy in OpenCV silently: compare predictions on real images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93 onnx==1.23.2 \
    onnxruntime==1.32.0 numpy==2.4.6
cat > "$folder/compare.py" <<'PYTHON'
import cv2, numpy as np, onnxruntime
from onnx import TensorProto, helper, numpy_helper
random, channels = np.random.default_rng(0), 8
weights = random.integers(-127, 128, (channels, channels, 1, 1)).astype(np.int8)
images = random.uniform(0, 5, (4, channels, 4, 4)).astype(np.float32)
def model(side, zero_point, sigmoid):
    values = {"scale": np.float32(0.02), "zero": np.uint8(zero_point), "w": weights, "w_scale": np.float32(0.01), "w_zero": np.int8(0),
              "out_scale": np.float32(1 / 255 if sigmoid else 0.05), "out_zero": np.uint8(0 if sigmoid else zero_point)}
    nodes = [("QuantizeLinear", "x scale zero", "xq"), ("DequantizeLinear", "xq scale zero", "xd"),
             ("DequantizeLinear", "w w_scale w_zero", "wd"), ("Conv", "xd wd", "c")]
    if sigmoid:
        nodes += [("QuantizeLinear", "c scale zero", "cq"), ("DequantizeLinear", "cq scale zero", "cd"), ("Sigmoid", "cd", "c2")]
    nodes += [("QuantizeLinear", f"{'c2' if sigmoid else 'c'} out_scale out_zero", "yq"),
              ("DequantizeLinear", "yq out_scale out_zero", "y")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, side, side]) for name in "xy")
    graph = helper.make_graph([helper.make_node(kind, inputs.split(), [output]) for kind, inputs, output in nodes], "graph",
                              [x], [y], [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
for sigmoid, zero_point, side in ((False, 128, 4), (False, 128, 1), (True, 0, 4), (True, 128, 4)):
    file, x = model(side, zero_point, sigmoid), np.ascontiguousarray(images[:, :, :side, :side])
    expected, = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    net = cv2.dnn.readNetFromONNX(np.frombuffer(file, np.uint8))
    net.setInput(x, "x")
    wrong = np.mean(np.abs(net.forward() - expected) > 1.01 * (1 / 255 if sigmoid else 0.05))
    print(f"{'sigmoid' if sigmoid else 'none'},{zero_point},{side}x{side}: {'as ONNX Runtime' if wrong == 0 else 'other values'}")
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
none,128,4x4: as ONNX Runtime
none,128,1x1: other values
sigmoid,0,4x4: as ONNX Runtime
sigmoid,128,4x4: other values
SEEN
echo "as described"
