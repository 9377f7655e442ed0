"""The command line: `python model_distillation.py` or `willows-kd distill`, and the others.

Nothing slow is imported before the arguments are known to be good.
"""

import argparse
import dataclasses
import os
import sys
import traceback

from willows_kd.config import DIVERGENCE_NAMES, DTYPES, EXPORT_FORMATS, INITS, DistillConfig
from willows_kd.errors import InputError, WriteError

TEXTS = {"book": 0.0, "teacher": 0.0, "student": 1.0, "mix": 0.5}  # the share the student writes

EXIT_CODES = """\
exit codes:
  0    done
  1    the output was closed early; distill: the student is saved but could not be compared
  2    something that was given cannot be used
  3    a file could not be written, such as on a full disk
  130  stopped by the user; distill: --resume continues
"""

SETTINGS = {  # of `DistillConfig`, whose defaults they have
    "temperature": "softens the distributions of teacher and student alike",
    "alpha": "weight of the hard labels, from 0 to 1; the soft labels have the rest",
    "divergence": "how the distance from the soft labels is measured",
    "beta": "the teacher's weight in jensen_shannon",
    "skew": "the first distribution's share in the skewed KLs",
    "hidden_weight": "weight of the distance between final hidden states, added to the loss",
    "epochs": "passes over the training text",
    "learning_rate": "the peak, after the warm-up",
    "batch_size": "blocks in a forward pass",
    "gradient_accumulation_steps": "forward passes in an optimiser step",
    "seed": "orders the blocks",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        """Exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code, one of `EXIT_CODES`."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without emoji still gets the words
    try:
        if options.command == "distill":
            config = config_of(options)
            from willows_kd.cli.distill import distill_to_directory

            return distill_to_directory(options, config)
        from willows_kd.cli import others

        return getattr(others, options.command)(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, OSError | WriteError) else 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was saved", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="willows-kd", description="Knowledge distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, about, add_options in (
        ("distill", "train a smaller student on a teacher's soft labels", add_distill),
        ("generate", "let a model go on with a prompt", add_generate),
        ("compare", "compare models in quality, size, memory and speed", add_compare),
        ("export", "write a model for another runtime", add_export),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def add_distill(parser: Parser) -> None:
    """The options of `distill`."""
    add = parser.add_argument
    add("--model_dir", help="the teacher: a directory or hub name (default: the bundled one)")
    add_text(parser)
    output = "./wind_in_the_willows_distilled"
    add("--output_dir", default=output, help=f"where the student is saved (default: {output})")
    add(
        "--student",
        help="half, for half of the teacher's layers, or a directory or hub name "
        "(default: distilgpt2 for a teacher with GPT-2's vocabulary, else half)",
    )
    add("--layers", type=int, help="how many of the teacher's layers the student keeps")
    ways = f"auto, {', '.join(INITS)}, or numbers such as 0,3,5"
    best = "auto, the best start on a few training blocks"
    add("--init", type=init_of, help=f"which of them: {ways} (default: {best})")
    add(
        "--text",
        choices=TEXTS,
        default="book",
        help="what the student is trained on: the book (the data set), or what the teacher or the "
        "student writes from its openings; mix is half book, half student (default: book)",
    )
    for name, about in SETTINGS.items():
        default = getattr(DistillConfig, name)
        choices = DIVERGENCE_NAMES if name == "divergence" else None
        about = f"{about} (default: {default})"
        add(f"--{name}", type=type(default), default=default, choices=choices, help=about)
    add("--dtype", choices=DTYPES, help=f"of the arithmetic (default: {DistillConfig.dtype})")
    add("--gradient_checkpointing", action="store_true", help="slower, in less memory")
    add(
        "--cache_teacher",
        action="store_true",
        help="run the teacher once and keep its hidden states on disk, for this run and later ones",
    )
    add(
        "--checkpoint_minutes",
        type=float,
        default=5.0,
        help="between two checkpoints, besides each epoch's end (default: 5.0)",
    )
    add("--resume", action="store_true", help="continue a run that was stopped, if there is one")
    add(
        "--overwrite",
        action="store_true",
        help="replace an output directory that is not ours, or a run that was stopped",
    )


def add_generate(parser: Parser) -> None:
    """The options of `generate`, with the defaults of `complete`."""
    add = parser.add_argument
    add("model_dir", metavar="DIR", help="a model's directory or hub name, or an export to ONNX")
    add("--prompt", required=True, help="what the text begins with")
    add("--max_new_tokens", type=int, default=60, help="at most so many (default: 60)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    add("--top_k", type=int, default=50, help="draw from so many, 0 for all (default: 50)")
    add("--seed", type=int, default=0, help="for the draws (default: 0)")


def add_compare(parser: Parser) -> None:
    """The options of `compare`."""
    add = parser.add_argument
    models = "directories or hub names, at least two; the others are compared with the first"
    add("model_dir", metavar="DIR", nargs="+", help=models)
    add_text(parser)
    add("--output_dir", help="where table and figure are saved (default: nowhere)")
    add("--overwrite", action="store_true", help="replace an output directory that is not empty")


def add_export(parser: Parser) -> None:
    """The options of `export`."""
    add = parser.add_argument
    add("model_dir", metavar="DIR", help="the model: a directory or hub name")
    add("--to", required=True, choices=EXPORT_FORMATS, help="the format")
    add("--output_dir", required=True, help="where it is saved")
    add("--overwrite", action="store_true", help="replace an output directory that is not empty")


def add_text(parser: Parser) -> None:
    """The options for a text, how it is cut, and where models read it."""
    add = parser.add_argument
    text = "a text (default: The Wind in the Willows; offline, the sample story)"
    add("--dataset_path", help=text)
    add("--text_column", help="column of a table that holds the text")
    add("--encoding", help="encoding of the text, such as cp1251 (default: UTF-8)")
    add("--block_size", type=int, default=128, help="tokens in a block (default: 128)")
    add_device(parser)


def add_device(parser: Parser) -> None:
    """The option for where models run."""
    about = "auto, cpu, cuda, cuda:1, mps ... (default: auto)"
    parser.add_argument("--device", default="auto", help=about)


def init_of(text: str) -> str | list[int]:
    """What `--init` names: a way to choose layers, or their numbers."""
    if text in ("auto", *INITS):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        accepted = f"auto, {', '.join(INITS)} or layer numbers such as 0,3,5"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {accepted}") from None


def config_of(options: argparse.Namespace) -> DistillConfig:
    """The settings among the options."""
    names = {field.name for field in dataclasses.fields(DistillConfig)}
    given = {k: v for k, v in vars(options).items() if k in names and v is not None}
    return DistillConfig(**given, student_text=TEXTS[options.text])
