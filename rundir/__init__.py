"""Run directories: their files, checkpoints, lock and summary; the errors and lines that a user sees."""
