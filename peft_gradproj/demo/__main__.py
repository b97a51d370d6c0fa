"""`python -m peft_gradproj.demo OUTPUT`: the demo without the command line tool."""

from __future__ import annotations

import argparse

from .run import run_demo
from .settings import DEFAULT_LOGO

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune with a logo forbidden, and see what was learned.")
    parser.add_argument("output", nargs="?", default="demo_output", help="folder for the page and the adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps of each adapter")
    parser.add_argument("--logo", default=DEFAULT_LOGO)
    parser.add_argument("--quick", action="store_true", help="a tiny run, whose figures mean nothing")
    parser.add_argument("--base-model", help="a StableDiffusionPipeline folder")
    print(run_demo(**vars(parser.parse_args())))
