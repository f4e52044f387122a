"""`virst completion`: a script that completes commands and options in a shell."""

import argparse

HELP = "Print a script that completes `virst` in your shell."
EXAMPLES = """examples:
  virst completion bash > ~/.local/share/bash-completion/completions/virst
  virst completion zsh > ~/.zsh/completions/_virst      # a folder of $fpath
  virst completion tcsh > ~/.virst.tcsh                 # `source` it in ~/.tcshrc

Then open a new shell."""
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    import shtab

    from virst_jax import cli

    print(shtab.complete(cli.whole_parser(), args.shell))
    return 0
