"""`python -m benchmarks.protection`; spawned workers do not import this module, so that it holds nothing."""

from .cli import main

main()
