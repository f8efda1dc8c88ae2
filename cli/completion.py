"""`hymba-tune completion`."""

from __future__ import annotations

import re
import sys
from typing import Literal

PROGRAM = "hymba-tune"
ZSH_VALUE = re.compile(r"^( +'(?:[^']*\]:[\w-]+|(?:\d+|\*):(?:[^:\\]|\\.)+))(' \\)$", re.MULTILINE)
"""A line about a value, of a flag or an argument, for which zsh would complete nothing."""
ZSH_END = """
if [[ "$funcstack[1]" == "_hymba-tune" ]]; then
  _cyclopts_hymba-tune "$@"
else
  compdef _cyclopts_hymba-tune hymba-tune
fi
"""
"""Makes the script of zsh work as a file of ``fpath`` and with ``source``."""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script with which a shell completes verbs, flags, choices, recipes and files.

    Example: hymba-tune completion bash > ~/.hymba-tune.bash && echo "source ~/.hymba-tune.bash" >> ~/.bashrc

    zsh: hymba-tune completion zsh > ~/.hymba-tune.zsh && echo "source ~/.hymba-tune.zsh" >> ~/.zshrc, below compinit

    fish: hymba-tune completion fish > ~/.config/fish/completions/hymba-tune.fish

    Parameters
    ----------
    shell
        The shell: bash, zsh or fish.
    """
    sys.stdout.write(completion_script(shell))  # a console would replace its tabs


def completion_script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Return cyclopts' completion script of a shell, where values that may be files complete to files."""
    from hymba_tune.cli.main import app  # which lists this verb

    script = app.generate_completion(prog_name=PROGRAM, shell=shell)
    if shell == "bash":  # readline completes files where nothing else matches
        return script.replace("\ncomplete -F ", "\ncomplete -o bashdefault -o default -F ")
    if shell == "zsh":
        return ZSH_VALUE.sub(r"\1:_files\2", script) + ZSH_END
    return script
