"""Loading, making and saving models: what works, and what is refused in one line."""

import copy
import json
import logging
import pickle
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
from willows_kd.models import ASSETS, BUNDLED_TEACHER, check_same_tokenizer, load_tokenizer

# -- what ships ------------------------------------------------------------------------


def test_the_bundled_teacher_is_what_transformers_alone_loads():
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED_TEACHER).float().eval()
    ids = AutoTokenizer.from_pretrained(BUNDLED_TEACHER)("The river", return_tensors="pt").input_ids
    ours, tokenizer = kd.load_teacher(device="cpu")
    assert not any(module.training for module in ours.modules())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ids, tokenizer("The river", return_tensors="pt").input_ids)
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, ours(ids).logits)


def test_what_ships_is_under_36_megabytes():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 36e6


def test_a_bundled_history_has_the_rows_that_distill_returned(tmp_path, monkeypatch):
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "average_loss": None},
        {"step": 2, "loss": 1e-7 / 3, "average_loss": 2 / 3},
    ]
    (tmp_path / "student").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "student" / "history.csv", index=False)
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    assert kd.bundled_history("student") == rows


def test_a_bundled_model_loads_as_any_teacher_with_the_tokenizer_of_all(tokenizer):
    student, its = kd.load_teacher(models.bundled("student"), "cpu")
    assert kd.fingerprint(student) == kd.fingerprint(kd.load_bundled("student", "cpu"))
    assert its.get_vocab() == tokenizer.get_vocab()


# -- modes and places ------------------------------------------------------------------


