"""Exported students: the same model in another runtime, or one line that says why not."""

import functools

import pytest
import torch
from families import random_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import willows_kd as kd
from willows_kd.compress import export
from willows_kd.models import quiet_transformers

for package in ("onnx", "onnxruntime", "onnxscript", "gguf"):
    pytest.importorskip(package, reason='`pip install -e ".[export]"`')

PROMPT = "The river was wide, and"


@pytest.fixture(scope="module")
def student(make_gpt2):
    """A tiny student with opinions: its weights are spread more widely than at a usual start."""
    return make_gpt2(2, initializer_range=0.15)


@pytest.fixture(scope="module")
def exported(student, tokenizer, tmp_path_factory):
    """What `export_model` returned for a format, each made once."""
    folder = tmp_path_factory.mktemp("exports")
    return functools.cache(lambda to: kd.export_model(student, tokenizer, folder / to, to))


# -- ONNX ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx(exported):
    """The bundled student in onnxruntime."""
    return kd.load_onnx(exported("onnx")["file"].parent)[0]


@torch.no_grad()
@pytest.mark.parametrize(("texts", "cached", "new"), [(3, 0, 7), (1, 9, 1), (2, 4, 5)])
def test_the_logits_are_pytorchs_for_any_number_of_texts_and_tokens(
    texts, cached, new, student, onnx
):
    ids = torch.arange(texts * (cached + new)).view(texts, -1) * 7919 % 4096
    cache = onnx(ids[:, :cached])[export.CACHE] if cached else None
    found = onnx(ids[:, cached:], **{export.CACHE: cache}).logits
    torch.testing.assert_close(found, student(ids).logits[:, cached:], rtol=0, atol=1e-3)


def test_the_greedy_text_is_the_same_and_read_once(student, onnx, tokenizer, monkeypatch):
    read, forward = [], onnx.forward

    def count(input_ids, **more):
        read.append(input_ids.shape[1])
        return forward(input_ids, **more)

    monkeypatch.setattr(onnx, "forward", count)
    wanted = kd.complete(student, tokenizer, PROMPT, 20, temperature=0)
    assert kd.complete(onnx, tokenizer, PROMPT, 20, temperature=0) == wanted
    assert read == [len(tokenizer(PROMPT)["input_ids"])] + 19 * [1]  # with the cache


def test_an_export_is_measured_as_any_model(student, onnx, exported, blocks, tokenizer):
    wanted = kd.evaluate(student, blocks.test, tokenizer)
    found = kd.evaluate(onnx, blocks.test, tokenizer, student)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert found["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert kd.latency({"onnx": onnx}, blocks.test[:1], 2, 1)["onnx"]["per_token"] > 0
    assert b"site-packages" not in exported("onnx")["file"].read_bytes()  # nothing of the machine


def test_texts_of_different_lengths_are_refused(onnx):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(kd.InputError, match="one length"):
        onnx(ids, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))


def test_int8_quantizes_every_matrix_and_is_measured(student, exported, tokenizer):
    import onnx as library

    found, whole = exported("onnx-int8"), exported("onnx")
    operations = [node.op_type for node in library.load(found["file"]).graph.node]
    # attention's input and output, the two of the perceptron, and the head
    assert operations.count("MatMulInteger") == 4 * student.config.n_layer + 1
    assert found["int8_share"] > 0.99
    assert found["megabytes"] < 0.5 * whole["megabytes"]
    assert whole["kl"] < 1e-6 < found["kl"] < 0.1
    model = kd.load_onnx(found["file"].parent)[0]
    text = kd.sample_continuations(student, torch.tensor([[5], [9]]), 31, seed=1)
    assert 1e-6 < kd.evaluate(model, text, tokenizer, student)["kl_to_teacher"] < 0.1


@pytest.mark.slow
def test_a_model_that_is_not_pytorchs_is_not_kept(make_gpt2, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_onnx", lambda folder: (make_gpt2(1, seed=1), None))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(kd.InputError, match="its logits differ by .* from PyTorch's"):
        kd.export_model(make_gpt2(1), tokenizer, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_other_families_are_exported(family, tokenizer, tmp_path):
    found = kd.export_model(random_teacher(family), tokenizer, tmp_path / "out")
    assert found["difference"] < export.TOLERANCE


def test_what_is_no_export_is_not_read(tmp_path, exported):
    with pytest.raises(kd.InputError, match="holds no model.onnx"):
        kd.load_onnx(tmp_path)
    for file in exported("onnx")["file"].parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(kd.InputError, match=r"cannot be loaded: [^\n]+$"):
        kd.load_onnx(tmp_path)


# -- GGUF ------------------------------------------------------------------------------


@torch.no_grad()
def test_gguf_is_the_same_model_to_the_reader_of_transformers(student, exported, tokenizer):
    file = exported("gguf")["file"]
    with quiet_transformers():
        config = GPT2Config.from_dict(student.config.to_dict())
        read = {"gguf_file": file.name, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(file.parent, config=config, **read)
        theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "It's 12 o'clock!  Über\n\nthe hills.<|endoftext|>Who?"
    ids = tokenizer(text)["input_ids"]
    assert theirs(text)["input_ids"] == ids
    ids = torch.tensor([ids])
    torch.testing.assert_close(model.eval()(ids).logits, student(ids).logits)


def test_gguf_says_what_llama_cpp_asks_for(make_gpt2, tokenizer, tmp_path):
    import gguf

    padded = make_gpt2(2, vocab_size=len(tokenizer) + 8).train()
    before = kd.fingerprint(padded)
    file = kd.export_model(padded, tokenizer, tmp_path / "out", "gguf")["file"]
    fields = gguf.GGUFReader(file).fields
    expected = {
        "general.architecture": "gpt2",
        "gpt2.block_count": 2,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }
    assert {name: fields[name].contents() for name in expected} == expected
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert kinds[-8:] == 8 * [gguf.TokenType.UNUSED]
    assert set(kinds[1:-8]) == {gguf.TokenType.NORMAL}
    assert len(set(fields["tokenizer.ggml.tokens"].contents())) == padded.config.vocab_size
    assert padded.training and kd.fingerprint(padded) == before


# -- what is refused -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_exported_is_refused(make_gpt2, teacher, tokenizer, tmp_path):
    other = kd.models.load_tokenizer(kd.models.BUNDLED_TEACHER)
    other.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    relu = make_gpt2(1, activation_function="relu")
    more = "this mamba model cannot be exported to onnx: its cache holds more than keys and values"
    for said, to, model, its_tokenizer in (
        (more, "onnx", random_teacher("mamba"), tokenizer),
        ("activation_function is 'relu'; llama", "gguf", relu, tokenizer),
        ("this llama model .* to gguf: only GPT-2s", "gguf", random_teacher("llama"), tokenizer),
        ("does not split text as GPT-2's does", "gguf", teacher, other),
        ("it must be one of onnx, onnx-int8, gguf", "ONNX", teacher, tokenizer),
        ("give the model's own", "onnx", teacher, None),
    ):
        with pytest.raises(kd.InputError, match=said):
            kd.export_model(model, its_tokenizer, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []
