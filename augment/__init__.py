"""Augmentation of a whole batch on the device of its images."""
from augment.augmenter import Batch, BatchAugmenter, is_fused
from augment.policy import POLICIES

__all__ = ["POLICIES", "Batch", "BatchAugmenter", "is_fused"]
