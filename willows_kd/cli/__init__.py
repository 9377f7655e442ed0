"""The command line: `python model_distillation.py` or `willows-kd distill`, and the others.

Nothing slow is imported before the arguments are known to be good.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import willows_kd
from willows_kd.config import (
    EXPORT_FORMATS,
    INITS,
    LONGEST_BLOCK,
    DistillConfig,
    described,
    scalar_type,
)
from willows_kd.errors import InputError, WriteError

EXIT_CODES = """\
exit codes:
  0    done
  1    the output was closed early, or a saved student was not compared
  2    something that was given cannot be used
  3    a file could not be written, such as on a full disk
  130  stopped by the user; distill --resume continues
"""


READ = ("model_dir", "student", "dataset_path")  # options whose paths have to be there


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        """Exit with code 2."""
        line = f"error: {' '.join(message.split())} (see --help)\n"
        self.exit(2, line if speaks() else None)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code, one of `EXIT_CODES`."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without emoji still gets the words
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with contextlib.nullcontext() if speaks() else contextlib.redirect_stdout(io.StringIO()):
            return run(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, OSError | WriteError) else 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was saved", file=sys.stderr)
        return 130


def speaks() -> bool:
    """Whether this process prints: of several, one does."""
    return os.environ.get("RANK", "0") == "0"


def run(options: argparse.Namespace) -> int:
    """Check the settings, and only then import what does the work."""
    if options.command == "distill":
        names = {each.name for each in dataclasses.fields(DistillConfig)}
        given = {name: value for name, value in vars(options).items() if name in names}
        if options.dtype == "auto":
            given["dtype"] = "float32"  # until it is tried which is faster
        config = DistillConfig(**given)
        from willows_kd.cli.distill import distill_to_directory

        return distill_to_directory(options, config)
    from willows_kd.cli import others

    return getattr(others, options.command)(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line; without any, its help is shown."""
    parser = Parser(prog="willows-kd", description="Knowledge distillation of language models.")
    version = f"willows-kd {willows_kd.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (about, operands, example, add_options) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=about,
            usage=f"%(prog)s {operands}[options]",
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"example:\n  willows-kd {name} {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args([underscored(word) for word in arguments] or ["--help"])
    for name, value in vars(options).items():
        for given in value if isinstance(value, list) else [value]:
            if given == "" and name != "prompt":  # as of a variable that the shell does not know
                parser.error(f"{name} is empty; leave it out or give a value")
            is_path = name in READ and str(given).startswith((".", "/", "~"))
            if is_path and not os.path.exists(given):
                parser.error(f"{given} does not exist")
    return options


