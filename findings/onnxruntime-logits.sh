#!/usr/bin/env bash
# ONNX Runtime 1.32.0, quantize_static with extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]}.
# Expected: the output of a Gemm, here the logits, is not quantised, as its documentation says, in both forms of int8.
# Seen: so in QDQ. In QOperator the option changes nothing, without a warning: the logits have at most 256 values.
# So classes tie, and the most probable one of a tie is chosen by its index: use QDQ, and count the values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/count.py" <<'PYTHON'
import numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
random = np.random.default_rng(0)
weights, x = random.normal(size=(8, 16)).astype(np.float32), random.normal(size=(4096, 16)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("Gemm", ["x", "w"], ["logits"], transB=1)], "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 8])], [numpy_helper.from_array(weights, "w")])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), "fp32.onnx")
class Reader(quantization.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": x}])
    def get_next(self):
        return next(self.batches, None)
for form in (quantization.QuantFormat.QOperator, quantization.QuantFormat.QDQ):
    for excluded in ([], ["Gemm"]):
        quantization.quantize_static("fp32.onnx", "int8.onnx", Reader(), quant_format=form,
                                     extra_options={"OpTypesToExcludeOutputQuantization": excluded})
        logits, = onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
        values = len(np.unique(logits))
        print(form, "excluded" if excluded else "quantised", "at most 256 values" if values <= 256 else "more than 256 values")
PYTHON
(cd "$folder" && venv/bin/python count.py 2> errors) | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
QOperator quantised at most 256 values
QOperator excluded at most 256 values
QDQ quantised at most 256 values
QDQ excluded more than 256 values
SEEN
echo "as described"
