"""What is asked of a model on a GPU: the real one, or on a machine without one a pretended one.

The pretended GPU stays in the process, so these tests run by themselves: `pytest -m device`.
"""

import copy
import os
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import test_left_alone
import torch
from notebook_runs import SERIES, small
from torch.utils._pytree import tree_leaves

import willows_kd as kd
from conftest import logits

REAL = torch.cuda.is_available()
# Each device has kernels of its own, which round in their own way. The teacher here is nearly
# uniform and its student nearly the same, so a KL is a small difference of large numbers: float32
# is then up to some 1e-4 from float64 by either route.
CLOSE = 1e-3
DRAWN = {"distill with dropout", "samples"}  # each real device draws its own random numbers
TESTS = os.path.dirname(__file__)
PRETEND = f"""
import sys
sys.path.append({TESTS!r})
import pretend_gpu
pretended = pretend_gpu.machine()
device = pretended.__enter__()
import willows_kd.models
willows_kd.models.best_device = lambda: device
"""

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def gpu(request):
    """The device; the pretended one is entered only where no other test can meet it."""
    if REAL:
        yield torch.device("cuda", 0)
        return
    others = [item for item in request.session.items if "device" not in item.keywords]
    if others:
        pytest.skip("the pretended GPU needs a process of its own: pytest -m device")
    pretend_gpu = pytest.importorskip("pretend_gpu", exc_type=ImportError)
    with pretend_gpu.machine() as device:
        yield device


@pytest.fixture
def few(blocks):
    """Blocks for two steps of training, since an operation is slow on the pretended GPU."""
    return kd.Blocks(blocks.train[:8], blocks.validation[:2], blocks.test[:2], blocks.remainder)


def is_there(model, gpu) -> bool:
    return {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {gpu}


# -- the device can refuse --------------------


def test_what_lies_on_two_devices_is_refused(gpu, make_gpt2, ids):
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=gpu)
    for product in (lambda: here @ there, lambda: there @ here, lambda: there.add_(here)):
        with pytest.raises(RuntimeError, match="same device"):
            product()
    with pytest.raises(RuntimeError, match="device"):
        here[there.long()]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(gpu))
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there * torch.tensor(2.0)).device == gpu  # one number may come from the CPU,
    assert there[here.long()].device == gpu  # and so may indices
    model = make_gpt2().to(gpu)
    assert is_there(model, gpu) and model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(RuntimeError, match="same device"):
        logits(model, ids)


# -- each call gives there what it gives on the CPU --------------------


def distilled(t, loss=None, teacher=None, **settings):
    """Loss and norm of each step."""
    config = kd.DistillConfig(**({"epochs": 1, "batch_size": 4} | settings))
    rows = kd.distill(teacher or t.teacher, t.student, t.blocks, config, loss=loss)
    return [[row["loss"], row["gradient_norm"]] for row in rows]


def cached(t, **kept):
    """The same, from a cache; its head is the teacher's."""
    cache = kd.cache_teacher(t.teacher, t.blocks, folder=t.folder, **kept)
    assert cache.device == t.teacher.device
    return distilled(t, teacher=cache)


def resumed(t):
    """The student after a run that went on from the checkpoint of its last step but one."""
    again, kept = copy.deepcopy(t.student), kd.Checkpoints(t.folder, 0)
    config = kd.DistillConfig(epochs=1, batch_size=4)
    kd.distill(t.teacher, t.student, t.blocks, config, checkpoints=kept)
    max(t.folder.glob("step_*")).unlink()
    kd.distill(t.teacher, again, t.blocks, config, checkpoints=kept, resume=True)
    return again


def saved(t):
    """A student, saved and loaded."""
    kd.save_model(t.student, t.tokenizer, t.folder / "student")
    return kd.load_student(t.folder / "student", t.tokenizer, t.teacher.device)


