"""Numbers that the augmentation kernel and its CPU path share; kernels/augment.py makes them constants of Triton."""
KINDS = NOTHING, GEOMETRY, SHARPNESS, COLOR, CONTRAST, EQUALIZE, AUTOCONTRAST, LOOKUP = range(8)  # of policy operations
STREAMS = CROP, POLICY, ERASE, MIX = range(4)  # of random words
QUANTILE_BITS = 12  # of the tables that stand for the distributions of Mixup and CutMix
BOX_BITS = 16  # of the tables of boxes: enough entries for nearly all of the 1,627 sizes of erased boxes at 64 pixels
PLACE_BITS = 8  # of the fraction of a pixel at which a window is read when it is resized
WARPS = {32: 4, 64: 16}  # by the sizes of image that one launch makes: eight pixels of each image to a thread
SIZES = range(8, 257, 4)  # that the kernels make: a row begins with 16 whole bytes, and the sum of a channel is exact in float32
