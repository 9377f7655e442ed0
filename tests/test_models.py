"""Loading, making and saving models: what works, and what is refused in one line."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
)

import willows_kd as kd
from conftest import logits, shake
from willows_kd import models
from willows_kd.errors import WriteError
from willows_kd.files import SETTINGS_FILE
from willows_kd.models import (
    ASSETS,
    BUNDLED_TEACHER,
    HubError,
    check_context,
    check_same_tokenizer,
    common_vocabulary,
    load_tokenizer,
)

# -- the bundled teacher ---------------------------------------------------------------


def test_the_bundled_teacher_is_in_eval_mode_and_float32():
    model, tokenizer = kd.load_teacher(device="cpu")
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)


def test_the_bundled_teacher_needs_nothing_but_transformers():
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED_TEACHER).float().eval()
    ids = AutoTokenizer.from_pretrained(BUNDLED_TEACHER)("The river", return_tensors="pt").input_ids
    ours, tokenizer = kd.load_teacher(device="cpu")
    assert torch.equal(ids, tokenizer("The river", return_tensors="pt").input_ids)
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    "text",
    [
        "The Mole had been working.",
        "“Oh my!” he said — ‘it’s the river’s…’",
        "boats 🚣🏽‍♀️ and 🦡",
        "two  spaces , a comma ; and\n\n\ta tab\r\n",
        "naïve café, 川, ру́сский, e\u0301",
        " ",
    ],
)
def test_text_survives_the_bundled_tokenizer(text, tokenizer):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_ships_is_under_35_megabytes_in_a_wheel():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(len(zlib.compress(file.read_bytes())) for file in files) < 35e6


def test_the_base_has_the_teachers_shape_and_other_weights():
    base, teacher = kd.load_bundled("base", "cpu"), kd.load_bundled(device="cpu")
    assert not base.training
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (base, teacher)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(
        base.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    )


def test_a_bundled_history_has_the_rows_that_distill_returned(
    teacher, blocks, tmp_path, monkeypatch
):
    student = kd.student_from_teacher(teacher, 1)
    history = kd.distill(teacher, student, blocks, kd.DistillConfig(epochs=1, batch_size=8))
    (tmp_path / "student").mkdir()
    pd.DataFrame(history).to_csv(tmp_path / "student" / "history.csv", index=False)
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    columns = dict.fromkeys(history[-1])  # of all rows: those of a step alone have fewer
    expected = [columns | row for row in history]
    assert kd.bundled_history("student") == expected


def test_a_bundled_model_loads_as_any_teacher(tokenizer):
    """Whether or not its directory has a tokenizer of its own."""
    student, its = kd.load_teacher(models.bundled("student"), "cpu")
    assert kd.fingerprint(student) == kd.fingerprint(kd.load_bundled("student", "cpu"))
    assert its.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("load", [kd.load_bundled, kd.bundled_history])
def test_an_unknown_bundled_model_is_refused_with_the_names_there_are(load):
    with pytest.raises(kd.InputError, match="'pupil'; there are base, teacher, student, student_h"):
        load("pupil")


# -- dropout ---------------------------------------------------------------------------


def test_dropout_is_set_and_restored_layer_by_layer(teacher, ids):
    teacher.transformer.h[0].mlp.dropout.p = 0.3

    def passes_are_equal():
        return torch.equal(*(teacher(ids).logits for _ in range(2)))

    teacher.train()
    with models.dropout_set_to(teacher, 0.0):
        assert passes_are_equal()
    assert not passes_are_equal()
    assert teacher.transformer.h[0].mlp.dropout.p == 0.3


def test_each_module_gets_its_own_mode_back(teacher):
    teacher.train().transformer.h[1].eval()
    with models.eval_mode(teacher, None):
        assert not any(module.training for module in teacher.modules())
    assert [layer.training for layer in teacher.transformer.h] == [True, False, True, True]
    assert teacher.training and not teacher.transformer.h[1].mlp.training


# -- weights that are placed elsewhere -------------------------------------------------


def test_a_teacher_that_is_partly_on_the_disk_teaches_from_there(model_dir, blocks, tmp_path):
    names = ["transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "lm_head"]
    places = dict.fromkeys(names, "cpu") | {"transformer.h": "disk"}
    whole, _ = kd.load_teacher(model_dir, "cpu")
    teacher = AutoModelForCausalLM.from_pretrained(
        model_dir, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert teacher.transformer.h[0].ln_1.weight.is_meta
    ends = [
        kd.distill(its, kd.student_from_teacher(whole, 2), blocks, kd.DistillConfig(epochs=1))[-1]
        for its in (whole, teacher)
    ]
    for name in ("loss", "validation_kl"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-5)
    with pytest.raises(kd.InputError, match="offloaded: it can teach, but .* without device_map"):
        kd.student_from_teacher(teacher)
    with pytest.raises(kd.InputError, match="load it without device_map"):
        kd.fingerprint(teacher)


def test_a_teacher_in_few_bits_teaches_where_it_is(teacher, blocks, monkeypatch):
    """As bitsandbytes leaves a model: it refuses to be moved."""
    student = kd.student_from_teacher(teacher, 2)
    teacher.is_quantized = True
    monkeypatch.setattr(teacher, "to", lambda *_: pytest.fail("it was moved"))
    assert kd.distill(teacher, student, blocks, kd.DistillConfig(epochs=1))[0]["soft_loss"] > 0
    with pytest.raises(kd.InputError, match="quantized: it can teach, but .* load it unquantised"):
        kd.student_from_teacher(teacher)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_best_device_is_a_gpu_if_there_is_one(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert models.best_device().type == best


# -- LoRA adapters ---------------------------------------------------------------------


@pytest.fixture
def adapted(teacher):
    """A teacher with a LoRA adapter whose weights matter, and the same with it merged."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True
    )
    wrapped = shake(peft.get_peft_model(teacher, settings)).eval()
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


