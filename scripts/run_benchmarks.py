"""``python -m bench``, by the name that it has in fast-litellm's performance guide."""

import pathlib
import runpy
import sys

if __name__ == "__main__":  # bench spawns processes, which import this file
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    runpy.run_module("bench", run_name="__main__")
