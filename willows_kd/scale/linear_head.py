"""Models whose logits are hidden states times output weights, and their loss without the logits."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from willows_kd.config import DistillConfig
from willows_kd.distillation import DistillationLoss, asks_teacher
from willows_kd.models import eval_mode
from willows_kd.scale.chunked_loss import chunked_distillation_loss


class ChunkedLoss(DistillationLoss):
    """`DistillationLoss` in less memory and time: `distill(..., loss=ChunkedLoss)`.

    It needs logits that are hidden states times output weights, in teacher and student, as
    in GPT-2. If they are more than that, it is the loss that it stands in for.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """Find out whether it fits; the arguments are those of `DistillationLoss`."""
        asked = [student, teacher] if asks_teacher(config) else [student]
        self.chunked = all(has_linear_head(model, ids.to(model.device)) for model in asked)
        super().__init__(teacher, student, config, ids)

    def forward_states(self, model, ids: torch.Tensor, layers: list[int]):
        """Final hidden states in place of logits, and the hidden states that are matched."""
        if not self.chunked:
            return super().forward_states(model, ids, layers)
        more = {"output_hidden_states": True} if layers else {}
        found = model.base_model(ids, use_cache=False, **more)
        final = found.last_hidden_state
        states = [found.hidden_states[i] for i in layers] or [final] * self.matches_hidden
        return final[:, :-1], [state[:, :-1] for state in states]

    def combine_losses(self, output, teacher, target, labels, mask):
        """The loss from the hidden states of student and teacher, and its soft and hard parts."""
        if not self.chunked:
            return super().combine_losses(output, teacher, target, labels, mask)
        config = self.config
        return chunked_distillation_loss(
            student_hidden=output,
            student_head=output_weights(self.student, self.vocabulary),
            teacher_hidden=target,
            teacher_head=None if target is None else output_weights(teacher, self.vocabulary),
            labels=labels,
            temperature=config.temperature,
            alpha=config.alpha,
            divergence=config.divergence,
            mask=mask,
            beta=config.beta,
            skew=config.skew,
        )


def output_weights(model, vocabulary: int) -> torch.Tensor:
    """A model's output weights for the first tokens of its vocabulary, (vocabulary, width)."""
    weights = model.get_output_embeddings().weight
    return weights if len(weights) == vocabulary else weights[:vocabulary]


@torch.no_grad()
def has_linear_head(model, ids: torch.Tensor) -> bool:
    """Whether a model's logits are hidden states times output weights: seen by trying.

    They are more than that where a head has a bias, or where logits are capped or scaled.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    if not head.weight.is_floating_point() or head.weight.device != ids.device:
        return False  # packed into few bits, or on another device than the hidden states
    calls = []
    with eval_mode(model), head.register_forward_hook(lambda _, *call: calls.append(call)):
        hidden = getattr(model.base_model(ids, use_cache=False), "last_hidden_state", None)
        logits = model(ids, use_cache=False).logits
    if hidden is None:
        return False
    if isinstance(hidden, FakeTensor):  # no values to compare, in `plan`
        (given,), product = calls[-1]
        return given.shape == hidden.shape and product is logits
    return torch.allclose(head(hidden), logits, rtol=1e-4, atol=1e-5)