def test_a_wrapped_teacher_is_cut_merged_and_stays_wrapped(adapted, ids):
    wrapped, merged = adapted
    before = logits(wrapped, ids)
    student = kd.student_from_teacher(wrapped, 4)
    torch.testing.assert_close(logits(student, ids), logits(merged, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(wrapped, ids), before)


def test_a_wrapped_teacher_teaches(adapted, blocks):
    student = kd.student_from_teacher(adapted[0], 4)
    history = kd.distill(adapted[0], student, blocks, kd.DistillConfig(epochs=1, dropout=0))
    assert history[0]["soft_loss"] < 1e-6


def test_a_wrapped_model_is_saved_merged(adapted, tokenizer, ids, tmp_path):
    kd.save_model(adapted[0], tokenizer, tmp_path / "saved")
    again, _ = kd.load_teacher(tmp_path / "saved", "cpu")
    torch.testing.assert_close(logits(again, ids), logits(adapted[1], ids), rtol=1e-4, atol=1e-4)


def test_a_directory_with_an_adapter_is_loaded_merged(model_dir, adapted, ids, tmp_path):
    wrapped, _ = adapted
    wrapped.peft_config["default"].base_model_name_or_path = str(model_dir)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = kd.load_teacher(tmp_path / "adapter", "cpu")
    assert len(tokenizer) == loaded.config.vocab_size
    base, _ = kd.load_teacher(model_dir, "cpu")
    assert not torch.equal(logits(loaded, ids), logits(base, ids))
    assert not hasattr(loaded, "peft_config") or type(loaded) is type(base)
    check_context(tmp_path / "adapter", 64)


def test_without_peft_a_directory_with_an_adapter_says_what_to_install(model_dir, monkeypatch):
    (model_dir / "config.json").unlink()
    settings = {"base_model_name_or_path": "gpt2"}
    (model_dir / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(kd.InputError, match="holds a LoRA adapter; .*pip install peft"):
        kd.load_teacher(model_dir, "cpu")


# -- one vocabulary --------------------------------------------------------------------


@pytest.fixture
def swapped(model_dir, swap_words):
    """The bundled tokenizer with the ids of two words swapped."""
    return load_tokenizer(swap_words(model_dir))


def test_the_same_tokenizer_is_accepted(tokenizer):
    check_same_tokenizer(tokenizer, load_tokenizer(BUNDLED_TEACHER))


@pytest.fixture
def padded(tokenizer):
    """The bundled tokenizer with a token added."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    return padded


def test_an_added_token_is_named(tokenizer, padded):
    for pair, whose in (((tokenizer, padded), "student"), ((padded, tokenizer), "teacher")):
        said = check_same_tokenizer(*pair)
        assert said.startswith(f"the {whose}'s tokenizer alone has [PAD]: the loss leaves out")


def test_a_vocabulary_of_another_size_is_refused_with_both_sizes(tokenizer, model_dir):
    file = model_dir / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["model"]["vocab"][list(content["model"]["vocab"])[-1]]
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    sizes = f"{len(tokenizer)} tokens.* {len(tokenizer) - 1}"
    with pytest.raises(kd.InputError, match=sizes):
        check_same_tokenizer(tokenizer, load_tokenizer(model_dir))


def test_the_same_words_with_other_ids_are_refused(tokenizer, swapped):
    assert len(swapped) == len(tokenizer)
    with pytest.raises(kd.InputError, match="different ids"):
        check_same_tokenizer(tokenizer, swapped)


def test_a_student_made_elsewhere_loads_when_it_shares_the_vocabulary(model_dir, tokenizer):
    assert kd.load_student(model_dir, tokenizer, "cpu").config.n_layer == 4


def test_a_student_made_elsewhere_is_refused_when_it_does_not(model_dir, tokenizer, swapped):
    with pytest.raises(kd.InputError, match="share a vocabulary"):
        kd.load_student(model_dir, tokenizer, "cpu")


@pytest.mark.parametrize(("more", "also"), [(1, 0), (0, 1), (192, 64), (1, 300)])
def test_heads_of_different_sizes_are_compared_over_the_common_tokens(
    more, also, make_gpt2, tokenizer, blocks
):
    """As after adding a [PAD], or with heads padded to different multiples."""
    known = len(tokenizer)
    teacher = make_gpt2(2, vocab_size=known + more)
    student = make_gpt2(2, seed=1, vocab_size=known + also)
    common = known + min(more, also)
    assert common_vocabulary(teacher, student) == common
    ids = blocks.train[:8]
    some = replace(blocks, train=ids, validation=ids)
    said = f"predict {known + more} and {known + also} tokens: the loss is over the first {common}"
    with pytest.warns(UserWarning, match=said):
        rate = kd.DistillConfig(epochs=1, batch_size=8, learning_rate=1e-9)
        [row] = kd.distill(teacher, student, some, rate)
    p, q = (logits(m, ids)[:, :-1, :common].log_softmax(-1) for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert row["soft_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["validation_kl"] == pytest.approx(expected, rel=0.2)  # in windows


def test_a_student_with_a_token_less_loads_and_says_so(model_dir, padded, tokenizer):
    with pytest.warns(UserWarning, match=r"the teacher's tokenizer alone has \[PAD\]"):
        student = kd.load_student(model_dir, padded, "cpu")
    assert student.config.vocab_size == len(tokenizer)


def test_a_token_beyond_the_embeddings_is_refused_before_anything_is_done(teacher, blocks, padded):
    size = teacher.config.vocab_size
    wrong = replace(blocks, validation=torch.full_like(blocks.validation, size))
    said = rf"a token id is {size}; the (model|teacher) knows {size}, from 0"
    student = kd.student_from_teacher(teacher, 2)
    for use in (
        lambda: kd.distill(teacher, student, wrong),
        lambda: kd.evaluate(teacher, wrong.validation),
        lambda: kd.hidden_states(teacher, wrong.validation),
        lambda: kd.complete(teacher, padded, "The river [PAD]", 3),
        lambda: kd.latency({"teacher": teacher}, wrong.validation),
        lambda: kd.peak_memory(teacher, wrong.validation),
    ):
        with pytest.raises(kd.InputError, match=said):
            use()


# -- directories that hold no usable model ---------------------------------------------


def write_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def drop_last_layer(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if ".h.3." not in k}
    save_file(weights, file, metadata={"format": "pt"})


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no model")


def become_a_loop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def index_only(folder: Path) -> None:
    """Weights that are said to lie elsewhere, outside of the directory even."""
    file = folder / "model.safetensors"
    shards = {name: "../outside-00001-of-00001.safetensors" for name in load_file(file)}
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "model.safetensors.index.json").write_text(index)
    file.rename(folder / "model-00002-of-00002.safetensors")


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGES = {
    "missing": (shutil.rmtree, "does not exist"),
    "a file": (become_a_file, "is a file"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is cut": (
        lambda d: (d / "config.json").write_text('{"n_layer":'),
        "has no config that can be read",
    ),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config"),
    "a BERT": (
        lambda d: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(d),
        "must be a causal language model",
    ),
    "an unknown family": (lambda d: write_config(d, model_type="gpt99"), "gpt99"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
    "an export": (
        lambda d: (d / "model.safetensors").rename(d / "model.onnx"),
        "model.onnx is an export",
    ),
    "weights are cut": (lambda d: cut_weights(d, -1000), "cannot be loaded"),
    "weights lack a layer": (drop_last_layer, "lacks weights (transformer.h.3."),
    "weights have other shapes": (lambda d: write_config(d, n_embd=64), "transformer."),
    "weights are a web page": (
        lambda d: (d / "model.safetensors").write_text("<html>Sign in</html>"),
        "cannot be loaded",
    ),
    "weights are a pickle": (
        lambda d: (d / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]})),
        "cannot be loaded",
    ),
    "weights are a loop": (lambda d: become_a_loop(d / "model.safetensors"), "cannot be loaded"),
    "an index without its shards": (index_only, "cannot be loaded"),
    "no tokenizer": (drop_tokenizer, "has no tokenizer"),
    "tokenizer is cut": (
        lambda d: (d / "tokenizer.json").write_text('{"version":'),
        "has no tokenizer that can be read",
    ),
}


@pytest.fixture
def said(model_dir, capfd):
    """A function that gives all that was printed or logged since it was last asked."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")  # its own handler knows nothing of capfd
    logger.addHandler(handler)

    def said():
        texts = [text for text in (*capfd.readouterr(), *records) if text]
        records.clear()
        return texts

    said()
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_directory_without_a_usable_model_is_refused_in_one_line(
    damage, expected, model_dir, said
):
    damage(model_dir)
    said()
    with pytest.raises(kd.InputError) as caught:
        kd.load_teacher(model_dir, "cpu")
    message = str(caught.value)
    assert str(model_dir) in message
    assert expected in message
    assert "\n" not in message
    assert len(message) < len(str(model_dir)) + 300
    assert said() == []


class Intruder:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def pickled(model_dir, tmp_path):
    """A model whose only weights are a pickle that makes the file `tmp_path / "broken_in"`."""
    (model_dir / "model.safetensors").unlink()
    content = pickle.dumps(Intruder(tmp_path / "broken_in"))
    (model_dir / "pytorch_model.bin").write_bytes(content)
    return model_dir


def test_pickled_weights_are_refused_and_never_loaded(pickled, tmp_path):
    with pytest.raises(kd.InputError, match="pickled weights.* convert .*save_pretrained"):
        kd.load_teacher(pickled, "cpu")
    assert not (tmp_path / "broken_in").exists()


def test_pickled_weights_are_not_loaded_beside_other_safetensors_either(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").rename(model_dir / "adapter.safetensors")
    torch.save(weights, model_dir / "pytorch_model.bin")  # which `transformers` would read
    with pytest.raises(kd.InputError, match="cannot be loaded"):
        kd.load_teacher(model_dir, "cpu")


@pytest.mark.parametrize("family", ["gpt2", "intruder"])
def test_code_that_lies_in_a_model_directory_is_never_run(family, model_dir, tmp_path):
    intruder = tmp_path / "broken_in"
    (model_dir / "code.py").write_text(f"open({str(intruder)!r}, 'w')\n")
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": "code.T"}
    write_config(model_dir, model_type=family, auto_map=names)
    if family == "gpt2":  # known without that code
        kd.load_teacher(model_dir, "cpu")
    else:
        with pytest.raises(kd.InputError):
            kd.load_teacher(model_dir, "cpu")
    assert not intruder.exists()


@pytest.mark.parametrize("name", ["no-such-model-of-ours", "no-such-owner/no-such-model"])
def test_a_hub_name_without_a_connection_is_refused_after_one_question(name, monkeypatch, said):
    """Where `transformers` by itself tries for half a minute."""
    questions = []

    def no_connection():
        questions.append(name)
        raise ConnectionError("no connection")

    def no_patience(seconds):
        raise TimeoutError(f"waited {seconds} seconds to try again")

    monkeypatch.setattr(models, "get_session", no_connection)
    monkeypatch.setattr("time.sleep", no_patience)
    with pytest.raises(HubError) as caught:
        kd.load_teacher(name)
    expected = f"{name} is no local directory and could not be downloaded from the Hugging Face Hub"
    assert str(caught.value).startswith(expected)
    assert questions == [name]
    assert said() == []


@pytest.mark.parametrize("block_size", [2, 64])
def test_blocks_that_fit_the_positions_are_accepted(block_size, model_dir):
    check_context(model_dir, block_size)


@pytest.mark.parametrize("block_size", [-1, 1, 65])
def test_blocks_that_do_not_fit_the_positions_are_refused(block_size, model_dir):
    with pytest.raises(kd.InputError, match=f"block_size is {block_size}; .* 2 to 64"):
        check_context(model_dir, block_size)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=40), 40),
        (MptConfig(max_seq_len=50), 50),
        (LlamaConfig(max_position_embeddings=60), 60),
        (BloomConfig(), None),
    ],
)
def test_every_family_says_how_long_a_block_may_be(config, expected):
    assert models.max_positions(config) == expected


