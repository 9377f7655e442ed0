"""A teacher that fits no single device, divided among the processes of a run."""

from torch import nn

from willows_kd.errors import require
from willows_kd.models import distributed_state, require_model
from willows_kd.students import layer_stack


def shard_teacher(teacher: nn.Module) -> nn.Module:
    """Divide a teacher that fits no single device among the processes of a run, in place.

    Each process holds its share of every layer, and gathers one layer at a time while it
    computes (fully sharded data parallel: Zhao et al. 2023); embeddings and output weights
    are whole in each. The layers go to the process's device one by one, so load the teacher
    on the CPU, and make the student from it first. From then on it answers only if all
    processes ask at once, as they do in `distill`.

    Returns:
        the teacher.

    Raises:
        InputError: there is only one process, or the teacher has no list of layers.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import

    require_model(teacher, "teacher")
    state = distributed_state()
    require(
        state.num_processes > 1,
        "there is one process, and nothing to divide a teacher among; start several: "
        "torchrun --nproc_per_node N script.py",
    )
    for layer in teacher.get_submodule(layer_stack(teacher)):
        fully_shard(layer, reshard_after_forward=True)
    return teacher.to(state.device)
