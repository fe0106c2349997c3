"""Chat templates of others end in bounded time and size, and honest ones write what they write elsewhere."""

from __future__ import annotations

import resource
import time

import jinja2
import pytest
from data_helpers import byte_tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynlora_cli.data.chat import template as chat_template
from dynlora_cli.data.chat.limits import Limited
from dynlora_cli.data.chat.template import write
from dynlora_cli.data.forms import BadRowError
from dynlora_cli.errors import UsageError

ASK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
MANY = "{% set r = range(99999) %}"

ENDLESS = {
    "loops": MANY + "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "letters": "{% for a in 'a' * 9999999 %}{% for b in 'a' * 9999999 %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}
HUGE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "output": MANY + "{% for a in r %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
    "macros": "{% macro f(x) %}{% for a in range(99999) %}{{ x }}{% endfor %}{% endmacro %}{{ f(f(f('abc'))) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times twice": "{{ ('a' * 99999) * 99999 }}",
    "list": "{{ [0] * 10 ** 10 }}",
    "doubling": "{% set n = namespace(v='abc') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}{{ n.v }}",
    "adding": "{% set n = namespace(v='abc') %}{% for i in range(60) %}{% set n.v = n.v + n.v %}{% endfor %}{{ n.v }}",
    "squares": "{% set n = namespace(v=9) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ 'a' | indent(10 ** 10, true) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "percent": "{{ '%10000000000d' % 3 }}",
    "percent filter": "{{ '%10000000000d' | format(3) }}",
    "percent star": "{{ '%*d' | format(10 ** 10, 3) }}",
    "format": "{{ '{:10000000000}'.format(3) }}",
    "format nested": "{{ '{:{}}'.format(3, 10 ** 10) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ (['a' * 9999999] * 9999) | join }}",
    "join method": "{{ ''.join(['a' * 9999999] * 9999) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nothing divided": "{{ 1 / 0 }}",
    "files": "{% include '/etc/passwd' %}",
    "classes": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    tokenizer, began = byte_tokenizer(), time.monotonic()
    tokenizer.chat_template = ENDLESS[name]
    with pytest.raises(UsageError, match="the chat template takes more than"):
        write(tokenizer, ASK, None)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", HUGE)
def test_a_template_fills_no_memory(name: str):
    tokenizer, before = byte_tokenizer(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer.chat_template = HUGE[name]
    with pytest.raises(BadRowError, match="the chat template refuses this conversation"):
        write(tokenizer, ASK, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


def test_honest_templates_write_the_same():
    template = (
        "{%- set n = namespace(text='', count=0) -%}"
        "{%- for m in messages -%}{{ '<|' + m['role'] + '|>' ~ loop.index ~ m.content | trim }}"
        "{%- set n.text = n.text ~ m.content -%}{%- set n.count = n.count + 2 * 3 -%}{%- endfor -%}"
        "{{ n.text }} {{ n.count }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ '-' * 5 }} {{ [1] * 2 }} {{ 'a' | center(9) }}|"
        "{{ 'x y' | replace(' ', '_') }} {{ 'aXbXc' | replace('X', '-', 1) }} {{ '%s of %d' | format('a', 3) }} "
        "{{ '%.2f' % 1.5 }} {{ '{0:>4}'.format(3) }} {{ 'a\nb' | indent(2) }} {{ ['a', 'b'] | join(', ') }} "
        "{{ messages | map(attribute='role') | join('/') }} {{ messages | join(',', attribute='content') }} "
        "{{ ' '.join(['c', 'd']) }} {{ 'a-b'.replace('-', '+') }} {{ [1, 2] + [3] }} {{ none ~ 1 ~ true }}"
    )
    plain = ImmutableSandboxedEnvironment().from_string(template).render(messages=ASK)
    assert Limited().from_string(template).render(messages=ASK) == plain
    assert isinstance(Limited().from_string("{{ a }}"), jinja2.Template)
