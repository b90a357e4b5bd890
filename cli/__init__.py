"""The command line: flags, the flags of each method, and sweeps over them."""
