"""Checks of untrusted input: their time is linear in the size of the input."""

from __future__ import annotations

import pytest

from lfx.checks import NUMBER, check_shape, file_path, parse_json
from lfx.errors import InputError


def test_a_key_that_appears_twice_among_many_is_named() -> None:
    # A search that is quadratic in the number of keys would take an hour.
    text = "{" + ",".join(f'"k{i:06}":0' for i in range(500_000)) + ',"k499999":0}'
    with pytest.raises(ValueError, match="the key 'k499999' appears twice"):
        parse_json(text)


def test_a_key_of_any_length_and_content_is_one_short_line() -> None:
    with pytest.raises(ValueError, match="appears twice") as caught:
        parse_json('{"%s": 1, "%s": 2}' % (("a\\n" * 10_000,) * 2))
    assert len(str(caught.value)) < 120
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1" + "0" * 400], ids=["inf", "-inf", "a long int"])
def test_a_number_that_no_float_holds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"the file: error is broken: .* where a finite number should be"):
        check_shape(parse_json(f'{{"error": {text}}}'), {"error": NUMBER}, "the file")
    check_shape(parse_json('{"error": 1e308}'), {"error": NUMBER}, "the file")
    check_shape(parse_json('{"error": 0}'), {"error": NUMBER}, "the file")


@pytest.mark.parametrize("path", [b"x", ValueError("no path")], ids=["bytes", "error"])
def test_an_object_that_gives_no_path_is_refused(path: object) -> None:
    class Named:
        def __fspath__(self) -> str:
            if isinstance(path, Exception):
                raise path
            return path  # type: ignore[return-value]

    with pytest.raises(InputError, match=r"output is .*, which gives no path"):
        file_path(Named(), "output")
