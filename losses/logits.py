"""The logits of student and teacher, for methods in plain PyTorch."""


def in_fp32(student_logits, teacher_logits):
    """Both logits, (N, C), in fp32, the teacher's detached.  Raises ValueError for unequal shapes."""
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"logits must have equal shapes: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    return student_logits.float(), teacher_logits.detach().float()
