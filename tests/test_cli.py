"""The command line: what it says, what it saves, and how it ends."""

import contextlib
import copy
import functools
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    pipeline,
)

import willows_kd as kd
from willows_kd import evaluation, models
from willows_kd.cli import distill as commands
from willows_kd.cli import main, parse
from willows_kd.errors import InputError

ROOT = Path(__file__).parent.parent
SENTENCE = "the mole and the rat went down to the river in a boat of their own by the wood"
SURPLUS = 5  # blank lines that a reader skips
ROWS = ["teacher", "student before", "student"]
UNTRAINED = "The student is good for up to 32 tokens: later positions are not trained"


def make_text(words: int) -> str:
    """Paragraphs of 40 words, some with more blank lines between them than it takes."""
    draw = random.Random(0)
    paragraphs = [" ".join(draw.choices(SENTENCE.split(), k=40)) + "." for _ in range(words // 40)]
    return "\n\n".join(paragraphs).replace("\n\n", "\n\n" + "\n" * SURPLUS, 1)


def save(folder: Path, tokenizer, **settings) -> Path:
    """A directory with a random GPT-2 and the bundled tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_head": 2, "n_positions": 128}
    uneven = {"n_layer": 4, "initializer_range": 0.2}  # so that student and teacher differ
    config = GPT2Config(**(sizes | uneven | settings))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng(), models.quiet_transformers():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A directory with all that a command line can name, good and bad. No test writes there."""
    place = tmp_path_factory.mktemp("place")
    save(place / "teacher", tokenizer)
    save(place / "narrow", tokenizer, n_layer=1, n_positions=64)
    (place / "text.txt").write_text(make_text(1000), encoding="utf-8")
    (place / "short.txt").write_text("The Mole had been working.\n", encoding="utf-8")
    (place / "folder").mkdir()
    (place / "folder" / "poem.txt").write_text("by me")
    (place / "student").mkdir()
    (place / "student" / "distillation.json").write_text("{}")
    return place


def command_line(place: Path, output: Path, *more: str) -> list[str]:
    """A run of a moment: one epoch of a tiny model on a short text."""
    given = f"--model_dir {place}/teacher --dataset_path {place}/text.txt --output_dir {output} "
    given += "--epochs 1 --block_size 32 --batch_size 8 --device cpu --init spaced"
    return ["distill", *given.split(), *more]


def run(arguments: list[str]) -> int:
    """The exit code of a command line, whoever decides on it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def shorten(monkeypatch) -> None:
    """Make the speeds of the table at the end from a few tokens only."""
    latency = functools.partial(evaluation.latency, new_tokens=2, repeats=1)
    monkeypatch.setattr(evaluation, "latency", latency)


@pytest.fixture
def distil(place, tmp_path, monkeypatch):
    """A function that runs the command line with some options more and gives its exit code."""
    shorten(monkeypatch)
    return lambda *more: run(command_line(place, tmp_path / "student", *more))


@pytest.fixture
def untrained(monkeypatch):
    """No training: the student is as it was made, and there is a checkpoint of it."""

    def distill(*_, checkpoints=None, **__):
        checkpoints.folder.mkdir(exist_ok=True)
        (checkpoints.folder / "step_00000001.safetensors").touch()
        return [{"epoch": 1, "step": 1, "average_loss": 1.0}]

    monkeypatch.setattr(commands, "distill", distill)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "distillation.json").read_text(encoding="utf-8"))


def history_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def good_run(place, tmp_path_factory):
    """A run of two epochs from beginning to end: its exit code, what it said, what it saved."""
    folder = tmp_path_factory.mktemp("good") / "new" / "student"
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        code = main(command_line(place, folder, "--epochs", "2", "--seed", "3"))
    return SimpleNamespace(code=code, out=out.getvalue().splitlines(), folder=folder)


def test_a_good_run_says_what_it_does_in_order(good_run, place):
    averages = history_of(good_run.folder)["average_loss"].dropna()
    expected = [
        f"🔍 Loading teacher model from: {place / 'teacher'}",
        "🔍 Loading student model (half)...",
        f"📚 Loading dataset from: {place / 'text.txt'}",
        "⚙️ Tokenizing dataset...",
        "✂️ Perplexity before training, if layers are chosen so:",
        "   spaced",
        "✂️ The student keeps layers 0,3 of the teacher's 4",
        f"⚠️ {UNTRAINED}",
        "🚀 Starting distillation training...",
        f"⚠️ Skipping empty input batch... ({SURPLUS} empty lines or rows)",
        *(f"✅ Epoch {i}: Average Loss {mean:.4f}" for i, mean in enumerate(averages, 1)),
        f"💾 Saving distilled student model to: {good_run.folder}",
        "✅ Distilled model saved successfully!",
        "📏 Comparing with the teacher...",
        "",
    ]
    assert good_run.code == 0
    for line, begin in zip(good_run.out, expected, strict=False):
        assert re.sub(r"(?<=spaced) [\d.,]+$", "", line) == begin
    assert len(averages) == 2
    end = good_run.out.index("Measured on the held-out test text of text,")
    head, *rows = good_run.out[len(expected) : end - 1]
    assert re.split("  +", head.strip()) == ROWS
    assert len(rows) > 5 and all(len(row) <= 80 for row in rows)
    assert re.fullmatch(r"on \d+ cores, device cpu, threads: \d+\.", good_run.out[end + 1])


def test_an_output_directory_holds_the_model_and_how_it_was_made(good_run, place):
    of_transformers = "model.safetensors config.json generation_config.json tokenizer.json"
    ours = "tokenizer_config.json README.md history.csv distillation.json"
    assert names(good_run.folder) == set(f"{of_transformers} {ours}".split())
    assert names(good_run.folder.parent) == {"student"}
    settings = settings_of(good_run.folder)
    expected = {
        "teacher": str(place / "teacher"),
        "student": "layers 0,3 of the teacher's 4",
        "corpus": str(place / "text.txt"),
        "block_size": 32,
        "epochs": 2,
        "epochs_finished": 2,
        "untrained_positions": UNTRAINED,
        "temperature": 1.0,
        "seed": 3,
    }
    assert {name: settings[name] for name in expected} == expected
    assert set(settings["versions"]) == {"willows_kd", "torch", "transformers"}
    write = pipeline("text-generation", model=str(good_run.folder), device="cpu")
    assert write("The river", max_new_tokens=3)[0]["generated_text"].startswith("The river")
    assert write.model.config.n_layer == 2


def test_the_model_card_holds_the_settings_and_the_table_that_was_shown(good_run):
    card = (good_run.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for name, value in settings_of(good_run.folder).items():
        assert f"- {name}: {value}\n" in card
    table = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("|")]
    assert [name.strip() for name in table[0][1:]] == ROWS
    shown = [line.split() for line in good_run.out]
    for label, *cells in table[2:]:
        assert [*label.split(), *" ".join(cells).split()] in shown


# -- options ---------------------------------------------------------------------------


def test_a_student_made_elsewhere_is_trained_without_the_tokens_that_it_has_not(
    distil, place, tokenizer, tmp_path, capsys
):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    teacher = save(tmp_path / "padded_teacher", padded, n_positions=64)
    given = ["--student", str(place / "narrow"), "--learning_rate", "1e-9"]
    line = command_line(place, tmp_path / "student", *given, "--model_dir", str(teacher))
    assert run([word for word in line if word not in ("--init", "spaced")]) == 0
    said = capsys.readouterr()
    assert f"🔍 Loading student model ({place / 'narrow'})..." in said.out
    assert said.out.count("the teacher's tokenizer alone has [PAD]") == 1
    assert "Warning" not in said.err
    before = load_file(place / "narrow" / "model.safetensors")
    after = load_file(tmp_path / "student" / "model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert settings_of(tmp_path / "student")["student"] == str(place / "narrow")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == len(tokenizer)


def test_options_are_used_and_written_down_and_auto_takes_the_faster_dtype(
    distil, tmp_path, monkeypatch, capsys
):
    real, texts = commands.distill, []

    def timed(teacher, student, blocks, config, **more):
        texts.append((teacher, blocks.train))
        history = real(teacher, student, blocks, config, **more)
        if "checkpoints" not in more:  # it is tried how fast a step is
            for row in history:
                row["seconds"] = {"float32": 2, "bfloat16": 1}[config.dtype] * row["step"] ** 2
        return history

    monkeypatch.setattr(commands, "distill", timed)
    changes = {"temperature": 3.5, "divergence": "jensen_shannon", "batch_size": 4, "seed": 3}
    changes |= {"alpha": 0.25, "block_size": 16, "gradient_checkpointing": True}
    changes["teacher_text"] = True
    options = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    options = [word for word in options if word != "True"]
    assert distil(*options, "--dtype", "auto") == 0
    said = capsys.readouterr().out
    assert "2.00 times float32's speed here: using bfloat16" in said
    assert "The teacher is writing" in said
    teacher, text = texts[-1]  # which goes on as the teacher goes on
    assert torch.equal(text, kd.make_transfer_set(teacher, text, seed=3))
    settings = settings_of(tmp_path / "student")
    assert {name: settings[name] for name in changes} == changes
    assert settings["dtype"] == "bfloat16"
    history = history_of(tmp_path / "student")
    assert history["hard_loss"][0] > 0
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_blocks_are_as_long_as_the_shorter_models_positions(place, tokenizer, tmp_path):
    long = str(save(tmp_path / "long", tokenizer, n_layer=1, n_positions=4096))
    assert commands.block_length(None, long) == 1024  # and no longer unless asked for
    assert commands.block_length(2048, long) == 2048
    assert commands.block_length(None, long, str(place / "narrow")) == 64


def test_a_table_of_positions_is_found_by_looking_at_the_modules():
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    opt = OPTConfig(**tiny, max_position_embeddings=40, ffn_dim=16, word_embed_proj_dim=16)
    llama = LlamaConfig(**tiny, max_position_embeddings=40, intermediate_size=16)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=40, n_positions=40)
    said = "The student is good for up to 8 tokens: later positions are not trained"
    for model in (GPT2LMHeadModel(gpt2), OPTForCausalLM(opt)):
        assert commands.untrained_positions(model, 8) == said
        assert commands.untrained_positions(model, 40) == ""
    assert commands.untrained_positions(LlamaForCausalLM(llama), 8) == ""  # rotary


def test_the_best_start_among_the_affordable_is_taken(make_gpt2, blocks, capsys):
    teacher = make_gpt2(initializer_range=0.2)
    kept = commands.layers_of_student(SimpleNamespace(layers=2, init=None), teacher, blocks.train)
    table = kd.choose_layers(teacher, 2, blocks.train[::3])
    best, *others = table.drop("greedy").index  # which would read more than an epoch's blocks
    assert kept == table["layers"][best]
    assert re.findall(r"([a-z]+) [\d.]+", capsys.readouterr().out) == [best, *others]


def test_a_teacher_with_gpt2s_vocabulary_asks_for_distilgpt2(place, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(commands, "GPT2_VOCABULARY", 4096)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    capfd.readouterr()
    assert run(["distill", "--model_dir", str(place / "teacher")]) == 2
    said = "error: distilgpt2 is no local directory [^\n]*--student half [^\n]*\n"
    assert re.fullmatch(said, capfd.readouterr().err)


def test_without_options_it_is_the_bundled_teacher_and_the_book_even_without_emoji(
    place, tmp_path, monkeypatch
):
    def pack(corpus, tokenizer, block_size):
        raise InputError(f"{corpus.provenance}, {block_size}")

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(commands, "pack", pack)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WILLOWS_KD_CORPUS", str(place / "text.txt"))
    assert run(["distill"]) == 2
    said = out.buffer.getvalue().decode()
    assert " Loading teacher model from: the bundled teacher\n" in said
    assert f" Loading dataset from: {place / 'text.txt'} (WILLOWS_KD_CORPUS)\n" in said
    assert f"error: {place / 'text.txt'} (WILLOWS_KD_CORPUS), 256\n" in said


def test_the_help_names_every_option_and_exit_code_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    needed = "--to gguf --output_dir b"
    for command in ("distill", "generate m", "compare m", f"export m {needed}"):
        name = command.split()[0]
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in vars(parse(command.split())):
            assert option in ("command", "model_dir") or f"--{option}" in shown
        assert re.findall(r"^  (\d+) ", shown, re.MULTILINE) == ["0", "1", "2", "3", "130"]
        assert f"example:\n  willows-kd {name} " in shown
        assert max(map(len, shown.splitlines())) <= 80


def test_options_may_be_spelt_with_dashes():
    options = parse(["distill", "--model-dir", "a-b", "--output-dir=c-d", "--init=0,3"])
    assert (options.model_dir, options.output_dir, options.init) == ("a-b", "c-d", [0, 3])


# -- how a run ends --------------------------------------------------------------------


def test_debug_shows_the_traceback_of_an_error(capsys):
    assert run(["distill", "--epochs", "0", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: epochs is 0; it must be a whole number, at least 1"


def test_what_is_in_the_output_directory_is_replaced_with_overwrite(
    distil, untrained, place, tmp_path
):
    student, others = tmp_path / "student", ".students.12345678.partial"
    # a run was killed between two renames, and another one is writing
    shutil.copytree(place / "folder", tmp_path / ".student.12345678.partial" / "old")
    (tmp_path / others).mkdir()
    assert distil() == 2
    assert (names(tmp_path), names(student)) == ({"student", others}, {"poem.txt"})
    assert distil("--overwrite") == 0
    assert "poem.txt" not in names(student) and "model.safetensors" in names(student)


def test_a_closed_pipe_ends_a_run_without_a_traceback(distil, tmp_path, capfd, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return sink.fileno()

    with (tmp_path / "sink").open("w") as sink:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert distil() == 1
    assert capfd.readouterr().err == ""


UNCOMPARED = ": the student is trained and saved, but was not compared\n"
CHECKPOINT = {"student.checkpoints"}  # from which --resume saves it
UNSAVABLE = "error: a GPT2LMHeadModel like this cannot be saved: "
EXITS = [  # what fails, how, the exit code, the last line, and what is left
    ((commands, "compare"), ValueError("a\nb"), 1, f"a b{UNCOMPARED}", {"student"}),
    ((models, "load_tokenizer"), InputError("no"), 2, "error: no\n", set()),
    ((GPT2Config, "save_pretrained"), KeyError("types"), 2, f"{UNSAVABLE}'types'\n", set()),
    ((commands, "compare"), OSError(28, "full"), 3, f"[Errno 28] full{UNCOMPARED}", {"student"}),
    ((models, "write_weights"), OSError(28, "full"), 3, "cannot be written: full\n", CHECKPOINT),
    ((commands, "compare"), KeyboardInterrupt(), 130, UNCOMPARED, {"student"}),
    ((models, "load_teacher"), KeyboardInterrupt(), 130, "\nstopped: nothing was saved\n", set()),
]


@pytest.mark.parametrize(("where", "failure", "code", "said", "left"), EXITS)
def test_each_way_to_end_has_its_exit_code_and_one_line(
    where, failure, code, said, left, distil, untrained, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(*where, fail)
    assert distil() == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert (shown.out if left == {"student"} else shown.err).endswith(said)
    assert names(tmp_path) == left
    if left == {"student"}:
        assert load_file(tmp_path / "student" / "model.safetensors")


# -- Ctrl-C, and going on --------------------------------------------------------------


@pytest.fixture
def ends(monkeypatch):
    """The student's weights at the end of each epoch; `ends.stop` presses Ctrl-C after a row."""
    # even if a shell has started the tests with it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = SimpleNamespace(weights={}, stop=lambda row: False)
    real = commands.distill

    def watched(teacher, student, blocks, config, on_step, **more):

        def step(row):
            if "average_loss" in row:
                weights = student.state_dict().items()
                ends.weights[row["epoch"]] = {k: v.clone() for k, v in weights}
            on_step(row)
            if ends.stop(row):
                signal.raise_signal(signal.SIGINT)

        return real(teacher, student, blocks, config, on_step=step, **more)

    monkeypatch.setattr(commands, "distill", watched)
    yield ends
    signal.signal(signal.SIGINT, before)


def test_a_run_stopped_in_its_first_epoch_leaves_a_checkpoint_not_thrown_away_unasked(
    distil, ends, tmp_path, capsys
):
    ends.stop = lambda row: row["step"] == 2
    assert distil() == 130
    said = capsys.readouterr()
    assert "Saving" not in said.out
    assert "stopped: nothing was saved; add --resume to go on from where it stopped" in said.err
    left = {"student.checkpoints": {"lock", "step_00000002.safetensors"}}
    refused = {
        (): "student.checkpoints holds a run that was stopped; --resume continues it, --overwrite ",
        ("--resume", "--temperature", "3"): "temperature was 1.0, is 3.0",
    }
    for options, why in refused.items():
        assert distil(*options) == 2
        assert why in capsys.readouterr().err
        assert {path.name: names(path) for path in tmp_path.iterdir()} == left
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes").touch()
    assert distil("--resume") == 2
    assert "holds other files" in capsys.readouterr().err
    ends.stop = lambda row: False
    assert distil("--overwrite", "--temperature", "3") == 0
    assert names(tmp_path) == {"student"}


def test_a_run_stopped_later_saves_the_student_of_the_last_finished_epoch(
    distil, ends, tmp_path, capsys
):
    """Stopped in the middle of the second of two epochs, and resumed and stopped at its end."""
    folder = tmp_path / "student"
    in_second = lambda row: row["epoch"] == 2  # noqa: E731
    at_end = lambda row: row["epoch"] == 2 and "average_loss" in row  # noqa: E731
    for finished, ends.stop, code in ((1, in_second, 130), (2, at_end, 0)):
        assert distil("--epochs", "2", "--checkpoint_minutes", "0", "--resume") == code
        said = capsys.readouterr().out
        assert "✅ Distilled model saved successfully!" in said
        stopped = "stopped: the student is that of epoch 1 of 2; add --resume"
        assert (stopped in said) == (finished == 1)
        settings = settings_of(folder)
        assert (settings["epochs_finished"], settings["epochs"]) == (finished, 2)
        assert history_of(folder)["epoch"].max() == finished
        saved = load_file(folder / "model.safetensors")
        assert saved and all(torch.equal(saved[n], ends.weights[finished][n]) for n in saved)
    assert names(tmp_path) == {"student"}


def process(*arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, encoding="utf-8", **more
    )


def test_help_version_and_bad_values_need_nothing_that_is_slow_to_import():
    code = """
import sys
from willows_kd.cli import main
for line in ("", "--version", "distill --help", "distill --bogus", "distill --epochs 0"):
    try:
        main(line.split())
    except SystemExit:
        pass
slow = {"torch", "transformers", "datasets", "pandas", "numpy"} & set(sys.modules)
sys.exit(f"imported: {slow}" if slow else 0)
"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("usage: "), done.stderr.count("error: ")) == (2, 2)
    assert f"\nwillows-kd {kd.__version__}\n" in done.stdout


@pytest.mark.parametrize(
    "script", [[ROOT / "model_distillation.py"], ["-m", "willows_kd", "distill"]]
)
def test_the_script_at_the_root_and_the_package_are_the_command(script, tmp_path):
    done = process(*script, "--epochs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: epochs is 0; it must be a whole number, at least 1\n"
