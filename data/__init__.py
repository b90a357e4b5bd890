"""Data sets as uint8 tensors on the device, and the pictures they are read from."""
