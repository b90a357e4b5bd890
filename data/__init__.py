"""Data sets as uint8 tensors on the device, and the reading of image files."""
