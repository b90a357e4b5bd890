"""One file per op: formula, public op, reference."""
