"""What d2m_jax takes of transformers: pyright would read all of it, which takes half its time."""

from typing import Any

CLIPTokenizer: Any
T5Tokenizer: Any
