#!/usr/bin/env bash
# OpenVINO 2026.4.1 on a CPU with AMX: int8 convolutions in groups, of an ONNX file with QuantizeLinear and DequantizeLinear.
# Expected: within one step of the output's quantisation of ONNX Runtime, as without groups.
# Seen: so with up to 64 input channels a group, and with a multiple of 64. With others above 64, such as 80, most outputs are other
# values, by up to the whole range, without an error. Not with one group, and not where ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI forbids AMX.
# So the int8 file of ShuffleNet-V1 predicts at chance there: compare predictions on real images.
set -euo pipefail
grep -q amx_int8 /proc/cpuinfo || { echo "needs a CPU with AMX (amx_int8 in /proc/cpuinfo)"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 \
    numpy==2.4.6
cat > "$folder/compare.py" <<'PYTHON'
import io, numpy as np, onnxruntime, openvino, sys
from onnx import TensorProto, helper, numpy_helper
random, step = np.random.default_rng(0), np.float32(0.05)
def model(groups, channels):
    values = {"scale": np.float32(0.02), "zero": np.uint8(128), "w_scale": np.float32(0.01), "step": step,
              "w": random.integers(-127, 128, (16 * groups, channels, 1, 1)).astype(np.int8)}
    nodes = [("QuantizeLinear", "x scale zero", "xq"), ("DequantizeLinear", "xq scale zero", "xd"), ("DequantizeLinear", "w w_scale", "wd"),
             ("Conv", "xd wd", "c"), ("QuantizeLinear", "c step zero", "yq"), ("DequantizeLinear", "yq step zero", "y")]
    made = [helper.make_node(kind, inputs.split(), [output], **({"group": groups} if kind == "Conv" else {}))
            for kind, inputs, output in nodes]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, count * groups, 8, 8])
            for name, count in (("x", channels), ("y", 16)))
    graph = helper.make_graph(made, "graph", [x], [y], [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
core = openvino.Core()
for groups, channels in ((1, 80), (2, 64), (2, 80), (2, 128), (3, 80)):
    file, x = model(groups, channels), random.standard_normal((1, groups * channels, 8, 8)).astype(np.float32)
    expected, = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    compiled = core.compile_model(core.read_model(io.BytesIO(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wrong = np.mean(np.abs(compiled(x)[0] - expected) > 1.01 * step)
    print(f"{sys.argv[1]},{groups},{channels}: {'as ONNX Runtime' if wrong == 0 else 'most are other values' if wrong > 0.5 else wrong}")
PYTHON
for isa in DEFAULT AVX512_CORE_VNNI; do
    ONEDNN_MAX_CPU_ISA=$isa "$folder/venv/bin/python" "$folder/compare.py" $isa
done | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
DEFAULT,1,80: as ONNX Runtime
DEFAULT,2,64: as ONNX Runtime
DEFAULT,2,80: most are other values
DEFAULT,2,128: as ONNX Runtime
DEFAULT,3,80: most are other values
AVX512_CORE_VNNI,1,80: as ONNX Runtime
AVX512_CORE_VNNI,2,64: as ONNX Runtime
AVX512_CORE_VNNI,2,80: as ONNX Runtime
AVX512_CORE_VNNI,2,128: as ONNX Runtime
AVX512_CORE_VNNI,3,80: as ONNX Runtime
SEEN
echo "as described"