CHUNKED = kd.ChunkedLoss
MIXED = {"alpha": 0.3, "temperature": 2.0, "divergence": "jensen_shannon"}
LAYERS = {"hidden_weight": 0.5, "hidden_layers": ((1, 2), (2, 4))}
CALLS = test_left_alone.CALLS | {
    "distill": distilled,
    "distill, chunked": lambda t: distilled(t, CHUNKED, **MIXED),
    "distill with hidden states": lambda t: distilled(t, CHUNKED, hidden_weight=0.5),
    "distill with those of layers": lambda t: distilled(t, **LAYERS),
    "distill on-policy": lambda t: distilled(t, on_policy_share=0.5, divergence="reverse_kl"),
    "distill checkpointed": lambda t: distilled(t, gradient_checkpointing=True),
    "distill accumulated": lambda t: distilled(t, batch_size=2, gradient_accumulation_steps=2),
    "distill in bfloat16": lambda t: distilled(t, dtype="bfloat16")[0][0] < 1,
    "distill with dropout": lambda t: distilled(t, dropout=0.1),
    "distill what is rounded": lambda t: distilled(
        SimpleNamespace(**vars(t) | {"student": kd.quantized(t.student, bits=4)})
    ),
    "cache_teacher": cached,
    "top_k": lambda t: cached(t, top_k=8),
    "samples": lambda t: [loss for loss, _ in cached(t, samples=4)],
    "checkpoints": resumed,
    "save_model": saved,
    "prompts of a list": lambda t: kd.sample_continuations(t.teacher, [t.ids[0, :5]], 8),
}
MEASURED = {"latency", "decode_latency", "peak_memory", "plan"}
MEASURED |= {"memory_mb", "forward_ms", "token_ms"}  # columns of the table


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_there_what_it_gives_on_the_cpu_and_moves_no_model(
    name, gpu, make_gpt2, tokenizer, few, ids, tmp_path, monkeypatch
):
    if REAL and name in DRAWN:
        pytest.skip("a real device draws its own random numbers")
    if not REAL and name == "plan":
        pytest.skip("fake tensors cannot stand for the pretended GPU's, which are wrappers")
    monkeypatch.setattr(kd.latency, "__defaults__", (2, 1))  # tokens, rounds: each is slow there
    found = []
    for device in (gpu, torch.device("cpu")):
        teacher = make_gpt2().to(device)
        student, folder = kd.student_from_teacher(teacher), tmp_path / device.type
        things = {"teacher": teacher, "student": student, "ids": ids.to(device)}
        things |= {"tokenizer": tokenizer, "blocks": few, "folder": folder}
        found.append(parts(CALLS[name](SimpleNamespace(**things))))
        assert is_there(teacher, device) and is_there(student, device)
    for one, other in zip(*found, strict=True):
        if name not in MEASURED and not isinstance(one, str | None):
            torch.testing.assert_close(one, other, rtol=CLOSE, atol=CLOSE / 10, equal_nan=True)
        assert name in MEASURED or not isinstance(one, str) or one == other


def parts(value) -> list:
    """All that a call returned, with tensors on the CPU."""
    if isinstance(value, pd.DataFrame):
        value = value.drop(columns=MEASURED, errors="ignore").to_dict()
    if isinstance(value, torch.nn.Module):
        value = list(value.parameters())
    return [x.detach().cpu() if torch.is_tensor(x) else x for x in tree_leaves(value)]


def test_models_are_loaded_there(gpu, model_dir, tokenizer):
    assert is_there(kd.load_teacher(model_dir, gpu)[0], gpu)
    assert is_there(kd.load_bundled("student", gpu), gpu)


def test_a_student_elsewhere_leaves_its_teacher_where_it_was(gpu, make_gpt2, few):
    teacher, student = make_gpt2().to(gpu), make_gpt2(layers=2)
    kd.distill(teacher, student, few, kd.DistillConfig(epochs=1))
    assert is_there(teacher, gpu) and is_there(student, torch.device("cpu"))


def test_an_export_leaves_the_model_where_it_was(gpu, make_gpt2, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    student = make_gpt2().to(gpu)
    kd.export_model(student, tokenizer, tmp_path / "gguf", to="gguf")
    assert is_there(student, gpu)


# -- the notebooks --------------------


@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_notebook(path, run_notebook):
    notebook = small(path)
    if not REAL:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(PRETEND))
    run_notebook(notebook, allow_errors=True)
    assert errors(notebook) == []


def errors(notebook) -> list[str]:
    """Each cell that failed: its first line, and what was wrong."""
    return [
        f"{cell.source.splitlines()[0]}: {output.ename}: {output.evalue}"
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
