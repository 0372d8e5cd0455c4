"""Options, prompts and files of prompts as users have them."""

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.sampling.options import captions_of, check_options, read_prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4.0}, "steps = 4.0: found float, expected a whole number from 1 to 1000"),
        ({"steps": True}, "steps = True: found bool"),
        ({"steps": 1001}, "steps = 1001: expected a whole number from 1 to 1000"),
        ({"height": "64"}, "height = '64': found str, expected a whole number"),
        ({"height": -64}, "height = -64: expected a whole number from 1 to 16384"),
        ({"width": 0}, "width = 0: expected"),
        ({"guidance": float("nan")}, "guidance = nan: expected a number of at least 0"),
        ({"guidance": float("inf")}, "guidance = inf: expected"),
        ({"guidance": -1}, "guidance = -1: expected"),
        ({"guidance": "3"}, "guidance = '3': found str, expected a number"),
        ({"true_cfg": np.float32("nan")}, "true_cfg = nan: expected"),
        ({"seed": None}, "seed = None: found NoneType, expected a whole number"),
        ({"seed": -1}, "seed = -1: expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296: expected"),
        ({"batch_size": 0}, "batch_size = 0: expected a whole number of at least 1"),
        ({"tile": 2}, "tile = 2: expected a whole number of at least 4"),
        ({"max_sequence_length": 513}, "max_sequence_length = 513: expected a whole number from 1"),
        ({"reuse": 0}, "reuse = 0: expected"),
        ({"top_k": (2, -1)}, "top_k = -1: expected"),
        ({"top_k": [2, 1.5]}, "top_k = 1.5: found float, expected a whole number"),
        ({"top_k": "2"}, "top_k = '2': found str"),
        ({"top_k": ()}, "top_k: found no number, expected at least one"),
        ({"top_k": (1, 2), "steps": 1}, "top_k: found 2 numbers, expected one per step at most"),
    ],
)
def test_what_no_model_takes_is_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        check_options(**options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_models_take_passes():
    check_options(height=1024, width=None, steps=np.int64(28), guidance=0, seed=2**32 - 1)
    check_options(true_cfg=np.float32(1.5), top_k=np.array([4, 2]), reuse=2, batch_size=None)
    check_options(top_k=3, guidance=None, max_sequence_length=512, tile=4)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array("a cat"), ["a cat"]),
        ((word for word in "ab"), ["a", "b"]),
        ([np.str_("a")], ["a"]),
    ],
)
def test_prompts_in_any_form(prompts, expected):
    found = captions_of(prompts)
    assert found == expected and {type(caption) for caption in found} == {str}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", 3], "prompts[1]: found int, expected a string"),
        ([None], "prompts[0]: found NoneType"),
        (np.array([["a"]]), "prompts[0]: found list"),
        (["a\udce9"], "prompts[0] = 'a\\udce9': expected text"),
        ([], "prompts: found none, expected at least one"),
    ],
)
def test_what_is_no_prompt_is_named(prompts, message):
    with pytest.raises(ConfigError) as error:
        captions_of(prompts)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("prompts", [None, 3, b"a cat", {"a": "b"}])
def test_what_holds_no_prompts_is_named(prompts):
    with pytest.raises(ConfigError, match="expected a string or a list of strings"):
        captions_of(prompts)


TEXT = "zwei Äpfel\r\n\r\n  a cat \u2028on a mat\rred\x0bearth\n\n"
LINES = ["zwei Äpfel", "a cat \u2028on a mat", "red\x0bearth"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_prompts(tmp_path, encoding):
    """CRLF, CR and LF end a line; U+2028 and a vertical tab do not. Marks are in this machine's
    byte order; the other is below."""
    (tmp_path / "p.txt").write_bytes(TEXT.encode(encoding))
    assert read_prompts(tmp_path / "p.txt") == LINES


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_either_byte_order_is_read(tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes(("\ufeff" + TEXT).encode(encoding))
    assert read_prompts(tmp_path / "p.txt") == LINES


def test_joined_files_have_marks_within(tmp_path):
    (tmp_path / "p.txt").write_bytes("a\n".encode("utf-8-sig") + "b".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nbâ".encode("cp1252"), "p.txt, line 2: byte 0xe2 is not UTF-8; save the file as UTF-8"),
        ("a\nb".encode("utf-16-le"), "p.txt, line 1: a NUL byte, as in UTF-16 without"),
        ("\ufeffab".encode("utf-16-le")[:-1], "p.txt, line 1: byte 0x62 is not UTF-16-LE"),
    ],
)
def test_a_file_in_another_encoding_is_told(tmp_path, data, message):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_prompts(tmp_path / "p.txt")
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match="absent.txt: no such file, expected one prompt a line"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_prompts(tmp_path)
