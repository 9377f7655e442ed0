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
    try:
        from willows_kd.commands import distill_to_directory

        return distill_to_directory(options, config_of(options))
    except InputError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(prog="willows-kd", description="Knowledge distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    distill = commands.add_parser(
        "distill",
        help="train a smaller student on a teacher's soft labels",
        description="Train a smaller student on a teacher's soft labels and save it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(distill)
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `distill` takes, with the defaults of `DistillConfig`."""
    add, default = parser.add_argument, DistillConfig()
    add("--model_dir", help="the teacher: a directory or hub name (None: the bundled one)")
    add("--dataset_path", help="a text file (None: The Wind in the Willows, or the sample story)")
    add("--output_dir", default="./wind_in_the_willows_distilled", help="where the student goes")
    add(
        "--student",
        help="half: half of the teacher's layers; or a directory or hub name "
        "(None: distilgpt2 for a teacher with GPT-2's vocabulary, else half)",
    )
    add("--layers", type=int, help="a student of so many of the teacher's layers")
    add("--temperature", type=float, default=default.temperature, help="softens both models")
    add("--alpha", type=float, default=default.alpha, help="weight of the hard labels, 0 to 1")
    add(
        "--divergence",
        choices=DIVERGENCE_NAMES,
        default=default.divergence,
        help="from the soft labels",
    )
    add("--epochs", type=int, default=default.epochs, help="passes over the training text")
    add("--learning_rate", type=float, default=default.learning_rate, help="AdamW's peak")
    add("--batch_size", type=int, default=default.batch_size, help="blocks in a forward pass")
    add("--accumulation", type=int, default=default.accumulation, help="passes in a step")
    add("--block_size", type=int, default=128, help="tokens in a block")
    add("--seed", type=int, default=default.seed, help="orders the blocks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of the arithmetic")
    add("--overwrite", action="store_true", help="replace an output directory that is not ours")
    add("--debug", action="store_true", help="show the traceback of an error")


def config_of(options: argparse.Namespace) -> DistillConfig:
    """The settings among the options.

    Raises:
        InputError: a value is out of its range.
    """
    names = {field.name for field in dataclasses.fields(DistillConfig)}
    return DistillConfig(**{k: v for k, v in vars(options).items() if k in names})