# -- saving ----------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that is in a directory, hidden files too: contents by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_saved_model_loads_again_with_the_same_logits(teacher, tokenizer, tmp_path):
    kd.save_model(shake(teacher), tokenizer, tmp_path / "saved", {"note.txt": "“naïve”\n"})
    again, its_tokenizer = kd.load_teacher(tmp_path / "saved", "cpu")
    ids = its_tokenizer("The river", return_tensors="pt").input_ids
    assert torch.equal(logits(again, ids), logits(teacher, ids))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "saved" / "note.txt").read_text(encoding="utf-8") == "“naïve”\n"


def test_settings_of_sampling_that_does_not_sample_do_not_stop_saving(teacher, tokenizer, tmp_path):
    teacher.generation_config.update(temperature=0.6, top_p=0.9, do_sample=False, max_length=33)
    kd.save_model(teacher, tokenizer, tmp_path / "saved")
    assert kd.size_on_disk(teacher) > 0
    assert teacher.generation_config.temperature == 0.6
    again, _ = kd.load_teacher(tmp_path / "saved", "cpu")
    settings = again.generation_config
    assert (settings.temperature, settings.max_length, settings.do_sample) == (None, 33, False)
    teacher.generation_config.update(do_sample=True)
    kd.save_model(teacher, tokenizer, tmp_path / "sampling")
    again, _ = kd.load_teacher(tmp_path / "sampling", "cpu")
    assert (again.generation_config.temperature, again.generation_config.top_p) == (0.6, 0.9)


