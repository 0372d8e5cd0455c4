"""Tokenizers that threads share: whatever others ask for, ids have their shapes."""

import threading
from collections import Counter

import pytest

from d2m_jax.config import PromptsConfig
from d2m_jax.tokenizers import Tokenizers
from d2m_jax.weights.torch_files.random_flux import TEXT_CLIP, TEXT_T5, random_flux
from tests import own_process

LONG = "a red fox jumps " * 30
FIRST = """
import sys, threading
from d2m_jax.config import PromptsConfig
from d2m_jax.tokenizers import Tokenizers
from d2m_jax.weights.torch_files.random_flux import TEXT_CLIP, TEXT_T5

tokenizers = Tokenizers(sys.argv[1], PromptsConfig(t5=TEXT_T5, clip=TEXT_CLIP, length=64))
found = []
threads = [threading.Thread(target=lambda: found.append(tokenizers.ids(["a"]))) for _ in range(4)]
for thread in threads:
    thread.start()
assert tokenizers.lost(["a"]) == {"clip": {}, "t5": {}}
for thread in threads:
    thread.join()
assert len(found) == 4
print("equal")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_flux(tmp_path_factory.mktemp("tokenizers") / "flux")


@pytest.fixture
def tokenizers(folder):
    return Tokenizers(str(folder), PromptsConfig(t5=TEXT_T5, clip=TEXT_CLIP, length=64))


def settings(tokenizers):
    """How they cut and pad, each for all threads."""
    backends = [tokenizer.backend_tokenizer for tokenizer in tokenizers.loaded.values()]
    return [(backend.truncation, backend.padding) for backend in backends]


def test_nothing_sets_those_of_the_data_otherwise(tokenizers):
    before = settings(tokenizers)
    assert [padding["length"] for _, padding in before] == [77, 64]
    tokenizers.ids(["a red fox", LONG])
    lost = tokenizers.lost(["a red fox", LONG])
    assert lost["clip"].keys() == lost["t5"].keys() == {1}
    assert tokenizers.ids([LONG], 9)["t5"].shape == (1, 9)
    assert settings(tokenizers) == before


def test_threads_get_their_shapes_while_others_ask_what_was_lost(tokenizers):
    found, stop = Counter(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                found[tuple(ids.shape for ids in tokenizers.ids([LONG[:40]]).values())] += 1
            except Exception as error:
                found[repr(error)] += 1

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert set(tokenizers.lost([LONG])["t5"]) == {0}
            assert tokenizers.ids([LONG], 9)["t5"].shape == (1, 9)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert found.keys() == {((1, 77), (1, 64))}


def test_threads_may_be_the_first_to_ask(folder):
    """transformers is imported then."""
    own_process.assert_equal(FIRST, str(folder), timeout=120)
