"""ONNX files that runtimes read alike: plain operators of an old operator set, and int8 as QuantizeLinear and DequantizeLinear.

The operators of com.microsoft, ONNX Runtime's other form of int8, are unknown to OpenVINO and mean something else to OpenCV.
"""
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from deploy.runtime import onnx_session

OPSET, IR_VERSION = 18, 8  # the oldest of torch.onnx's exporter, and the file version that belongs to it


def write(model, path: Path) -> None:
    """Write an ONNX model without local paths, and with the versions that its operators need: runtimes refuse newer ones."""
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, model.graph):
        del part.metadata_props[:]  # source lines with paths
    used = {node.domain for node in model.graph.node}
    versions = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(versions)
    model.ir_version = IR_VERSION
    path.write_bytes(model.SerializeToString())


def quantize(model, batches, path: Path) -> None:
    """Static quantisation by ONNX Runtime: activations uint8, as its x86 kernels require, weights int8.

    Softmax and the logits stay in fp32.  Weights have one scale per tensor; or one per channel, which costs an eighth more bytes
    in a small network, if that matches the fp32 predictions on over 2 % more of the calibration images (two standard errors).
    batches: arrays in the input format of the model, for the ranges of the activations.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fp32, prepared, channels = (path.with_name(f"{name}.onnx") for name in ("fp32", "prepared", "channels"))
    write(model, fp32)
    quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    kept = [node.name for node in (*last_nodes(graph), *(node for node in graph.node if node.op_type == "Softmax"))]
    for each, per_channel in ((path, False), (channels, True)):
        reader = SimpleNamespace(get_next=partial(next, iter([{"images": batch} for batch in batches]), None))
        quantization.quantize_static(
            str(prepared), str(each), reader, quant_format=quantization.QuantFormat.QDQ, per_channel=per_channel,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=kept)
        quantized = onnx.load(each)
        keep_logits(quantized.graph)
        omit_zeros(quantized.graph)
        shorten(quantized.graph)
        write(quantized, each)
    expected, by_tensor, by_channel = (predictions(each, batches) for each in (fp32, path, channels))
    if np.sum(by_channel == expected) - np.sum(by_tensor == expected) > len(expected) / 50:
        channels.replace(path)


def last_nodes(graph):
    """The nodes between the last layers with weights and the logits."""
    made, pending = {name: node for node in graph.node for name in node.output}, ["logits"]
    while pending:
        node = made.pop(pending.pop(), None)
        if node is not None and node.op_type not in ("Conv", "Gemm", "MatMul"):
            pending += node.input
            yield node


def keep_logits(graph) -> None:
    """Remove the quantisation of the output of the last layer: in 256 levels, classes would tie."""
    weights = {part.name for part in graph.initializer}
    for node in [*last_nodes(graph)]:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in weights:
            before, after = node.input[0], node.output[0]
            graph.node.remove(node)
            for names in (names for each in graph.node for names in (each.input, each.output)):
                names[:] = [after if name == before else name for name in names]


def omit_zeros(graph) -> None:
    """Remove the zero points of weights and biases, which are 0, the default.

    OpenCV 5.0 then computes these layers in fp32.  Its int8 layers give other values for one pixel, as in squeeze and excite, and
    without the bias of the last layer (findings/opencv-int8.sh).
    """
    weights = {part.name for part in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            del node.input[2:]


def shorten(graph) -> None:
    """Number the tensors, and remove node names and unused weights: names are a third of a small int8 file."""
    used = {name for node in graph.node for name in node.input}
    for part in [part for part in graph.initializer if part.name not in used]:
        graph.initializer.remove(part)
    short = {part.name: part.name for part in (*graph.input, *graph.output)} | {"": ""}  # "": an omitted input
    for part in graph.initializer:
        part.name = short.setdefault(part.name, f"{len(short):x}")
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"{len(short):x}") for name in names]
    del graph.value_info[:]


def predictions(path: Path, batches) -> np.ndarray:
    run = onnx_session(path, {}, None)
    return np.concatenate([run(batch)[1].argmax(1) for batch in batches])