def test_where_python_takes_names_to_be_ascii_text_is_saved_and_a_path_refused(model_dir, tmp_path):
    script = """
import sys, willows_kd as kd
_, source, folder, umlaut = sys.argv
model, tokenizer = kd.load_teacher(source, "cpu")
kd.save_model(model, tokenizer, folder, {"README.md": umlaut + chr(8211)})
try:
    kd.save_model(model, tokenizer, folder + umlaut)
except kd.InputError as error:
    print(error)
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = [str(model_dir), str(tmp_path / "saved"), "Schüler"]
    command = [sys.executable, "-c", script, *given]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert "this locale does not know; set the variable PYTHONUTF8=1" in done.stdout, done.stderr
    assert (tmp_path / "saved" / "README.md").read_text(encoding="utf-8") == "Schüler–"
    assert {path.name for path in tmp_path.iterdir()} == {"saved", model_dir.name}


def test_saving_says_nothing(teacher, tokenizer, tmp_path, said):
    kd.save_model(teacher, tokenizer, tmp_path / "saved")
    assert said() == []


@pytest.mark.parametrize(
    ("old", "overwrite"), [(SETTINGS_FILE, False), ("poem.txt", True)], ids=["ours", "told"]
)
def test_an_earlier_output_is_replaced_as_a_whole(old, overwrite, teacher, tokenizer, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / old).write_text("old")
    (folder / "history.csv").write_text("old")
    kd.save_model(teacher, tokenizer, folder, overwrite=overwrite)
    assert "model.safetensors" in listing(folder)
    assert not {old, "history.csv"} & set(listing(folder))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_save_leaves_an_earlier_output_as_it_was(teacher, tokenizer, tmp_path):
    def save_pretrained(folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    kd.save_model(teacher, tokenizer, tmp_path / "saved", {SETTINGS_FILE: "{}"})
    before = listing(tmp_path)
    with pytest.raises(WriteError, match="No space left"):
        kd.save_model(teacher, SimpleNamespace(save_pretrained=save_pretrained), tmp_path / "saved")
    assert listing(tmp_path) == before


def test_a_link_to_a_directory_is_followed_and_nothing_is_left_beside_it(
    teacher, tokenizer, tmp_path
):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "saved").symlink_to(tmp_path / "large_disk", target_is_directory=True)
    kd.save_model(teacher, tokenizer, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large_disk", "saved"]
    assert (tmp_path / "large_disk" / "model.safetensors").exists()
