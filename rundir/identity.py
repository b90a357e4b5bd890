"""Comparison of the flags of two runs; files are compared by content.  Imports no torch."""

# Flags without an effect on the result: they may change on resume and differ between the runs of a table.
NON_EXPERIMENT_FLAGS = {"output", "device", "cuda_graph", "grad_checkpoint", "resume", "overwrite", "debug", "dry_run",
                        "config", "allow_weak_teacher", "teacher_logits", "teacher_logits_limit"}
# Path flags, and the entries of config.json with the SHA-256 of the content, which is compared instead of the path.
DIGESTS = {"data_dir": "data_sha256", "teacher_checkpoint": "teacher_sha256",
           "init": "init_sha256", "student_init": "init_sha256"}

BETWEEN = " + "  # the names of several networks in one value

# Flags that changed nothing when they were added: their value in runs without them.
BEFORE = {"flip": True, "crop": "pad", "crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 1.3333], "unreadable": "stop",
          "loss_scale": 1.0, "class_weights": "none"}


def listed(value) -> list:
    """The values of a flag, which is stored as one value or as a list of several."""
    return value if isinstance(value, list) else [value]


def unlisted(values: list):
    return values if len(values) > 1 else values[0]


def same_flag(name: str, old: dict, new: dict, sha256_of) -> bool:
    """Whether flag `name` is equivalent in the configuration `old` of a run and the flags `new`.

    sha256_of: function from the name of a changed path flag to the SHA-256 of its present content (a list for several files), or
    None.
    """
    old, new = BEFORE | old, BEFORE | new
    if name not in old or name not in new:  # of another version: a missing flag is off
        return all(flags.get(name) in (None, False, "none") for flags in (old, new))
    if old[name] == new[name]:
        return True
    if name in DIGESTS:
        before = old.get(DIGESTS[name])
        return before is not None and before == sha256_of(name)
    if name in ("batch_size", "processes"):
        each, other = (config["batch_size"] * config.get("processes", 1) for config in (old, new))  # images a step
        return each == other
    return False
