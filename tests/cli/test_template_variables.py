"""`--chat-template-kwargs`: what is no variable of a template is refused."""

from __future__ import annotations

import pytest

from dynlora_cli.cli.generate import kwargs_of
from dynlora_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "no JSON object"),
        ("{bad", "not valid JSON"),
        ('{"tools": []}', "tools is no variable"),
        ('{"enable_thinking": "false"}', "leave the quotes out"),
    ],
)
def test_what_is_no_variable_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kwargs_of(text)


def test_variables_are_taken_as_json_has_them() -> None:
    assert kwargs_of('{"enable_thinking": false}') == {"enable_thinking": False}
    assert kwargs_of(None) == {}
