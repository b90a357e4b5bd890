"""Weights saved by other projects: found in their file, matched by name or by order, given the metadata that they lack.

mdistiller and RepDistiller save {"model": state_dict}, timm {"state_dict", "state_dict_ema"}, many a bare state_dict, with
prefixes of DataParallel, torch.compile and distillation frameworks.  The CIFAR networks here have the tensors of those projects
in their order, under other names.
"""
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import torch

from models.cifar_networks import NETWORKS
from rundir.errors import CHECKPOINT, USAGE, Failure

# The names under which files hold a state_dict; the first that is there counts, and else the only state_dict there is.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "net", "model_state_dict")
AVERAGED = "n_averaged"  # a counter of torch.optim.swa_utils.AveragedModel beside the weights
COUNTER = "num_batches_tracked"  # of BatchNorm, which files of torch before 0.4.1 lack and inference does not use


def tensors(content, path, code: int = CHECKPOINT) -> Mapping[str, torch.Tensor]:
    """The state_dict in the content of a file, without prefixes.  Failure `code`: there is none."""
    entries = content if isinstance(content, Mapping) else {}
    states = {key: value for key, value in entries.items() if _is_state(value)}
    state = next((states[key] for key in ENTRIES if key in states), next(iter(states.values())) if len(states) == 1 else entries)
    if not _is_state(state):
        found = f"its keys are {', '.join(map(str, list(entries)[:5]))}" if entries else f"it is of type {type(content).__name__}"
        raise Failure(code, f"no weights in the file ({path}: {found})",
                      f"save the state_dict of a network alone, or in a dictionary under {' or '.join(ENTRIES)}")
    if AVERAGED in state:
        state = {key: value for key, value in state.items() if key != AVERAGED}
    while len(roots := {key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = below(state, *roots)  # such as "module" by DataParallel, "_orig_mod" by torch.compile, "model" by Lightning
    return state


def _is_state(value) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())


def below(state: Mapping, root: str) -> dict[str, torch.Tensor]:
    """The tensors of `state` whose names begin with `root` and a dot, without these."""
    return {key.removeprefix(f"{root}."): tensor for key, tensor in state.items() if key.startswith(f"{root}.")}


def parts(weights: Mapping) -> Iterator[Mapping]:
    """What may be the state_dict of one network: all `weights`, and those below each root; of a student first."""
    yield weights
    roots = dict.fromkeys(key.partition(".")[0] for key in weights if "." in key)
    yield from (below(weights, root) for root in sorted(roots, key=lambda root: root != "student"))


def class_names(content, path) -> list[str] | None:
    """The names of classes in the content of a file, in the order of its outputs, or in a config.json beside it; None without."""
    entries = dict(content) if isinstance(content, Mapping) else {}
    with suppress(OSError, ValueError):
        entries |= json.loads(Path(path).with_name("config.json").read_text()) if Path(path).suffix == ".safetensors" else {}
    indices = entries.get("class_to_idx")
    found = sorted(indices, key=lambda name: indices[name]) if isinstance(indices, Mapping) else next(
        (entries[key] for key in ("classes", "class_names", "label_names") if isinstance(entries.get(key), (list, tuple))), None)
    return list(map(str, found)) if found else None


def in_order(net, weights: Mapping, head: frozenset[str]) -> tuple[dict[str, torch.Tensor], str | None]:
    """`weights` under the names of `net`, matched by order, and a description of the first tensor that does not fit, or None.

    Each must have the same shape, except for those in `head`, and the same last part of its name.
    """
    ours, theirs = ({key: tensor for key, tensor in state.items() if not key.endswith(COUNTER)}
                    for state in (net.state_dict(), weights))
    for our, their in zip_longest(ours, theirs):
        if our is None or their is None:
            return {}, f"{our} is missing" if their is None else f"{their} is unexpected"
        if our.rpartition(".")[2] != their.rpartition(".")[2] or our not in head and ours[our].shape != theirs[their].shape:
            return {}, f"{their} {tuple(theirs[their].shape)} in place of {our} {tuple(ours[our].shape)}"
    counters = {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items() if key.endswith(COUNTER)}
    return dict(zip(ours, theirs.values())) | counters, None


def network_of(weights: Mapping, path) -> str:
    """The CIFAR network whose tensors these are, by order; no two have the same.  Failure CHECKPOINT: none."""
    for part in parts(weights):
        last = list(part.values())[-1]
        for name, make in NETWORKS.items() if last.ndim else ():
            with torch.device("meta"):
                net = make(len(last))
            if in_order(net, part, frozenset())[1] is None:
                print(f"{path}: its tensors fit a {name}; strides, pooling and activations are not in the file, so compare the "
                      "accuracy below with your own")
                return name
    raise Failure(CHECKPOINT, f"the network of these weights is unknown ({path}: fits none of the CIFAR networks)",
                  "name it with --teacher, such as resnet18, or timm/NAME")


def complete(checkpoint: dict, data, sizes: dict, stated: dict | None = None) -> dict:
    """A checkpoint from models.read_teacher with the metadata that it lacks.

    sizes: "image_size" and "stored_size" of the student.  stated: "image_size", "mean" and "std" of the images on which weights
    of another project were trained, None where they are those of the run and of `data`.
    Failure USAGE: its classes are not those of the data, or are in another order.
    """
    imported = checkpoint.get("imported")
    theirs, ours = (list(classes) for classes in (checkpoint.get("classes") or data.classes, data.classes))
    if imported and sorted(theirs) != sorted(ours):
        print(f"{checkpoint['path']}: its classes have other names ({theirs[0]}, ...), and should be in the order of the data")
    elif theirs != ours:
        place, pair = next((place, pair) for place, pair in enumerate(zip_longest(theirs, ours)) if len(set(pair)) > 1)
        their, our = ("none" if name is None else repr(name) for name in pair)
        raise Failure(USAGE, f"the teacher's classes are not those of the data ({checkpoint['path']}: {len(theirs)} classes, the "
                             f"data {len(ours)}; number {place} is {their}, in the data {our})",
                      "choose the --dataset or --data-dir of its training, or a --teacher-checkpoint of these classes")
    if not imported:
        return checkpoint
    whole = {"image_size": sizes["image_size"], "mean": data.mean, "std": data.std, "dataset": data.name} | checkpoint
    whole |= {name: value for name, value in (stated or {}).items() if value} | {"classes": data.classes}
    # In evaluation it sees the same part of an image as the student.
    return whole | {"stored_size": round(whole["image_size"] * sizes["stored_size"] / sizes["image_size"])}
