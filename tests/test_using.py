"""The commands for trained models: what they print and save."""

import errno
import functools
import os
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from test_cli import make_text, run, save

import willows_kd as kd
from willows_kd import evaluation, files


@pytest.fixture(scope="module")
def place(tokenizer, swap_words, tmp_path_factory):
    """Models with one vocabulary, one with its own, and a text."""
    place = tmp_path_factory.mktemp("place")
    save(place / "large", tokenizer)
    save(place / "small", tokenizer, n_layer=1)
    swap_words(save(place / "stranger", tokenizer, n_layer=1))
    save(place / "elsewhere" / "large", tokenizer, n_layer=1)
    (place / "text.txt").write_text(make_text(1000), encoding="utf-8")
    return place


@pytest.fixture
def compare(place, tmp_path, monkeypatch):
    """A function that compares models of `place` from a few tokens, with more options."""
    short, brief = evaluation.complete, evaluation.latency
    monkeypatch.setattr(
        evaluation, "complete", lambda m, t, prompt, *_, **__: short(m, t, prompt, 3)
    )
    monkeypatch.setattr(evaluation, "latency", functools.partial(brief, new_tokens=2, repeats=1))
    usual = ["--dataset_path", str(place / "text.txt"), "--block_size", "32", "--device", "cpu"]
    return lambda names, *more: run(
        ["compare", *(str(place / name) for name in names.split()), *usual, *more]
    )


def table_in(said: str) -> dict[str, list[str]]:
    """The rows of a printed table, which ends at an empty line."""
    head, *lines = said.split("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in [head, *lines])
    rows = (re.split("  +", line, maxsplit=1) for line in lines)
    return {"": head.split()} | {name: cells.split() for name, cells in rows}


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


def test_compare_prints_and_saves_the_table(compare, tmp_path, capsys):
    output = tmp_path / "new" / "comparison"
    assert compare("large small", "--output_dir", str(output)) == 0
    said = capsys.readouterr()
    rows = table_in(said.out)
    assert rows[""] == ["large", "small"]
    assert rows["KL from the teacher (nats per token)"][0] == "0.000"
    assert float(rows["KL from the teacher (nats per token)"][1]) > 0
    assert "\nMeasured on the held-out test text of text,\nwith " in said.out
    assert "Traceback" not in said.err
    assert {path.name for path in output.iterdir()} == {"comparison.csv", "tradeoff.png"}
    table = pd.read_csv(output / "comparison.csv", index_col="model")
    assert list(table.index) == ["large", "small"]
    assert evaluation.number(table.loc["small", "perplexity"]) == rows["perplexity"][1]
    assert (output / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_several_vocabularies_are_compared_by_bytes(compare, tmp_path, capsys, place):
    output = tmp_path / "comparison"
    assert compare("large stranger small", "--output_dir", str(output)) == 0
    said = capsys.readouterr().out
    rows = table_in(said)
    assert rows[""] == ["large", "stranger", "small"]
    assert "bits per byte" in rows
    assert not {"perplexity", "KL from the teacher (nats per token)"} & set(rows)
    assert "tokens differ" in said
    table = pd.read_csv(output / "comparison.csv", index_col="model")
    model, tokenizer = kd.load_teacher(str(place / "stranger"))
    corpus = kd.load_corpus(place / "text.txt")
    blocks = kd.pack(corpus, tokenizer, 32)
    wanted = kd.evaluate(model, blocks.test, tokenizer)["bits_per_byte"]
    assert table.loc["stranger", "bits_per_byte"] == pytest.approx(wanted)


def test_models_of_one_name_are_called_by_their_paths(compare, place, capsys):
    assert compare("large elsewhere/large") == 0
    said = capsys.readouterr().out
    assert str(place / "large") in said and str(place / "elsewhere" / "large") in said


# -- export ----------------------------------------------------------------------------


def test_export_says_what_it_wrote(place, tmp_path, capsys):
    pytest.importorskip("gguf", reason="no gguf")
    output = tmp_path / "out"
    arguments = ["export", str(place / "small"), "--to", "gguf", "--output_dir", str(output)]
    assert run(arguments) == 0
    assert re.fullmatch(rf"💾 {output}/model.gguf: \d\.\d MB\n", capsys.readouterr().out)
    assert run(arguments) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0


def test_an_export_to_onnx_is_measured_and_goes_on_with_a_prompt(
    place, tmp_path, capsys, tokenizer
):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"no {package}")
    output = str(tmp_path / "out")
    assert run(["export", str(place / "small"), "--to", "onnx", "--output_dir", output]) == 0
    assert "Compared with PyTorch: a logit differs by at most " in capsys.readouterr().out
    greedy = ["--prompt", "The river", "--max_new_tokens", "6", "--temperature", "0"]
    assert run(["generate", str(place / "small"), *greedy]) == 0
    wanted = capsys.readouterr().out
    assert run(["generate", output, *greedy]) == 0
    assert capsys.readouterr().out == wanted


def test_a_full_disk_is_exit_code_3_and_leaves_nothing(compare, tmp_path, capsys, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush_to_disk", full)
    output = tmp_path / "new" / "comparison"
    assert compare("large small", "--output_dir", str(output)) == 3
    assert capsys.readouterr().err == f"error: {output} cannot be written: {os.strerror(28)}\n"
    assert not output.parent.exists()
