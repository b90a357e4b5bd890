"""Whether two runs are the same experiment: by their flags, of files by content.  Imports no torch."""

# Flags that say where and how a run is done, not what it computes: a resumed run may change them, runs of one table may differ.
NON_EXPERIMENT_FLAGS = {"output", "device", "cuda_graph", "grad_checkpoint", "resume", "overwrite", "debug", "dry_run"}
# Flags that are paths: their content counts, whose SHA-256 config.json has under this name.
DIGESTS = {"data_dir": "data_sha256", "teacher_checkpoint": "teacher_sha256",
           "init": "init_sha256", "student_init": "init_sha256"}


def same_flag(name: str, old: dict, new: dict, sha256_of) -> bool:
    """Whether flag `name` means the same in the configuration `old` of a run and in `new` flags.

    sha256_of: called with the name of a flag that is a path, if the path changed -> SHA-256 of its content now, or None.
    """
    if name not in old or name not in new:  # of another version: a flag that one of them does not have is off there
        return not old.get(name) and not new.get(name)
    if old[name] == new[name]:
        return True
    if name in DIGESTS:
        before = old.get(DIGESTS[name])
        return before is not None and before == sha256_of(name)
    if name in ("batch_size", "processes"):
        return images_per_step(old) == images_per_step(new)
    return False


def images_per_step(config: dict) -> int:
    """The global batch size, of all processes."""
    return config["batch_size"] * config.get("processes", 1)
