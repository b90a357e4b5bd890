"""Weights saved by other projects: found in their file, matched by name or by order, given the metadata that they lack.

mdistiller and RepDistiller save {"model": state_dict}, timm {"state_dict", "state_dict_ema"}, many a bare state_dict, with
prefixes of DataParallel, torch.compile and distillation frameworks.  The CIFAR networks here have the tensors of those projects
in their order, under other names.
"""
from collections.abc import Mapping
from itertools import zip_longest

import torch

from models.cifar_networks import NETWORKS
from rundir.errors import CHECKPOINT, USAGE, Failure

# The names under which files hold a state_dict; the first that is there counts.
ENTRIES = ("state_dict_ema", "state_dict", "model", "net", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # of all names, by DataParallel and torch.compile
STUDENT = "student."  # of one of two networks in a file
COUNTER = "num_batches_tracked"  # of BatchNorm, which files of torch before 0.4.1 lack and inference does not use


def tensors(content, path, code: int = CHECKPOINT) -> Mapping[str, torch.Tensor]:
    """The state_dict in the content of a file, without prefixes.  Failure `code`: there is none."""
    entries = content if isinstance(content, Mapping) else {}
    state = next((entries[key] for key in ENTRIES if isinstance(entries.get(key), Mapping)), entries)
    if not state or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        found = f"its keys are {', '.join(map(str, list(entries)[:5]))}" if entries else f"it is of type {type(content).__name__}"
        raise Failure(code, f"no weights in the file ({path}: {found})",
                      f"save the state_dict of a network alone, or in a dictionary under {' or '.join(ENTRIES)}")
    while prefix := next((each for each in PREFIXES if all(key.startswith(each) for key in state)),
                         STUDENT if any(key.startswith(STUDENT) for key in state) else None):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


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
    last = list(weights.values())[-1]
    for name, make in NETWORKS.items() if last.ndim else ():
        with torch.device("meta"):
            net = make(len(last))
        if in_order(net, weights, frozenset())[1] is None:
            print(f"{path}: the tensors of a {name}")
            return name
    raise Failure(CHECKPOINT, f"the network of these weights is unknown ({path}: fits none of the CIFAR networks)",
                  "name it with --teacher")


def complete(checkpoint: dict, data, image_size: int, mean=None, std=None) -> dict:
    """A checkpoint from models.read with the metadata of `data` where it has none.

    mean, std: of the images that the network was trained on, in place of those in the file.
    Failure USAGE: its classes are not those of the data.
    """
    theirs, ours = (list(classes) for classes in (checkpoint.get("classes", data.classes), data.classes))
    if theirs != ours:
        place, pair = next((place, pair) for place, pair in enumerate(zip_longest(theirs, ours)) if len(set(pair)) > 1)
        their, our = ("none" if name is None else repr(name) for name in pair)
        raise Failure(USAGE, f"the teacher's classes are not those of the data ({checkpoint['path']}: {len(theirs)} classes, the "
                             f"data {len(ours)}; number {place} is {their}, in the data {our})",
                      "choose the --dataset or --data-dir of its training, or a --teacher-checkpoint of these classes")
    missing = {"classes": data.classes, "image_size": image_size, "mean": data.mean, "std": data.std, "dataset": data.name}
    return missing | checkpoint | {name: value for name, value in (("mean", mean), ("std", std)) if value}