def underscored(word: str) -> str:
    """An option as it is spelt here: `--model-dir=x` is `--model_dir=x`."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


# -- values ----------------------------------------------------------------------------


def init_of(text: str) -> str | list[int]:
    """What `--init` names: a way to choose layers, or their numbers."""
    if text in ("auto", *INITS):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        accepted = f"auto, {', '.join(INITS)} or layer numbers such as 0,3,5"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {accepted}") from None


# -- options ---------------------------------------------------------------------------

DEVICES = "auto, cpu, cuda, cuda:1, mps ..."
METAVARS = {str: "NAME", int: "N", float: "X"}


def add_option(group, name: str, about: str, default=None, type_=str, **more) -> None:
    """Add an option whose help ends with its default; one that is False by default is a flag."""
    if default is False:
        group.add_argument(f"--{name}", action="store_true", help=about)
        return
    if default is not None:
        about, type_ = f"{about} (default: {default})", type(default)
    more = {"metavar": METAVARS.get(type_), **more}
    group.add_argument(f"--{name}", default=default, type=type_, help=about, **more)


def add_distill(parser: Parser) -> None:
    """The options of `distill`."""
    add = partial(add_option, parser.add_argument_group("teacher and student"))
    add(
        "model_dir",
        "the teacher: a directory or hub name (default: the bundled one)",
        metavar="DIR",
    )
    made = (
        "half, for half of the teacher's layers, or a directory or hub name "
        "(default: distilgpt2 for a teacher with GPT-2's vocabulary, else half)"
    )
    add("student", made, metavar="DIR")
    add("layers", "how many of the teacher's layers the student keeps (default: half)", type_=int)
    ways = (
        f"which layers it keeps: {', '.join(INITS)}, their numbers, such as 0,3,5, or auto, "
        "which tries all these ways on a few blocks and takes the best (default: auto)"
    )
    add("init", ways, type_=init_of, metavar="WAY")
    add = add_text(parser)
    written = "train on what the teacher writes from the openings of the text's blocks"
    add("teacher_text", written, False)
    settings = dataclasses.fields(DistillConfig)
    loss = [each.name for each in settings].index("epochs")
    add_settings(partial(add_option, parser.add_argument_group("loss")), settings[:loss])
    add = partial(add_option, parser.add_argument_group("training"))
    add_settings(add, settings[loss:])
    add("device", DEVICES, "auto")
    kept = "run the teacher once and keep its hidden states on disk, for this run and later ones"
    add("cache_teacher", kept, False)
    add = add_output(parser, "the student", default="./wind_in_the_willows_distilled")
    add("resume", "continue a run that was stopped, if there is one", False)
    add("checkpoint_minutes", "between two checkpoints; each epoch ends with one, too", 5.0)


def add_settings(add: Callable, settings: list[dataclasses.Field]) -> None:
    """The options for those settings of `DistillConfig` that are one value."""
    for each in settings:
        about, type_, more = described(each), scalar_type(each), {}
        if type_ is str:
            more["choices"] = each.metadata["fits"]
        if each.name == "dtype":
            more["choices"] += ("auto",)
            about += "; auto tries both for a few steps and takes the faster"
        if each.name != "hidden_layers":
            add(each.name, about, each.default, type_, **more)


def add_generate(parser: Parser) -> None:
    """The options of `generate`, with the defaults of `complete`."""
    model = "a model's directory or hub name, or an export to ONNX"
    parser.add_argument("model_dir", metavar="DIR", help=model)
    add = partial(add_option, parser)
    add("prompt", "what the text begins with", "The Mole had been")
    add("max_new_tokens", "tokens to write", 60)
    add("temperature", "of sampling; 0 takes the likeliest token", 0.8)
    add("top_k", "draw among the N likeliest tokens; 0: among all", 50)
    add("seed", "for the draws", 0)


def add_compare(parser: Parser) -> None:
    """The options of `compare`."""
    models = "directories or hub names, at least two; the others are compared with the first"
    parser.add_argument("model_dir", metavar="DIR", nargs="+", help=models)
    add_text(parser)
    add_option(parser, "device", DEVICES, "auto")


def add_export(parser: Parser) -> None:
    """The options of `export`."""
    parser.add_argument("model_dir", metavar="DIR", help="the model: a directory or hub name")
    parser.add_argument("--to", required=True, choices=EXPORT_FORMATS, help="the format")
    add_output(parser, "the export", required=True)


def add_text(parser: Parser) -> Callable:
    """The options for a text and how it is cut; returns the way to add more to them."""
    add = partial(add_option, parser.add_argument_group("text"))
    text = "a text or a table (default: The Wind in the Willows; offline, the sample story)"
    add("dataset_path", text, metavar="FILE")
    add("text_column", "column of a table, such as a JSON Lines file, that holds the text")
    add("encoding", "encoding of the text, such as cp1251 (default: UTF-8)")
    longest = f"all that the models read at once, at most {LONGEST_BLOCK:,}"
    add("block_size", f"tokens in a block (default: {longest})", type_=int)
    return add


def add_output(parser: Parser, what: str, **more) -> Callable:
    """The options for where something is saved; returns the way to add more to them."""
    add = partial(add_option, parser.add_argument_group("output"))
    add("output_dir", f"directory for {what}", metavar="DIR", **more)
    add("overwrite", "replace what is there", False)
    return add


COMMANDS = {  # what they do, what they are given, an example, and the function for their options
    "distill": (
        "train a smaller student on a teacher's soft labels",
        "",
        "--model_dir gpt2 --dataset_path my_text.txt \\\n    --output_dir my_student",
        add_distill,
    ),
    "generate": (
        "generate text from a prompt",
        "DIR ",
        'my_student --prompt "The Mole had been"',
        add_generate,
    ),
    "compare": (
        "compare models in quality, size, memory and speed",
        "DIR DIR ... ",
        "gpt2 my_student --dataset_path my_text.txt",
        add_compare,
    ),
    "export": (
        "write a model for another runtime",
        "DIR ",
        "my_student --to onnx --output_dir my_export",
        add_export,
    ),
}
