"""The acceleration with the litellm of LITELLM_PATH, of the version LITELLM_VERSION."""

from __future__ import annotations

import json
import os
import subprocess
import sys

COUNT = """
import json, warnings
warnings.simplefilter("ignore")
import fast_litellm_shm as ours
from fast_litellm_shm.fast_litellm import acceleration
from fast_litellm_shm.tokens import vocabulary

before = ours.apply_acceleration(), ours.get_patch_status()["reason"]
import litellm

chat = [{"role": "user", "content": "Why is the sky blue? " * 40}]
models = ("gpt-4o", "gpt-4", "claude-3-opus-20240229", "claude-sonnet-4-5", None)

def counts():
    return [litellm.token_counter(model, messages=chat) for model in models] + [
        litellm.token_counter(model, text="a text " * 99) for model in models
    ]

def coded():
    tokens = [litellm.encode(model, "a text <|endoftext|> " * 99) for model in models[:-1]]
    return tokens, [litellm.decode(model, each) for model, each in zip(models, tokens)]

for name in ("cl100k_base", "o200k_base"):
    vocabulary.load(name)
first, second, codes = counts(), counts(), coded()
status, counters = ours.get_patch_status(), acceleration._counters.values()
with_tables = sum(counter.plain._tables is not None for counter in counters)
found = [status["applied"], status["components"], len(counters), with_tables]
ours.remove_acceleration()
same = first == second == counts() and codes == coded()
print(json.dumps([*before, *found, same, sum(first)]))
"""


def test_counts_are_the_same() -> None:
    version, path = os.environ["LITELLM_VERSION"], os.environ["LITELLM_PATH"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ["PYTHONPATH"]])}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**env, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, reason, applied, components, counters, with_tables, same, total = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert same
    assert total > 1000
    release = tuple(map(int, version.split(".")))
    supported = release >= (1, 102, 0)
    assert said is applied is supported  # it was said before litellm was imported
    assert components == ["token_counting", "encoding"][: supported + (release >= (1, 108, 0))]
    if supported:
        assert counters > with_tables >= 2  # those of tiktoken's, and Claude's
        assert reason == "litellm is not imported yet"
    else:
        assert reason.startswith(f"litellm {version} has no function ")
