"""Whatever is done with a model, it is left as it was; only `distill` changes its student."""

import copy
from types import SimpleNamespace

import pytest
import torch

import willows_kd as kd
from willows_kd import cost

# each is called with things: teacher, student, tokenizer, blocks, ids and an empty folder
CALLS = {
    "evaluate": lambda t: kd.evaluate(t.student, t.blocks.test, t.tokenizer, t.teacher),
    "loss_by_position": lambda t: kd.loss_by_position(t.teacher, t.blocks.test),
    "token_scores": lambda t: kd.token_scores(t.student, t.teacher, t.ids),
    "block_nll": lambda t: kd.block_nll(t.teacher, t.blocks.test),
    "text_quality": lambda t: kd.text_quality(t.student, t.teacher, t.ids, t.ids),
    "compare": lambda t: kd.compare({"a": t.teacher, "b": t.student}, t.blocks, t.tokenizer),
    "complete": lambda t: kd.complete(t.teacher, t.tokenizer, "The river", 4),
    "sample_continuations": lambda t: kd.sample_continuations(t.teacher, t.ids, 4),
    "beam search": lambda t: kd.sample_continuations(t.teacher, t.ids, 4, beams=2),
    "make_transfer_set": lambda t: kd.make_transfer_set(t.teacher, t.blocks.test),
    "speculative_decode": lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 6),
    "latency": lambda t: kd.latency({"a": t.teacher}, t.ids, 2, 1),
    "decode_latency": lambda t: kd.decode_latency({"a": t.teacher}, t.ids, [1, 2], 1),
    "peak_memory": lambda t: cost.peak_memory(t.teacher, t.ids),
    "size_on_disk": lambda t: kd.size_on_disk(t.teacher),
    "fingerprint": lambda t: kd.fingerprint(t.teacher),
    "save_model": lambda t: kd.save_model(t.student, t.tokenizer, t.folder / "saved"),
    "student_from_teacher": lambda t: kd.student_from_teacher(t.teacher, 2),
    "narrowed": lambda t: kd.narrowed(t.teacher, feed_forward=[[0, 1, 2]] * 4),
    "importance": lambda t: kd.importance(t.teacher, t.blocks.test),
    "block_influence": lambda t: kd.block_influence(t.teacher, t.blocks.test),
    "choose_layers": lambda t: kd.choose_layers(t.teacher, 2, t.blocks.test),
    "quantized": lambda t: kd.quantized(t.student, bits=4),
    "quantized_size": lambda t: kd.quantized_size(t.student),
    "cache_teacher": lambda t: kd.cache_teacher(t.teacher, t.blocks, folder=t.folder),
    "plan": lambda t: kd.plan(t.teacher, t.student, t.blocks),
    "distill": lambda t: kd.distill(
        t.teacher, copy.deepcopy(t.student), t.blocks, kd.DistillConfig(epochs=1, dropout=0.1)
    ),
}


def prepared(model):
    """The model with modules in either mode, one dropout of its own, and one weight frozen."""
    model.train().transformer.h[1].eval()
    model.transformer.h[0].mlp.dropout.p = 0.3
    model.transformer.wpe.weight.requires_grad_(False)
    return model


def state(model) -> dict:
    """All that a caller can see of a model, and must find again."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "dropout": {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)},
        "weights": {name: (w.device, w.dtype, w.requires_grad) for name, w in weights.items()},
        "values": {name: w.detach().numpy().tobytes() for name, w in weights.items()},
        "gradients": [name for name, w in weights.items() if w.grad is not None],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("name", CALLS)
def test_models_and_random_numbers_are_left_as_they_were(
    name, make_gpt2, tokenizer, blocks, tmp_path, monkeypatch
):
    monkeypatch.setattr(kd.latency, "__defaults__", (2, 1))  # tokens, rounds
    teacher, student = prepared(make_gpt2(4)), prepared(make_gpt2(2, seed=1))
    things = {"teacher": teacher, "student": student, "ids": blocks.train[:2, :16]}
    things |= {"tokenizer": tokenizer, "blocks": blocks, "folder": tmp_path}
    torch.manual_seed(3)
    before = state(teacher), state(student), torch.get_rng_state()
    CALLS[name](SimpleNamespace(**things))
    for model, expected in ((teacher, before[0]), (student, before[1])):
        assert {k for k, v in state(model).items() if v != expected[k]} == set()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
