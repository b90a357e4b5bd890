"""Export to ONNX, torch.export (.pt2) and ExecuTorch (.pte) in fp32, fp16 or int8.

The exported graph includes scaling, normalisation, resizing and softmax.  int8 is post-training quantisation by the maintained
tool of each format.  To add a format: one exporter function, a line in `FORMATS` and `needs`, one in `RUNTIMES` of
deploy/runtime.py, and its name in deploy/options.py.
"""
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
from deploy import onnx_graph
from deploy.runtime import as_input, quiet, require
from rundir.errors import USAGE, Failure, first_line

# ExecuTorch plans memory for a largest batch.  It must be below 16, from which on torch decomposes convolutions differently: a
# program supports only one side of that limit.
LARGEST_BATCH = 8


class Deployed(nn.Module):
    """Images -> (probabilities, logits), float32 (N, C) each: models.predict as one module.

    input: `uint8` for images uint8 (N, H, W, 3), `float` for float32 (N, 3, H, W) between 0 and 1.
    dtype: of the network; pre- and post-processing is float32.
    """

    def __init__(self, net, input: str, dtype=torch.float32):
        super().__init__()
        self.info, self.input, self.dtype, self.net = net.info, input, dtype, net.to(dtype)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(net.info[name], dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        if self.input == "uint8":
            images = images.permute(0, 3, 1, 2).float().contiguous() / 255  # pooling in channels_last is as_strided in a graph
        images, size = (images - self.mean) / self.std, self.info["image_size"]
        if self.info["stored_size"] == size:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        else:
            images = models.centre_crop(self, images)
        logits = self.net(images.to(self.dtype)).float()
        return logits.softmax(1), logits


def from_checkpoint(source, input: str = "uint8", precision: str = "fp32") -> Deployed:
    """The module to export, with folded BatchNorm.  source: path of a best.pt, or the result of models.read."""
    net = models.load(source, folded=True).to(memory_format=torch.contiguous_format)
    return Deployed(net, input, torch.float16 if precision == "fp16" else torch.float32).eval()


def export(module: Deployed, format: str, precision: str, calibration, path: Path) -> None:
    """Write `module` to `path`; the exporter may leave temporary files in the same folder.

    calibration: uint8 (N, H, W, 3), the images for the activation ranges of int8.
    Failure USAGE: a package is missing, or the exporter does not support this network.
    """
    require(*needs(format, precision))
    batches = None
    if precision == "int8":
        batches = [as_input(images.numpy(), module.input) for images in calibration.split(LARGEST_BATCH)]
    try:
        with quiet(), torch.no_grad():
            FORMATS[format][1](module, batches, path)
    except OSError:
        raise
    except Exception as failure:  # each exporter has its own exception types
        raise Failure(USAGE, f"{module.info['model']} cannot be exported as {format} in {precision} ({first_line(failure)})",
                      "choose another --format or --precision") from failure


def example(module: Deployed):
    """An example input of `module`, and the names of its dynamic dimensions by index."""
    side = module.info["stored_size"]
    images = torch.from_numpy(as_input(np.zeros((LARGEST_BATCH, side, side, 3), np.uint8), module.input))
    return images, dict(zip((0, 1, 2) if module.input == "uint8" else (0, 2, 3), "NHW"))


def to_onnx(module: Deployed, batches, path: Path) -> None:
    images, dynamic = example(module)
    model = torch.onnx.export(module, (images,), dynamo=True, verbose=False, external_data=False, opset_version=onnx_graph.OPSET,
                              input_names=["images"], output_names=["probabilities", "logits"],
                              dynamic_shapes=(dynamic,)).model_proto
    if batches is None:
        onnx_graph.write(model, path)
    else:
        onnx_graph.quantize(model, batches, path)


def export_program(module, quantizer, batches, **largest):
    """torch.export of `module`.  quantizer: of torchao, for int8; None for none.  largest: of dimensions N, H, W, if limited."""
    images, names = example(module)
    dynamic = {index: torch.export.Dim(name, max=largest.get(name)) for index, name in names.items()}
    # A strict trace distinguishes the calls of a reused module, such as the ReLU of a residual block, for the quantiser.
    exported = torch.export.export(module, (images,), dynamic_shapes=(dynamic,), strict=quantizer is not None)
    if quantizer is None:
        return exported
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    prepared = prepare_pt2e(exported.module(), quantizer)
    for batch in batches:
        prepared(torch.from_numpy(batch))
    quantized = convert_pt2e(prepared)
    used = {node.target for node in quantized.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in quantized.named_parameters() if name not in used]:  # the fp32 weights
        owner, _, attribute = name.rpartition(".")
        delattr(quantized.get_submodule(owner), attribute)
    return torch.export.export(quantized, (images,), dynamic_shapes=(dynamic,))


def to_pt2(module: Deployed, batches, path: Path) -> None:
    quantizer = None
    if batches is not None:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = export_program(module, quantizer, batches)
    for node in program.graph.nodes:  # source lines with paths
        for name in ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack"):
            node.meta.pop(name, None)
    program.example_inputs = None
    archive = io.BytesIO()  # a path would become part of its content
    torch.export.save(program, archive)
    path.write_bytes(archive.getvalue())


def to_executorch(module: Deployed, batches, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    quantizer, side = None, module.info["stored_size"]
    if batches is not None:
        quantizer = xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    program = export_program(module, quantizer, batches, N=LARGEST_BATCH, H=side, W=side)
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


FORMATS = {"onnx": (".onnx", to_onnx), "pt2": (".pt2", to_pt2), "executorch": (".pte", to_executorch)}


def needs(format: str, precision: str) -> tuple[str, ...]:
    """The packages required by the exporter and by the runtime."""
    if format == "onnx":
        return "onnx", "onnxscript", "onnxruntime"
    torchao = ("torchao.quantization.pt2e",) if precision == "int8" else ()
    return (*torchao, "executorch.exir", "executorch.runtime") if format == "executorch" else torchao


def metadata(module: Deployed, format: str, precision: str, checkpoint_sha256: str) -> dict:
    """Metadata of an exported file, without its SHA-256 and accuracy."""
    images = "uint8 (N, H, W, 3)" if module.input == "uint8" else "float32 (N, 3, H, W) between 0 and 1"
    bounded = format == "executorch"
    return {
        "format": format, "precision": precision, "input": module.input, "images": images,
        "largest_batch": LARGEST_BATCH if bounded else None,
        "outputs": ["probabilities", "logits"], "image_size": module.info["image_size"],
        "stored_size": module.info["stored_size"], "model": module.info["model"],
        "dataset": module.info["dataset"], "classes": list(module.info["classes"]), "checkpoint_sha256": checkpoint_sha256,
        "torch": torch.__version__,
    }
