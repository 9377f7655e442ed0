"""Checks for notebook S4: bytes and operations of a run, by hand."""

from collections.abc import Callable

from willows_kd.exercises import judge


def check_bytes(my_bytes: Callable) -> bool:
    """Check `my_bytes(teacher, student)`: bytes of a run in float32, from numbers of parameters."""
    mistakes = {
        "the teacher is not trained: it has weights alone": lambda t, s: 16 * (t + s),
        "these are the weights alone, without gradients and moments": lambda t, s: 4 * (t + s),
        "AdamW's moments are missing: two for each trained parameter": lambda t, s: 4 * t + 8 * s,
        "the teacher's weights are missing": lambda t, s: 16 * s,
    }
    praise = "what else is alive at the peak, the plan has to rehearse"
    return judge(my_bytes, lambda t, s: 4 * t + 16 * s, mistakes, praise, (120, 70), (50, 45))


def check_flops(my_flops: Callable) -> bool:
    """Check `my_flops(teacher, student, tokens)`: operations of an epoch, by the 6ND rule."""
    mistakes = {
        "the teacher only runs forward: 2 a parameter and token": lambda t, s, n: 6 * (t + s) * n,
        "the backward pass is missing: twice the forward pass": lambda t, s, n: 2 * (t + s) * n,
        "the backward pass takes 4, with the forward pass 6": lambda t, s, n: (2 * t + 4 * s) * n,
        "the teacher's forward pass is missing": lambda t, s, n: 6 * s * n,
    }
    praise = "a good rule while blocks are short; attention adds to it as they grow"
    cases = (12, 7, 100), (50, 45, 30)
    return judge(my_flops, lambda t, s, n: (2 * t + 6 * s) * n, mistakes, praise, *cases)
