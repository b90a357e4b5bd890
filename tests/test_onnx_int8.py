"""int8 .onnx files: plain operators that runtimes share, sizes, the scales of weights, logits in fp32."""
import numpy as np
import pytest
import torch
from exporting import images, needs_onnx

import models
from deploy import onnx_graph, runtime, writers

pytestmark = needs_onnx


def untrained(folder, name):
    classes = [str(index) for index in range(100)]
    net = models.build(name, 100)
    for label, parameter in net.named_parameters():
        if label.endswith("bias"):  # exporters drop those of zeros
            torch.nn.init.uniform_(parameter)
    models.save(folder / "best.pt", net, model=name, classes=classes, image_size=32,
                mean=(0.5,) * 3, std=(0.25,) * 3, dataset="none", test_acc1=None)
    return writers.from_checkpoint(folder / "best.pt")


def test_int8_is_a_quarter_of_the_weights(tmp_path):
    """And a third of the smallest network's file, of which a good part is not weights."""
    for name, times in (("resnet8x4", 3.8), ("v2_pico", 3.0)):
        module, calibration = untrained(tmp_path, name), torch.from_numpy(images(16, 32, 32))
        for precision in ("fp32", "int8"):
            writers.export(module, "onnx", precision, calibration, tmp_path / precision)
        whole, small = ((tmp_path / precision).stat().st_size for precision in ("fp32", "int8"))
        assert whole / small > times, f"{name}: {whole} and {small} bytes"


@pytest.mark.parametrize("lost, of_channels", [(0, False), (2, False), (3, True)])
def test_weights_have_a_scale_for_each_channel_where_one_for_each_tensor_costs(tmp_path, monkeypatch, lost, of_channels):
    """lost: images in a hundred about which the file with one scale says something else than the network in fp32."""
    import onnx
    said = {"fp32.onnx": 0, "channels.onnx": 0, "int8": lost}
    monkeypatch.setattr(onnx_graph, "predictions", lambda path, batches: np.arange(100) < said[path.name])
    writers.export(untrained(tmp_path, "resnet8"), "onnx", "int8", torch.from_numpy(images(16, 32, 32)), tmp_path / "int8")
    graph = onnx.load(tmp_path / "int8").graph
    sizes = {part.name: np.prod(part.dims) for part in graph.initializer}
    scales = [sizes[node.input[1]] for node in graph.node
              if node.op_type == "DequantizeLinear" and sizes.get(node.input[0], 0) > 64]
    assert scales and all((size > 1) == of_channels for size in scales)


@pytest.mark.parametrize("name", ["v2_pico", "vgg8", "squeezenet1_1"])  # the last layer: linear, of three, a convolution
def test_int8_has_plain_operators_and_whole_logits(name, tmp_path):
    """QOperator files are ONNX Runtime's alone; a quantised output has 256 values at most."""
    import onnx
    module = untrained(tmp_path, name)
    writers.export(module, "onnx", "int8", torch.from_numpy(images(16, 32, 32)), tmp_path / "int8.onnx")
    model = onnx.load(tmp_path / "int8.onnx")
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)] and model.ir_version == 8
    _, logits = runtime.onnx_session(tmp_path / "int8.onnx", {}, None)(images(64, 32, 32))
    assert len(np.unique(logits)) > 4000
    with torch.no_grad():
        expected = module(torch.from_numpy(images(64, 32, 32)))[1].numpy()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.99 and (logits.min() >= 0) == (expected.min() >= 0)
    weights = {part.name for part in model.graph.initializer}
    inputs = [node.input for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert inputs and all((len(names) == 2) == (names[0] in weights) for names in inputs)
