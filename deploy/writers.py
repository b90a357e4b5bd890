"""A trained network as one file for a runtime: ONNX, torch.export (.pt2), ExecuTorch (.pte); in fp32, fp16 or int8.

The file holds all that lies between an image and its classes: scaling, normalisation, resizing, the network, softmax.  int8
is post-training quantisation by the tool that is maintained for each format.  To add a format: one function that makes the
file, a line in `EXPORTERS`, `SUFFIXES` and `needs`, one in `RUNTIMES` of deploy/runtime.py, and its name in deploy/options.py.
"""
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
from deploy.runtime import onnx_session, quiet, require
from rundir.errors import USAGE, Failure, first_line

# ExecuTorch plans its memory ahead, for a largest batch.  It must be below 16: from there on torch takes convolutions apart in
# another way, and a program is for one side of that limit.
LARGEST_BATCH = 8


class Deployed(nn.Module):
    """Images -> (probabilities, logits), float32 (N, C) each: what models.predict computes, in one module.

    takes: `uint8` images (N, H, W, 3), or `float` ones, float32 (N, 3, H, W) between 0 and 1.  They are resized to the network's.
    dtype: what the network computes in; all before and behind it is float32.
    """

    def __init__(self, net, takes: str, dtype=torch.float32):
        super().__init__()
        self.info, self.takes, self.dtype, self.net = net.info, takes, dtype, net.to(dtype)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(net.info[name], dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        if self.takes == "uint8":
            images = images.permute(0, 3, 1, 2).float() / 255
        size = (self.info["image_size"], self.info["image_size"])
        images = F.interpolate((images - self.mean) / self.std, size, mode="bilinear", align_corners=False)
        logits = self.net(images.to(self.dtype)).float()
        return logits.softmax(1), logits


def deployed(source, takes: str = "uint8", precision: str = "fp32") -> Deployed:
    """The network in a best.pt, its path or what models.read returned, with its BatchNorms folded, in the memory format that
    exporters expect."""
    net = models.load(source, folded=True).to(memory_format=torch.contiguous_format)
    return Deployed(net, takes, torch.float16 if precision == "fp16" else torch.float32).eval()


def export(module: Deployed, format: str, precision: str, calibration, path: Path) -> None:
    """Write `module`, deployed for `precision`, to the file `path`; the exporter may leave other files beside it.

    calibration: uint8 (N, H, W, 3), the images whose activations give int8 its ranges.
    Failure USAGE: a package is missing, or the exporter cannot take this network.
    """
    require(*needs(format, precision))
    batches = [as_input(module, images) for images in calibration.split(LARGEST_BATCH)] if precision == "int8" else None
    try:
        with quiet(), torch.no_grad():
            EXPORTERS[format](module, batches, path)
    except OSError:
        raise
    except Exception as failure:  # each exporter raises its own types for what it cannot do
        raise Failure(USAGE, f"{module.info['model']} cannot be exported as {format} in {precision} ({first_line(failure)})",
                      "choose another --format or --precision") from failure


def as_input(module: Deployed, images):
    """uint8 (N, H, W, 3) as `module` takes images."""
    return images.clone() if module.takes == "uint8" else images.permute(0, 3, 1, 2).float().contiguous() / 255


def example(module: Deployed):
    """An input of `module`, and the names of its dimensions that are free, by their place."""
    side = module.info["image_size"]
    images = torch.zeros(LARGEST_BATCH, side, side, 3, dtype=torch.uint8)
    return as_input(module, images), dict(zip((0, 1, 2) if module.takes == "uint8" else (0, 2, 3), "NHW"))


def to_onnx(module: Deployed, batches, path: Path) -> None:
    images, free = example(module)
    made = torch.onnx.export(module, (images,), dynamo=True, verbose=False, external_data=False, input_names=["images"],
                             output_names=["probabilities", "logits"], dynamic_shapes=(free,)).model_proto
    for part in (*made.graph.node, *made.graph.value_info, *made.graph.initializer, made.graph):
        del part.metadata_props[:]  # the line of source that each node comes from, with its path
    if batches is None:
        path.write_bytes(made.SerializeToString())
    else:
        quantize_onnx(made, batches, path)


def quantize_onnx(made, batches, path: Path) -> None:
    """Static quantisation by ONNX Runtime: activations uint8, which its x86 kernels want, weights int8.

    Weights get one scale for each tensor; one for each channel, an eighth more bytes in a small network, where that agrees with
    the network in fp32 on more than one in a hundred of the calibration images besides.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    whole, prepared = path.with_name("whole.onnx"), path.with_name("prepared.onnx")
    whole.write_bytes(made.SerializeToString())
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    of_channels = path.with_name("channels.onnx")
    for each, per_channel in ((path, False), (of_channels, True)):
        # Probabilities and logits in 256 steps would tie: a softmax stays as it is, and so does what the last layer gives.
        quantization.quantize_static(
            str(prepared), str(each), Calibration(), quant_format=quantization.QuantFormat.QOperator, per_channel=per_channel,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[node.name for node in made.graph.node if node.op_type == "Softmax"],
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]})
        shorten(each)
    expected, one, many = (predictions(each, batches) for each in (whole, path, of_channels))
    if np.sum(many == expected) - np.sum(one == expected) > len(expected) / 100:
        of_channels.replace(path)


def predictions(path: Path, batches) -> np.ndarray:
    run = onnx_session(path, {}, None)
    return np.concatenate([run(batch.numpy())[1].argmax(1) for batch in batches])


def shorten(path: Path) -> None:
    """Number the tensors inside of an ONNX file and forget the names of its nodes: they are a third of a small int8 file."""
    import onnx
    made = onnx.load(path)
    short = {part.name: part.name for part in (*made.graph.input, *made.graph.output)} | {"": ""}  # "": an input left out
    for part in made.graph.initializer:
        part.name = short.setdefault(part.name, f"{len(short):x}")
    for node in made.graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"{len(short):x}") for name in names]
    del made.graph.value_info[:]
    path.write_bytes(made.SerializeToString())


def program(module, images, free: dict, quantizer=None, batches=None):
    """The torch.export program of `module` with these free dimensions, in int8 where a quantiser of torchao's is given."""
    # A strict trace tells a quantiser apart the calls of a module that is called twice, such as the ReLU of a residual block.
    made = torch.export.export(module, (images,), dynamic_shapes=(free,), strict=quantizer is not None)
    if quantizer is None:
        return made
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    prepared = prepare_pt2e(made.module(), quantizer)
    for batch in batches:
        prepared(batch)
    quantized = convert_pt2e(prepared)
    used = {node.target for node in quantized.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in quantized.named_parameters() if name not in used]:  # the weights before they were int8
        owner, _, attribute = name.rpartition(".")
        delattr(quantized.get_submodule(owner), attribute)
    return torch.export.export(quantized, (images,), dynamic_shapes=(free,))


def to_pt2(module: Deployed, batches, path: Path) -> None:
    images, free = example(module)
    quantizer = None
    if batches is not None:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    made = program(module, images, {place: torch.export.Dim(name) for place, name in free.items()}, quantizer, batches)
    for node in made.graph.nodes:  # the lines of source that they come from, with their paths
        for name in ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack"):
            node.meta.pop(name, None)
    made.example_inputs = None
    archive = io.BytesIO()
    torch.export.save(made, archive)
    path.write_bytes(archive.getvalue())


def to_executorch(module: Deployed, batches, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    images, free = example(module)
    most = {"N": LARGEST_BATCH, "H": module.info["image_size"], "W": module.info["image_size"]}
    quantizer = None
    if batches is not None:
        quantizer = xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    made = program(module, images, {place: torch.export.Dim(name, max=most[name]) for place, name in free.items()},
                   quantizer, batches)
    path.write_bytes(to_edge_transform_and_lower(made, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "executorch": ".pte"}
EXPORTERS = {"onnx": to_onnx, "pt2": to_pt2, "executorch": to_executorch}


def needs(format: str, precision: str) -> tuple[str, ...]:
    """The packages that `export` and the runtime of its file import."""
    if format == "onnx":
        return "onnx", "onnxscript", "onnxruntime"
    torchao = ("torchao.quantization.pt2e",) if precision == "int8" else ()
    return (*torchao, "executorch.exir", "executorch.runtime") if format == "executorch" else torchao


def card(module: Deployed, format: str, precision: str, checkpoint_sha256: str) -> dict:
    """What describes an exported file, all but its own SHA-256 and accuracy."""
    takes = "uint8 (N, H, W, 3)" if module.takes == "uint8" else "float32 (N, 3, H, W) between 0 and 1"
    bounded = format == "executorch"
    return {
        "format": format, "precision": precision, "input": module.takes, "images": takes,
        "largest_batch": LARGEST_BATCH if bounded else None, "largest_side": module.info["image_size"] if bounded else None,
        "outputs": ["probabilities", "logits"], "image_size": module.info["image_size"], "model": module.info["model"],
        "dataset": module.info["dataset"], "classes": list(module.info["classes"]), "checkpoint_sha256": checkpoint_sha256,
        "torch": torch.__version__,
    }
