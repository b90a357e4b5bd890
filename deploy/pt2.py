"""Validation of .pt2 files before torch.export.load, which unpickles parts of a file and evaluates strings in it as code.

Accepted is only the output of export.py: raw tensors, and a graph of PyTorch's operators whose sizes are plain arithmetic.
"""
import io
import json
import re
import zipfile
from pathlib import Path

from rundir.errors import CHECKPOINT, Failure

# Environment in which torch.load has weights_only=True, whatever its arguments are.
WEIGHTS_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
SAMPLES = "archive/data/sample_inputs/model.pt"  # a pickle; empty in our files
MEMBERS = re.compile(rf"{re.escape(SAMPLES)}|archive/(byteorder|\.data/(version|serialization_id)|archive_(format|version)|"
                     r"models/model\.json|data/weights/(weight_[0-9]+|model_weights_config\.json)|"
                     r"data/constants/(tensor_[0-9]+|model_constants_config\.json))")
KEY = re.compile(r"[\w.+-]*", re.ASCII)
NAME = re.compile(r"(?!torch|_operator|math)[\w.+-]*|torch\.ops\.(aten|quantized_decomposed)(\.(?!__)\w+){2}|"
                  r"_operator\.(add|floordiv|mod|mul|sub)", re.ASCII)  # an allowed operator, or a name that is no operator
STRUCTURE = re.compile(r'("(type|context|children_spec|builtins\.(dict|list|tuple)|null|\[\])"|null|[][{}:, 1])*')
STRINGS = {  # allowed strings by key; NAME elsewhere
    "expr_str": re.compile(r"((Add|FloorDiv|Integer|Max|Min|Mod|Mul|Symbol)\(|'s[0-9]+'|(integer|positive)=True|[-0-9(), ])+"),
    "in_spec": STRUCTURE, "out_spec": STRUCTURE,
}
VALUES = {"use_pickle": False, "guards_code": []}  # required values by key; guards are Python code


def checked(path: Path) -> io.BytesIO:
    """A copy of a .pt2 file, rewritten so that torch reads exactly the validated members.

    Failure CHECKPOINT: content that export.py does not write.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            foreign = find_foreign(name, content)
            if foreign is not None:
                raise Failure(CHECKPOINT, f"not a file written by export.py ({path}: {foreign[:80]!r})",
                              "export it again from its best.pt, which contains data only")
            written.writestr(name, content)
    copy.seek(0)
    return copy


def find_foreign(name: str, content: bytes) -> str | None:
    """The first part of an archive member that export.py does not write; None if there is none."""
    if not MEMBERS.fullmatch(name) or name == SAMPLES and content:
        return name
    if name.endswith(".json"):
        for key, node in nodes(json.loads(content.decode())):
            if key == "as_string":  # a string argument could be a file name; our operators have none
                return f"a string argument, {node}"
            if key in VALUES and node != VALUES[key] or isinstance(node, str) and not STRINGS.get(key, NAME).fullmatch(node):
                return f"{key}: {node}"
            if not KEY.fullmatch(key):
                return key
    return None


def nodes(tree, key: str = ""):
    """(key, node) of every node of a JSON tree, from the root; elements of a list have its key."""
    yield key, tree
    if isinstance(tree, dict):
        for name, node in tree.items():
            yield from nodes(node, name)
    elif isinstance(tree, list):
        for node in tree:
            yield from nodes(node, key)
