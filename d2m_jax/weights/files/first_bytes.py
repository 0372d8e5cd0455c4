"""What a file really is that was taken for safetensors: its first bytes tell."""

import re

LENGTH = 512  # bytes that are looked at
# The first that fits counts.
KINDS = (
    (rb"GGUF|lmgg|tjgg|fmgg", "GGUF, which holds quantised blocks"),
    (
        rb"PK\x03\x04.*\.pkl|\x80[\x02-\x05]",
        "a pickle file (torch.save), which can run any code when it is read, so it is never read",
    ),
    (rb"PK\x03\x04.*\.npy", "NumPy's .npz"),
    (rb"PK[\x03\x05\x07]", "a zip archive, such as a pickle of torch"),
    (rb"\x93NUMPY", "NumPy's .npy"),
    (rb"\x89HDF", "HDF5"),
    (rb"\x08[\x03-\x1f][\x12\x1a\x22\x3a]", "ONNX"),
    (
        rb"version https://(hawser|git-lfs)",
        "a Git LFS pointer: the file itself is still to be fetched (git lfs pull)",
    ),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)",
        "an HTML page, such as a server sends in a file's place (a login, a wrong address)",
    ),
    (
        rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar",
        "a compressed or packed archive",
    ),
    (rb"\x89PNG|\xff\xd8\xff|RIFF.{4}WEBP", "an image"),
)


def is_safetensors(start: bytes) -> bool:
    """Whether a safetensors file, however damaged, begins with these bytes."""
    return start[4:9] == b"\0\0\0\0{"


def kind(start: bytes) -> str | None:
    """What begins with these bytes, in words; None for what is not known."""
    if not start:
        return "an empty file"
    if not any(start):
        return "zero bytes where its header should be: a download that did not end"
    if is_safetensors(start):
        return None
    for pattern, name in KINDS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return name
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # the last letter may be cut
        text = start[: error.start].decode() if len(start) - error.start < 4 else ""
    if text.strip() and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"text, such as a server's error ({' '.join(text.split())[:60]!r})"
    return None
