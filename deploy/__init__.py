"""A trained network outside of this project: files for other runtimes, checked, described, and in use."""
