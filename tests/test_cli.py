"""The command line: what it says, what it saves, and what it refuses."""

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
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    pipeline,
)

import willows_kd
from willows_kd import evaluation, models
from willows_kd.cli import distill as commands
from willows_kd.cli import main, parse
from willows_kd.errors import InputError, WriteError

ROOT = Path(__file__).parent.parent
SENTENCE = "the mole and the rat went down to the river in a boat of their own by the wood"
SURPLUS = 5  # blank lines that a reader skips
ROWS = ["teacher", "student before", "student"]
UNTRAINED = (
    "Positions 33 to 128 of the student are not trained: "
    "it is only good for texts of up to 32 tokens"
)


def make_text(words: int, seed: int = 0) -> str:
    """Paragraphs of 40 words, some with more blank lines between them than it takes."""
    draw = random.Random(seed)
    paragraphs = [" ".join(draw.choices(SENTENCE.split(), k=40)) + "." for _ in range(words // 40)]
    return "\n\n".join(paragraphs).replace("\n\n", "\n\n" + "\n" * SURPLUS, 1)


def save(folder: Path, tokenizer, model_class=GPT2LMHeadModel, config=None, **settings) -> Path:
    """A directory with a random model and the bundled tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_head": 2, "n_positions": 128}
    uneven = {"n_layer": 4, "initializer_range": 0.2}  # so that student and teacher differ
    config = config or GPT2Config(**(sizes | uneven | settings))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng(), models.quiet_transformers():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A directory with all that a command line can name, good and bad. No test writes there."""
    place = tmp_path_factory.mktemp("place")
    save(place / "teacher", tokenizer)
    save(place / "narrow", tokenizer, n_layer=1, n_positions=64)
    larger = models.load_tokenizer(models.BUNDLED_TEACHER)
    larger.add_tokens(["<extra>"])
    save(place / "stranger", larger, n_layer=1)
    (place / "text.txt").write_text(make_text(1000), encoding="utf-8")
    (place / "short.txt").write_text("The Mole had been working.\n", encoding="utf-8")
    (place / "folder").mkdir()
    (place / "folder" / "poem.txt").write_text("by me")
    (place / "student").mkdir()
    made = '{"temperature": 2.0, "epochs_finished": 3}'
    (place / "student" / "distillation.json").write_text(made)
    return place


def command_line(place: Path, output: Path, *more: str, without: str = "") -> list[str]:
    """A run of a moment: one epoch of a tiny model on a short text."""
    usual = {
        "model_dir": place / "teacher",
        "dataset_path": place / "text.txt",
        "output_dir": output,
        "epochs": 1,
        "block_size": 32,
        "batch_size": 8,
        "device": "cpu",
    }
    usual.pop(without, None)
    return ["distill", *(word for k, v in usual.items() for word in (f"--{k}", str(v))), *more]


def run(arguments: list[str]) -> int:
    """The exit code of a command line, whoever decides on it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def quick(monkeypatch):
    """The table at the end from a few tokens only."""
    short, brief = evaluation.complete, evaluation.latency
    monkeypatch.setattr(
        evaluation, "complete", lambda m, t, prompt, *_, **__: short(m, t, prompt, 3)
    )
    monkeypatch.setattr(evaluation, "latency", functools.partial(brief, new_tokens=2, repeats=1))


@pytest.fixture
def distil(quick, place, tmp_path):
    """A function that runs the command line with some options more and gives its exit code."""
    return lambda *more: run(command_line(place, tmp_path / "student", *more))


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "distillation.json").read_text(encoding="utf-8"))


def history_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def listing(folder: Path) -> dict[str, int]:
    """All that is in a directory, hidden files too: sizes by relative path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


# -- a good run ------------------------------------------------------------------------

GOOD = ["--epochs", "2", "--seed", "3", "--init", "spaced"]


@pytest.fixture(scope="module")
def good_run(place, tmp_path_factory):
    """A run of two epochs from beginning to end: its exit code, what it said, what it saved."""
    folder = tmp_path_factory.mktemp("good") / "new" / "student"
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "UNEVEN", float("inf"))  # however busy the machine is
        code = main(command_line(place, folder, *GOOD))
    return SimpleNamespace(code=code, out=out.getvalue().splitlines(), folder=folder)


def test_a_good_run_says_what_it_does_in_order(good_run, place):
    averages = history_of(good_run.folder)["average_loss"].dropna()
    expected = [
        f"🔍 Loading teacher model from: {place / 'teacher'}",
        "🔍 Loading student model (half)...",
        f"📚 Loading dataset from: {place / 'text.txt'}",
        "⚙️ Tokenizing dataset...",
        "✂️ The student keeps layers 0,3 of the teacher's 4 (spaced)",
        "   Its perplexity before training:",
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
        assert re.sub(r"(?<=training:) [\d.,]+$", "", line) == begin
    assert len(averages) == 2
    head, *rows = good_run.out[len(expected) : -3]
    assert re.split("  +", head.strip()) == ROWS
    assert len(rows) > 5 and all(len(row) <= 80 for row in rows)
    assert good_run.out[-3:-1] == ["", "Measured on the held-out test text of text,"]
    assert good_run.out[-1].startswith("with ")


def test_an_output_directory_holds_the_model_and_how_it_was_made(good_run, place):
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "history.csv",
        "distillation.json",
    } == set(listing(good_run.folder))
    assert [path.name for path in good_run.folder.parent.iterdir()] == ["student"]
    settings = settings_of(good_run.folder)
    expected = {
        "teacher": str(place / "teacher"),
        "student": "layers 0,3 of the teacher's 4",
        "corpus": str(place / "text.txt"),
        "block_size": 32,
        "epochs": 2,
        "epochs_finished": 2,
        "untrained_positions": UNTRAINED,
        "batch_size": 8,
        "temperature": 1.0,
        "alpha": 0.0,
        "divergence": "forward_kl",
        "seed": 3,
    }
    assert {name: settings[name] for name in expected} == expected
    assert set(settings["versions"]) == {"willows_kd", "torch", "transformers"}


def test_the_model_card_holds_the_settings_and_the_table_that_was_shown(good_run):
    card = (good_run.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "- temperature: 1.0\n" in card
    assert f"{UNTRAINED}.\n" in card
    assert ", 2 epochs on " in card
    table = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("|")]
    assert [name.strip() for name in table[0][1:]] == ROWS
    lines = (re.split("  +", line.strip(), maxsplit=1) for line in good_run.out)
    shown = dict(line for line in lines if len(line) == 2)
    for label, *cells in table[2:]:
        assert shown[label.strip()].split() == " ".join(cells).split()


def test_speeds_of_one_network_that_differ_by_more_than_a_quarter_are_uneven():
    speeds = pd.DataFrame({"forward_ms": [100.0, 124.0], "token_ms": [12.0, 10.0]})
    assert not commands.is_uneven(speeds)
    assert commands.is_uneven(speeds.assign(token_ms=[12.6, 10.0]))


def test_a_saved_student_loads_and_writes_with_transformers_alone(good_run):
    assert AutoModelForCausalLM.from_pretrained(good_run.folder).config.n_layer == 2
    write = pipeline("text-generation", model=str(good_run.folder), device="cpu")
    assert write("The river", max_new_tokens=3)[0]["generated_text"].startswith("The river")


# -- options ---------------------------------------------------------------------------


def test_a_student_made_elsewhere_is_trained_as_it_is(distil, place, tmp_path, capsys):
    assert distil("--student", str(place / "narrow"), "--learning_rate", "1e-9") == 0
    assert f"🔍 Loading student model ({place / 'narrow'})..." in capsys.readouterr().out
    before = load_file(place / "narrow" / "model.safetensors")
    after = load_file(tmp_path / "student" / "model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert settings_of(tmp_path / "student")["student"] == str(place / "narrow")


def test_a_token_that_only_the_teacher_has_is_not_saved_with_the_student(
    distil, place, tokenizer, tmp_path, capsys
):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    teacher = save(tmp_path / "padded_teacher", padded, n_positions=64)
    assert distil("--model_dir", str(teacher), "--student", str(place / "narrow")) == 0
    said = capsys.readouterr()
    assert said.out.count("the teacher's tokenizer alone has [PAD]") == 1
    assert "Warning" not in said.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert len(own) == loaded.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("written", ["--teacher_text", "--on_policy_share 0.5"])
def test_the_text_may_be_written_by_the_models(distil, good_run, tmp_path, written, capsys):
    assert distil(*GOOD, *written.split()) == 0
    settings = settings_of(tmp_path / "student")
    by_teacher = written == "--teacher_text"
    found = settings["teacher_text"], settings["on_policy_share"]
    assert found == (by_teacher, 0 if by_teacher else 0.5)
    assert ("The teacher is writing" in capsys.readouterr().out) == by_teacher
    losses = [history_of(each)["loss"].tolist() for each in (tmp_path / "student", good_run.folder)]
    assert losses[0] != losses[1]


def test_options_change_the_student_and_are_written_down(distil, good_run, tmp_path):
    changes = {
        "temperature": 3.5,
        "alpha": 0.25,
        "divergence": "jensen_shannon",
        "beta": 0.3,
        "learning_rate": 0.01,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "block_size": 16,
        "dtype": "bfloat16",
    }
    options = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    assert distil(*options, "--epochs", "2", "--seed", "3", "--gradient_checkpointing") == 0
    changes["gradient_checkpointing"] = True
    settings = settings_of(tmp_path / "student")
    assert {name: settings[name] for name in changes} == changes
    saved = [
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "student", good_run.folder)
    ]
    assert any(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert {tensor.dtype for tensor in saved[0].values()} == {torch.float32}


@pytest.mark.parametrize(("slower", "taken"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_auto_takes_the_dtype_whose_steps_are_faster(
    distil, tmp_path, monkeypatch, capsys, slower, taken
):
    timed = commands.step_seconds

    def step_seconds(job, dtype):
        assert timed(job, dtype) > 0
        return 2.0 if dtype == slower else 1.0

    monkeypatch.setattr(commands, "step_seconds", step_seconds)
    assert distil("--dtype", "auto") == 0
    assert f"using {taken}" in capsys.readouterr().out
    assert settings_of(tmp_path / "student")["dtype"] == taken


def test_blocks_are_as_long_as_the_shorter_models_positions(
    quick, place, tokenizer, tmp_path, capsys
):
    long = str(save(tmp_path / "long", tokenizer, n_layer=1, n_positions=4096))
    assert commands.block_length(None, long) == 1024  # and no longer unless asked for
    assert commands.block_length(2048, long) == 2048
    arguments = command_line(place, tmp_path / "student", without="block_size")
    assert run([*arguments, "--student", str(place / "narrow")]) == 0
    assert "not trained" not in capsys.readouterr().out
    settings = settings_of(tmp_path / "student")
    assert settings["block_size"] == 64
    assert "untrained_positions" not in settings


def test_a_table_of_positions_is_found_by_looking_at_the_modules():
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    opt = OPTConfig(**tiny, max_position_embeddings=40, ffn_dim=16, word_embed_proj_dim=16)
    llama = LlamaConfig(**tiny, max_position_embeddings=40, intermediate_size=16)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=40, n_positions=40)
    said = "Positions 9 to 40 of the student are not trained: it is only good for texts of up to 8"
    for model in (GPT2LMHeadModel(gpt2), OPTForCausalLM(opt)):
        assert commands.untrained_positions(model, 8).startswith(said)
        assert commands.untrained_positions(model, 40) == ""
    assert commands.untrained_positions(LlamaForCausalLM(llama), 8) == ""  # rotary


def test_a_teacher_with_gpt2s_vocabulary_asks_for_distilgpt2(
    distil, tokenizer, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(commands, "GPT2_VOCABULARY", len(tokenizer))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))
    capfd.readouterr()
    assert distil() == 2
    error = capfd.readouterr().err
    assert error.startswith("error: distilgpt2 is no local directory")
    assert error.count("\n") == 1
    assert "--student half" in error
    assert listing(tmp_path) == {}
    assert distil("--student", "half") == 0


def test_without_options_it_is_the_bundled_teacher_and_the_book(
    quick, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WILLOWS_KD_CORPUS", str(place / "text.txt"))
    assert run(["distill", "--epochs", "1", "--device", "cpu", "--block_size", "32"]) == 0
    said = capsys.readouterr().out
    assert "🔍 Loading teacher model from: the bundled teacher\n" in said
    assert "📚 Loading dataset from: The Wind in the Willows\n" in said
    settings = settings_of(tmp_path / "wind_in_the_willows_distilled")
    assert settings["corpus"] == f"{place / 'text.txt'} (WILLOWS_KD_CORPUS)"


@pytest.mark.parametrize("command", ["distill", "generate m", "compare m", "export m"])
def test_the_help_names_every_option_exit_code_and_an_example_in_80_columns(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    name = command.split()[0]
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    needed = ["--to", "gguf", "--output_dir", "b"] if name == "export" else []
    for option in vars(parse([*command.split(), *needed])):
        assert option in ("command", "model_dir") or f"--{option}" in shown
    assert re.findall(r"^  (\d+) ", shown, re.MULTILINE) == ["0", "1", "2", "3", "130"]
    assert f"example:\n  willows-kd {name} " in shown
    assert ("--resume continues" in shown) == (name == "distill")
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_command_the_help_is_shown_and_the_version_on_demand(capsys):
    assert run([]) == 0
    assert "{distill,generate,compare,export}" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"willows-kd {willows_kd.__version__}\n"


def test_options_may_be_spelt_with_dashes():
    options = parse(["distill", "--model-dir", "a-b", "--output-dir=c-d", "--init=0,3"])
    assert (options.model_dir, options.output_dir, options.init) == ("a-b", "c-d", [0, 3])


# -- errors ----------------------------------------------------------------------------


def test_debug_shows_the_traceback_of_an_error(distil, capsys):
    assert distil("--epochs", "0", "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: epochs is 0; it must be a whole number, at least 1"


def test_what_is_in_the_output_directory_is_replaced_only_with_overwrite(distil, tmp_path, capsys):
    student = tmp_path / "student"
    student.mkdir()
    (student / "poem.txt").write_text("by me")
    assert distil("--overwrite") == 0
    assert "poem.txt" not in listing(student)
    before = listing(student)
    for resume in ([], ["--resume"]):
        capsys.readouterr()
        assert distil("--temperature", "2", *resume) == 2
        made = r"\d{4}-\d\d-\d\d \d\d:\d\d, T = 1.0, 1 epoch"
        refused = rf"error: {student} holds a student \({made}\); choose another .*--overwrite.*\n"
        assert re.fullmatch(refused, capsys.readouterr().err)
    assert listing(student) == before
    assert distil("--temperature", "2", "--overwrite") == 0
    assert settings_of(student)["temperature"] == 2


def test_a_terminal_without_emoji_gets_the_words(distil, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert distil() == 0
    assert b" Distilled model saved successfully!" in out.buffer.getvalue()


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


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


EXITS = [  # what fails, how, the exit code, and what is left
    (None, None, 0, {"student"}),
    ("commands.compare", ValueError("no\nnumbers"), 1, {"student"}),
    ("models.load_tokenizer", InputError("no tokenizer"), 2, set()),
    ("commands.compare", OSError(28, "No space left on device"), 3, {"student"}),
    ("models.save_model", WriteError("student cannot be written"), 3, {"student.checkpoints"}),
    ("commands.compare", KeyboardInterrupt(), 130, {"student"}),
    ("models.load_teacher", KeyboardInterrupt(), 130, set()),
]


@pytest.mark.parametrize(("where", "failure", "code", "left"), EXITS)
def test_each_way_to_end_has_its_exit_code_and_one_line(
    where, failure, code, left, distil, tmp_path, monkeypatch, capsys
):
    if where:
        module, name = where.split(".")
        owner = {"commands": commands, "models": models}[module]
        monkeypatch.setattr(owner, name, raising(failure))
    assert distil() == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert names(tmp_path) == left
    if where == "commands.compare":
        reason = " ".join(str(failure).split()) or "stopped"
        assert f"{reason}: the student is trained and saved, but was not compared\n" in said.out
        assert load_file(tmp_path / "student" / "model.safetensors")
    elif code in (2, 3):
        assert f"error: {failure}\n" in said.err


def test_a_student_that_cannot_be_saved_is_refused_before_it_is_trained(
    distil, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(GPT2Config, "save_pretrained", raising(KeyError("attention_types")))
    monkeypatch.setattr(commands, "distill", lambda *_, **__: pytest.fail("it was trained"))
    assert distil() == 2
    error = capsys.readouterr().err
    assert error == "error: a GPT2LMHeadModel like this cannot be saved: 'attention_types'\n"
    assert listing(tmp_path) == {}


# -- Ctrl-C ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Ctrl-C raises KeyboardInterrupt, even if a shell has started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ends(monkeypatch):
    """The student's weights at the end of each epoch; `ends.stop` presses Ctrl-C after a row."""
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
    return ends


def assert_saved(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    saved = load_file(folder / "model.safetensors")
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(tensor, weights[name]), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_ctrl_c_in_the_first_epoch_saves_a_checkpoint_only(distil, ends, tmp_path, capsys):
    ends.stop = lambda row: row["step"] == 2
    assert distil() == 130
    said = capsys.readouterr()
    assert "Saving" not in said.out
    assert "stopped: nothing was saved; add --resume to go on from where it stopped" in said.err
    assert "Traceback" not in said.err
    assert set(listing(tmp_path)) == {
        "student.checkpoints",
        "student.checkpoints/lock",
        "student.checkpoints/step_00000002.safetensors",
    }


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(distil, tmp_path, capsys, monkeypatch):
    def write(text):
        if "Epoch 2" in text:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commands.tqdm, "write", write)
    assert distil("--epochs", "3") == 130
    said = capsys.readouterr()
    assert "stopped: nothing was saved" in said.err
    assert "Traceback" not in said.err
    assert names(tmp_path) == {"student.checkpoints"}


def test_ctrl_c_later_saves_the_student_of_the_last_finished_epoch(distil, ends, tmp_path, capsys):
    ends.stop = lambda row: row["step"] == 7  # two checkpoints after that of the epoch's end
    assert distil("--epochs", "2", "--checkpoint_minutes", "0") == 130
    said = capsys.readouterr()
    assert "✅ Distilled model saved successfully!" in said.out
    assert "stopped: the student is that of epoch 1 of 2; add --resume" in said.out
    assert "Traceback" not in said.err
    folder = tmp_path / "student"
    assert settings_of(folder)["epochs_finished"] == 1
    assert settings_of(folder)["epochs"] == 2
    assert set(history_of(folder)["epoch"]) == {1}
    assert_saved(folder, ends.weights[1])


@pytest.mark.parametrize("epoch", [2, 3])
def test_ctrl_c_at_the_very_end_of_an_epoch_saves_the_student_that_it_names(
    epoch, distil, ends, tmp_path
):
    ends.stop = lambda row: row["epoch"] == epoch and "average_loss" in row
    assert distil("--epochs", "3") == (0 if epoch == 3 else 130)
    finished = settings_of(tmp_path / "student")["epochs_finished"]
    assert history_of(tmp_path / "student")["epoch"].max() == finished == epoch
    assert_saved(tmp_path / "student", ends.weights[finished])


# -- going on --------------------------------------------------------------------------


def test_a_stopped_run_is_not_thrown_away_unasked(distil, ends, tmp_path, capsys):
    ends.stop = lambda row: row["step"] == 2
    assert distil() == 130
    before = listing(tmp_path)
    ends.stop = lambda row: False
    capsys.readouterr()
    assert distil() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'student.checkpoints'} holds a run that was stopped; "
        "--resume continues it, --overwrite starts afresh\n"
    )
    assert distil("--resume", "--temperature", "3") == 2
    assert "temperature was 1.0, is 3.0" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert distil("--overwrite", "--temperature", "3") == 0
    assert settings_of(tmp_path / "student")["temperature"] == 3
    assert names(tmp_path) == {"student"}


def test_what_killed_runs_left_is_tidied_up(distil, tmp_path):
    assert distil() == 0
    student = tmp_path / "student"
    shutil.copytree(student, tmp_path / ".student.12345.partial")
    (tmp_path / ".student.12345.partial" / "README.md").unlink()
    student.rename(tmp_path / ".student.12345.replaced")  # killed between two renames
    (tmp_path / ".students.1.partial").mkdir()  # another's
    assert distil("--dataset_path", "missing.txt") == 2
    assert names(tmp_path) == {"student", ".students.1.partial"}
    assert "README.md" in names(student)


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("student", "student.checkpoints"),
        ("a/student/", "a/student.checkpoints"),
        (".", "{here}.checkpoints"),
        ("a/..", "{here}.checkpoints"),
        ("../b", "../b.checkpoints"),
    ],
)
def test_the_checkpoints_are_beside_the_output(given, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands.checkpoints_folder(Path(given))
    assert found == Path(folder.format(here=tmp_path))
    assert found.resolve().parent == Path(given).resolve().parent


# -- other teachers --------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_an_adapter_is_merged_and_a_line_says_so(distil, place, tmp_path, capsys, whose):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    option = "--model_dir" if whose == "teacher" else "--student"
    assert distil(option, str(tmp_path / "adapter")) == 0
    said = capsys.readouterr().out
    assert said.count("LoRA") == 1
    assert f"The {whose}'s LoRA adapter is merged into its weights" in said


# -- as real processes -----------------------------------------------------------------


def process(*arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, encoding="utf-8", **more
    )


def test_the_script_at_the_root_distils_from_any_folder(place, tmp_path):
    arguments = command_line(place, Path("student"))[1:]
    done = process(ROOT / "model_distillation.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("🔍 Loading teacher model from: ")
    assert "✅ Distilled model saved successfully!" in done.stdout
    assert (tmp_path / "student" / "model.safetensors").exists()
    shown = re.split(r"[\r\n]+", done.stderr)
    assert not [line for line in shown if line.strip() and "step" not in line]


def test_the_package_run_as_a_module_says_in_one_line_what_is_wrong(place, tmp_path):
    arguments = command_line(place, tmp_path / "student", "--model_dir", "./missing")
    done = process("-m", "willows_kd", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --model_dir: ./missing does not exist (see --help)\n"


def test_help_and_bad_values_need_nothing_that_is_slow_to_import():
    code = """
import sys
from willows_kd.cli import main
for arguments in (
    "", "--version", "--help", "distill --help", "distill --bogus", "distill --epochs 0",
    "generate ./missing", "compare ./missing a", "distill --student ./missing",
):
    try:
        main(arguments.split())
    except SystemExit:
        pass
slow = {"torch", "transformers", "datasets", "pandas", "numpy"} & set(sys.modules)
sys.exit(f"imported: {slow}" if slow else 0)
"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("usage: "), done.stderr.count("error: ")) == (3, 5)
