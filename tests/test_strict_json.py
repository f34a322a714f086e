"""JSON from strangers: what is no regular file, no JSON, or has two meanings, is refused."""

import json
import os
import sys
import time

import pytest

from edgellama.errors import EdgeLlamaError, ModelConfigError
from edgellama.quantize.strict_json import parse_json, read_json

LONG = "0" * 400
unix = pytest.mark.skipif(sys.platform == "win32", reason="no such files on Windows")


def test_what_is_legal_is_read(tmp_path):
    path = tmp_path / "config.json"
    value = {"a": [1, -2.5, None, True], "b": {"a": "\u00e9\n"}, "c": {}, "d": 10**30}
    path.write_text(json.dumps(value), "utf-8")
    assert read_json(path) == value
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": {"a": 2, "a": 3}}', r"line 2, column 16: the key 'a' appears twice"),
        ('{"k\\u0061": 1, "ka": 2}', r"line 1, column 16: the key 'ka' appears twice"),
        ('{"a": NaN}', r"line 1, column 7: NaN is not a number"),
        ('{"a": ["NaN", -Infinity]}', r"line 1, column 15: -Infinity is not a number"),
        ('{"a": 1e400}', r"line 1, column 7: the number '1e400' is too large"),
        ('{\n"a": ' + "9" * 5000 + "}", r"line 2, column 6: a number of 5000 characters"),
        ('{"a": "NaN", "NaN": NaNs}', r"line 1, column 21: NaN is not a number"),
        ('{"a": ["é", -Infinity1]}', r"line 1, column 13: -Infinity is not a number"),
        ('{"a": 1e999x}', r"line 1, column 7: the number '1e999' is too large"),
        ('{"a": [2e999e-999, 1e999e-999]}', r"line 1, column 8: the number '2e999' is too"),
        ('{"a": ' + "1" * 401 + "x}", r"line 1, column 7: a number of 401 characters"),
        ('{"a": [1' + LONG + ".0e-500, 1" + LONG + ".0]}", r"column 418: the number '1000"),
        ('{"a": 1,}', r"line 1, column [89]: not JSON"),
        ('{"a": 1 // one\n}', r"line 1, column 9: not JSON"),
        ('{"a": 1', r"not JSON"),
        ('{"a": "\\', r"not JSON"),
        ("[1]", r"list instead of an object"),
        ("7", r"int instead of an object"),
        ("", r"it is empty"),
        (" \n", r"it is empty"),
        ('{"a":' + "[" * 100_000, r"column 69: nested deeper than 64 levels"),
        ('{"a":' * 100_000, r"nested deeper than 64 levels"),
        ('{"a": [' + "0," * 2_000_000, r"more than 1048576 values"),
    ],
)
def test_line_and_column_of_what_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ModelConfigError, match=r"^config\.json: .*" + message) as caught:
        read_json(path)
    assert len(str(caught.value)) < 500


def test_repeated_keys_are_found_in_linear_time(tmp_path):
    """A million tokens before the key that repeats; seconds if the search were quadratic."""
    text = '{"a": [' + '"b",' * 500_000 + '"b"], "a": 0}'
    with pytest.raises(EdgeLlamaError, match=f"column {len(text) - 6}: the key 'a' appears twice"):
        parse_json(text.encode(), tmp_path / "x")


@pytest.mark.parametrize("end", ["", "\\", "\n"])
def test_a_string_without_an_end_is_read_once(tmp_path, end):
    """Its escaped quotes begin no strings of their own, which would take half a minute."""
    text = '{"' + '\\"' * 40_000 + end
    started = time.perf_counter()
    with pytest.raises(EdgeLlamaError, match="not JSON"):
        parse_json(text.encode(), tmp_path / "x")
    assert time.perf_counter() - started < 5  # it takes 5 ms


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b'{"a": "\xff"}', "byte 7 is 0xFF"),
        (b"\0" * 100, "not JSON"),
    ],
)
def test_other_encodings(tmp_path, data, message):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ModelConfigError, match=message):
        read_json(path)


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(ModelConfigError, match="too many for such a file"):
        read_json(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(EdgeLlamaError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")
    with pytest.raises(EdgeLlamaError, match=r"folder|cannot be read"):
        read_json(tmp_path)


@unix
def test_pipes_devices_and_loops(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ModelConfigError, match="not a regular file"):
            read_json(tmp_path / path)
    with pytest.raises(EdgeLlamaError, match="cannot be read"):
        read_json(tmp_path / "loop")
