"""Whether two sets of flags make the same experiment.  Imports no torch."""

# Flags that say where and how a run is done, not what it computes: a resumed run may change them, runs of one table may differ.
NON_EXPERIMENT_FLAGS = {"output", "device", "cuda_graph", "grad_checkpoint", "resume", "overwrite", "debug", "dry_run"}
