"""The command line: `python model_distillation.py` or `willows-kd distill`.

Nothing slow is imported before the arguments are known to be good.
"""

import argparse
import dataclasses
import os
import sys
import traceback

from willows_kd.config import DIVERGENCE_NAMES, DTYPES, DistillConfig
from willows_kd.errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        """Exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for bad input, 130 when stopped."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without emoji still gets the words
    try:
        config = config_of(options)
        from willows_kd.commands import distill_to_directory

        return distill_to_directory(options, config)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:  # the latter is the machine's: a full disk
        if options.debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was saved", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="willows-kd", description="Knowledge distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    distill = commands.add_parser(
        "distill",
        help="train a smaller student on a teacher's soft labels",
        description="Train a smaller student on a teacher's soft labels and save it.",
    )
    add_options(distill)
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `distill` takes, with the defaults of `DistillConfig`."""

    def add(name: str, text: str, default=None, **more) -> None:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", help=text + shown, default=default, **more)

    settings = DistillConfig()
    add("model_dir", "the teacher: a directory or hub name (default: the bundled one)")
    add("dataset_path", "a text (default: The Wind in the Willows; offline, the sample story)")
    add("output_dir", "where the student is saved", "./wind_in_the_willows_distilled")
    add(
        "student",
        "half, for half of the teacher's layers, or a directory or hub name "
        "(default: distilgpt2 for a teacher with GPT-2's vocabulary, else half)",
    )
    add("layers", "make a student of so many of the teacher's layers", type=int)
    add("temperature", "softens teacher and student alike", settings.temperature, type=float)
    add("alpha", "weight of the hard labels, from 0 to 1", settings.alpha, type=float)
    add(
        "divergence",
        "how far the student is from the soft labels",
        settings.divergence,
        choices=DIVERGENCE_NAMES,
    )
    add("epochs", "passes over the training text", settings.epochs, type=int)
    add("learning_rate", "AdamW's peak", settings.learning_rate, type=float)
    add("batch_size", "blocks in a forward pass", settings.batch_size, type=int)
    add(
        "gradient_accumulation_steps",
        "forward passes in an optimiser step",
        settings.gradient_accumulation_steps,
        type=int,
    )
    add("block_size", "tokens in a block", 128, type=int)
    add("seed", "orders the blocks", settings.seed, type=int)
    add("device", "auto, cpu, cuda, cuda:1, mps ...", "auto")
    add("dtype", "of the arithmetic", settings.dtype, choices=DTYPES)
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="slower, in less memory"
    )
    parser.add_argument(
        "--cache_teacher",
        action="store_true",
        help="run the teacher once and keep what it knows on disk, for this run and later ones",
    )
    add("checkpoint_minutes", "between two checkpoints, besides each epoch's end", 5.0, type=float)
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was stopped, if there is one"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output directory that is not ours, or a run that was stopped",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def config_of(options: argparse.Namespace) -> DistillConfig:
    """The settings among the options.

    Raises:
        InputError: a value is out of its range.
    """
    names = {field.name for field in dataclasses.fields(DistillConfig)}
    return DistillConfig(**{k: v for k, v in vars(options).items() if k in names})
