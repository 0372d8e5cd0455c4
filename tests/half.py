"""A mark for tests that convert float16 or fp8 on the CPU."""

import os
import re

import pytest

needs_half = pytest.mark.skipif(
    bool(re.search(r"max_isa=(SSE4_2|AVX)\b", os.environ.get("XLA_FLAGS", ""))),
    reason="XLA converts no float16, nor fp8 by way of it, without the instructions F16C",
)
