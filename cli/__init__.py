"""Command-line flags, and sweeps over them."""