def test_a_teacher_that_is_partly_on_the_disk_teaches_from_there(model_dir, blocks, tmp_path):
    names = ["transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "lm_head"]
    places = dict.fromkeys(names, "cpu") | {"transformer.h": "disk"}
    whole, _ = kd.load_teacher(model_dir, "cpu")
    teacher = AutoModelForCausalLM.from_pretrained(
        model_dir, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert teacher.transformer.h[0].ln_1.weight.is_meta
    few = replace(blocks, train=blocks.train[:4], validation=blocks.validation[:1])
    ends = [
        kd.distill(its, kd.student_from_teacher(whole, 2), few, kd.DistillConfig(epochs=1))[-1]
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
    few = replace(blocks, train=blocks.train[:4], validation=blocks.validation[:1])
    assert kd.distill(teacher, student, few, kd.DistillConfig(epochs=1))[0]["soft_loss"] > 0
    with pytest.raises(kd.InputError, match="quantized: it can teach, but .* load it unquantised"):
        kd.student_from_teacher(teacher)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_best_device_is_a_gpu_if_there_is_one(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert models.best_device().type == best


@pytest.fixture
def adapted(teacher):
    """A teacher with a LoRA adapter whose weights matter, and the same with it merged."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True
    )
    wrapped = peft.get_peft_model(teacher, settings).eval()
    for name, weight in wrapped.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


def test_a_wrapped_teacher_is_cut_and_saved_merged_teaches_and_stays_wrapped(
    adapted, blocks, ids, tokenizer, tmp_path
):
    wrapped, merged = adapted
    before = logits(wrapped, ids)
    student = kd.student_from_teacher(wrapped, 4)
    kd.save_model(wrapped, tokenizer, tmp_path / "saved")
    for each in (student, kd.load_teacher(tmp_path / "saved", "cpu")[0]):
        torch.testing.assert_close(logits(each, ids), logits(merged, ids), rtol=1e-4, atol=1e-4)
    few = replace(blocks, train=blocks.train[:4], validation=blocks.validation[:1])
    history = kd.distill(wrapped, student, few, kd.DistillConfig(epochs=1, dropout=0))
    assert history[0]["soft_loss"] < 1e-6
    assert torch.equal(logits(wrapped, ids), before)


def test_a_directory_with_an_adapter_is_loaded_merged(model_dir, adapted, ids, tmp_path):
    wrapped, merged = adapted
    folder = tmp_path / "adapter"
    wrapped.peft_config["default"].base_model_name_or_path = str(model_dir)
    wrapped.save_pretrained(folder)
    loaded, tokenizer = kd.load_teacher(folder, "cpu")
    assert len(tokenizer) == loaded.config.vocab_size
    assert all(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded, ids), logits(merged, ids), rtol=1e-4, atol=1e-4)
    assert models.max_positions(models.load_config(folder)) == 64
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(kd.InputError, match="holds no .safetensors weights"):
        kd.load_teacher(folder, "cpu")


def test_an_added_token_is_named(tokenizer, model_dir):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert check_same_tokenizer(tokenizer, load_tokenizer(BUNDLED_TEACHER)) is None
    for pair, whose in (((tokenizer, padded), "student"), ((padded, tokenizer), "teacher")):
        said = check_same_tokenizer(*pair)
        assert said.startswith(f"the {whose}'s tokenizer alone has [PAD]: the loss leaves out")
    with pytest.warns(UserWarning, match=r"the teacher's tokenizer alone has \[PAD\]"):
        kd.load_student(model_dir, padded, "cpu")


def test_a_student_of_another_vocabulary_is_refused(tokenizer, model_dir, swap_words):
    file = model_dir / "tokenizer.json"
    whole = file.read_text(encoding="utf-8")
    swap_words(model_dir)
    with pytest.raises(kd.InputError, match="share a vocabulary: .*different ids"):
        kd.load_student(model_dir, tokenizer, "cpu")
    content = json.loads(whole)
    del content["model"]["vocab"][list(content["model"]["vocab"])[-1]]
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(kd.InputError, match=f"{len(tokenizer)} tokens.* {len(tokenizer) - 1}$"):
        kd.load_student(model_dir, tokenizer, "cpu")


# -- directories that hold no usable model ---------------------------------------------


def write_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_last_layer(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if ".h.3." not in k}
    save_file(weights, file, metadata={"format": "pt"})


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
DAMAGES = {
    "config is cut": (lambda d: halve(d / "config.json"), "cannot be loaded"),
    "a BERT": (
        lambda d: BertConfig(architectures=["BertForMaskedLM"], **SMALL).save_pretrained(d),
        "is a BertForMaskedLM; give a causal language model",
    ),
    "an unknown family": (lambda d: write_config(d, model_type="gpt99"), "gpt99"),
    "weights are cut": (lambda d: halve(d / "model.safetensors"), "cannot be loaded"),
    "weights lack a layer": (drop_last_layer, "lacks weights that fit its config (transformer.h.3"),
    "weights have other shapes": (lambda d: write_config(d, n_embd=64), "(transformer.h.0."),
    "no tokenizer": (drop_tokenizer, "holds no tokenizer"),
    "tokenizer is cut": (lambda d: halve(d / "tokenizer.json"), "cannot be loaded"),
}


@pytest.fixture
def logged():
    """What `transformers` logs."""
    records: list = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_directory_without_a_usable_model_is_refused_in_one_line(
    damage, expected, model_dir, logged
):
    damage(model_dir)
    logged.clear()
    with pytest.raises(kd.InputError) as caught:
        kd.load_teacher(model_dir, "cpu")
    message = str(caught.value)
    assert message.startswith(str(model_dir))
    assert expected in message
    assert "\n" not in message
    assert len(message) < len(str(model_dir)) + 300
    assert logged == []


class Intruder:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickled_weights_are_refused_and_never_loaded(model_dir, tmp_path):
    weights, pickled = model_dir / "model.safetensors", model_dir / "pytorch_model.bin"
    torch.save(load_file(weights), pickled)  # which `transformers` would read
    weights.rename(model_dir / "other.safetensors")
    with pytest.raises(kd.InputError, match="cannot be loaded"):
        kd.load_teacher(model_dir, "cpu")
    (model_dir / "other.safetensors").unlink()
    pickled.write_bytes(pickle.dumps(Intruder(tmp_path / "broken_in")))
    with pytest.raises(kd.InputError, match="pickled ones .* convert .*save_pretrained"):
        kd.load_teacher(model_dir, "cpu")
    assert not (tmp_path / "broken_in").exists()


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


def test_a_hub_name_without_a_connection_is_refused_after_one_question(monkeypatch, logged):
    """Where `transformers` by itself tries for half a minute."""
    questions = []

    def head(url, timeout):
        questions.append(timeout)
        raise ConnectionError("no connection")

    monkeypatch.setattr(models, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits to try again"))
    expected = "model is no local directory and could not be downloaded from the Hugging Face Hub: "
    with pytest.raises(kd.InputError, match=expected):
        kd.load_teacher("no-such-owner/no-such-model")
    assert (questions, logged) == ([5], [])


def test_blocks_are_as_long_as_a_family_has_positions():
    for config, expected in (
        (GPT2Config(n_positions=40), 40),
        (MptConfig(max_seq_len=50), 50),
        (LlamaConfig(max_position_embeddings=60), 60),
        (BloomConfig(), None),
    ):
        assert models.max_positions(config) == expected


# -- saving ----------------------------------------------------------------------------


def test_a_saved_model_loads_again_with_the_same_logits(teacher, tokenizer, tmp_path, logged, ids):
    logged.clear()
    texts = {"note.txt": "“naïve”\n", "README.md": "Sch\udcfcler–"}  # a byte that is no UTF-8
    kd.save_model(shake(teacher), tokenizer, tmp_path / "saved", texts)
    assert logged == []
    again, its_tokenizer = kd.load_teacher(tmp_path / "saved", "cpu")
    assert torch.equal(logits(again, ids), logits(teacher, ids))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    found = [(tmp_path / "saved" / name).read_text(encoding="utf-8") for name in texts]
    assert found == ["“naïve”\n", "Sch?ler–"]


def test_settings_of_sampling_that_does_not_sample_do_not_stop_saving(teacher, tokenizer, tmp_path):
    teacher.generation_config.update(temperature=0.6, top_p=0.9, do_sample=False, max_length=33)
    kd.student_from_teacher(teacher).save_pretrained(tmp_path / "by transformers alone")
    kd.save_model(teacher, tokenizer, tmp_path / "saved")
    assert kd.size_on_disk(teacher) > 0
    assert teacher.generation_config.temperature == 0.6
    settings = kd.load_teacher(tmp_path / "saved", "cpu")[0].generation_config
    assert (settings.temperature, settings.max_length, settings.do_sample) == (None, 33, False)
    teacher.generation_config.update(do_sample=True)
    kd.save_model(teacher, tokenizer, tmp_path / "sampling")
    settings = kd.load_teacher(tmp_path / "sampling", "cpu")[0].generation_config
    assert (settings.temperature, settings.top_p) == (0.6, 0.9)


def test_what_a_directory_holds_is_replaced_as_a_whole_if_told_to_and_else_left_as_it_was(
    teacher, tokenizer, tmp_path
):
    def save_pretrained(folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    folder, broken = tmp_path / "saved", SimpleNamespace(save_pretrained=save_pretrained)
    folder.mkdir()
    (folder / "poem.txt").write_text("old")
    with pytest.raises(kd.InputError, match="saved holds other files; .*add --overwrite"):
        kd.save_model(teacher, tokenizer, folder)
    with pytest.raises(WriteError, match="No space left"):
        kd.save_model(teacher, broken, folder, overwrite=True)
    assert [*tmp_path.rglob("*")] == [folder, folder / "poem.txt"]
    kd.save_model(teacher, tokenizer, folder, overwrite=True)
    assert (folder / "model.safetensors").exists() and not (folder / "poem.txt").exists()
    assert list(tmp_path.iterdir()) == [folder]
