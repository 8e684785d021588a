"""`python -m ringjax` is the `ringjax` command."""

from .cli import main

main()
