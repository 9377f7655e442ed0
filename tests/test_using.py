"""The commands for trained models: what they print and save."""

import re
from types import SimpleNamespace

import pytest
from test_cli import make_text, run, save, shorten

import willows_kd as kd
from willows_kd.cli.others import names_of


@pytest.fixture(scope="module")
def place(tokenizer, swap_words, tmp_path_factory):
    """Models with one vocabulary, one with another, and a text."""
    place = tmp_path_factory.mktemp("place")
    save(place / "large", tokenizer)
    save(place / "small", tokenizer, n_layer=1)
    swap_words(save(place / "stranger", tokenizer, n_layer=1))
    (place / "text.txt").write_text(make_text(1000), encoding="utf-8")
    return place


# -- generate --------------------------------------------------------------------------


def test_generate_prints_what_complete_returns(place, tokenizer, capsys):
    model, prompt = str(place / "small"), "The river"
    options = {"max_new_tokens": 7, "temperature": 1.5, "seed": 3, "top_k": 20}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert run(["generate", model, "--prompt", prompt, *words]) == 0
    wanted = kd.complete(kd.load_teacher(model)[0], tokenizer, prompt, **options)
    assert capsys.readouterr() == (f"{wanted}\n", "")


def test_generate_prints_words_as_they_come(place, tokenizer):
    seen = []
    streamer = SimpleNamespace(put=seen.append, end=lambda: seen.append("end"))
    model = kd.load_teacher(str(place / "small"))[0]
    kd.complete(model, tokenizer, "The river", 5, streamer=streamer)
    prompt, *words, end = seen
    assert prompt.tolist() == [tokenizer("The river")["input_ids"]]
    assert (len(words), end) == (5, "end")


# -- compare ---------------------------------------------------------------------------


@pytest.fixture
def compare(place, monkeypatch):
    """A function that compares models of `place` from a few tokens."""
    shorten(monkeypatch)
    usual = ["--dataset_path", str(place / "text.txt"), "--block_size", "32", "--device", "cpu"]
    return lambda *names: run(["compare", *(str(place / name) for name in names), *usual])


def test_compare_prints_the_table(compare, capsys):
    assert compare("large", "small") == 0
    said = capsys.readouterr()
    head, *lines = said.out.strip().split("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in [head, *lines])
    rows = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert head.split() == ["large", "small"]
    from_itself, from_large = rows["KL from the teacher (nats per token)"].split()
    assert from_itself == "0.000" and float(from_large) > 0
    assert "\nMeasured on the held-out test text of text,\non " in said.out
    assert "Traceback" not in said.err


def test_models_of_two_vocabularies_are_not_compared(compare, capsys):
    assert compare("large", "stranger") == 2
    assert "error: teacher and student must share a vocabulary" in capsys.readouterr().err


def test_models_of_one_name_are_called_by_their_paths():
    assert names_of(["a/large", "b/large"]) == ["a/large", "b/large"]
    assert names_of(["a/large", "b/small"]) == ["large", "small"]


# -- export ----------------------------------------------------------------------------


def test_export_says_what_it_wrote(place, tmp_path, capsys):
    pytest.importorskip("gguf", reason="no gguf")
    output = tmp_path / "out"
    arguments = ["export", str(place / "small"), "--to", "gguf", "--output_dir", str(output)]
    for _ in range(2):
        assert run([*arguments, "--overwrite"]) == 0
        assert re.fullmatch(rf"💾 {output}/model.gguf: \d\.\d MB\n", capsys.readouterr().out)


def test_an_export_to_onnx_is_measured_and_goes_on_with_a_prompt(place, tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"no {package}")
    output = str(tmp_path / "out")
    assert run(["export", str(place / "small"), "--to", "onnx", "--output_dir", output]) == 0
    said = r"Compared with PyTorch, the KL divergence is \S+ nats per token\n$"
    assert re.search(said, capsys.readouterr().out)
    greedy = ["--prompt", "The river", "--max_new_tokens", "6", "--temperature", "0"]
    texts = []
    for model in (str(place / "small"), output):
        assert run(["generate", model, *greedy]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
