"""`python -m hymba_tune.cli`: the command line, for the processes that a command starts."""

from hymba_tune.cli.main import main

main()
