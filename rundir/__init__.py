"""Run directories: files, checkpoints, lock, summary; error messages and terminal output."""
