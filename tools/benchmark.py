#!/usr/bin/env python3
"""Runs the benchmarks of the library.

Usage:

    tools/benchmark.py vocab --json vocab.json            ALIGN over the vocabulary: time, memory and agreement compared
                                                          with dense JAX and eager PyTorch, and the cost of decoding
    tools/benchmark.py vocab --quick                      smoke test at small sizes, in seconds
    tools/benchmark.py vocab --parts agreement memory     some parts only
    tools/benchmark.py vocab-tpu --json tpu.json          ALIGN compiled for TPUs (needs libtpu, but no TPU)
    tools/benchmark.py data --json data.json              cutting images into tiles, compared with transformers
    tools/benchmark.py packing --json packing.json        fill of bins, compared with padding and bucketing
    tools/benchmark.py train --json train.json            training on a CPU, compared with eager PyTorch
    tools/benchmark.py trees --json trees.json            training with the questions of a page as a tree, on a CPU
    tools/benchmark.py decode --json decode.json          prefill and decoding on a CPU, compared with transformers
    tools/benchmark.py answers --json answers.json        questions about one page together, compared with one by one
    tools/benchmark.py answers-tpu --json answers.json    FLOPs per question at 1B on v5e (needs libtpu, but no TPU)
    tools/benchmark.py startup --json startup.json        start-up of `alignvlm ask`, compared with that of JAX
"""

import argparse
import json
import sys

from benchmarks import answers, answers_tpu, decode, images, packing, startup, train, trees, vocabulary, vocabulary_tpu

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.locations import location
from alignvlm_jax.output_files import check_writable, write_atomically

COMMANDS = {
    "vocab": vocabulary,
    "vocab-tpu": vocabulary_tpu,
    "data": images,
    "packing": packing,
    "train": train,
    "trees": trees,
    "decode": decode,
    "answers": answers,
    "answers-tpu": answers_tpu,
    "startup": startup,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        help_line = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=help_line, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--json", type=location, help="write the results to this file")
        module.add_arguments(command)
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    figures = COMMANDS[args.command].run(args)
    if figures is None:
        return 1
    if args.json:
        write_atomically(args.json, (json.dumps(figures, indent=2) + "\n").encode())
        print(f"wrote the results to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmark.py", main))
