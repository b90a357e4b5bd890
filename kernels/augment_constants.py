"""Numbers that the augmentation kernel and its CPU path share; kernels/augment.py makes them constants of Triton."""
KINDS = NOTHING, GEOMETRY, SHARPNESS, COLOR, CONTRAST, EQUALIZE, AUTOCONTRAST, LOOKUP = range(8)  # of policy operations
STREAMS = CROP, POLICY, ERASE, MIX = range(4)  # of random words
QUANTILE_BITS = 12  # of the tables that stand for the distributions of Mixup and CutMix
ERASE_BITS = 16  # of the table of erased boxes: entries enough to give each of the 1,627 sizes at 64 pixels its chance
WARPS = {32: 4, 64: 16}  # by the sizes of image that the kernel takes: eight pixels of each image to a thread
