"""Templates are users' code: one that loops, grows or reaches for Python is refused, inside limits of time and memory."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tests.unit.trainer.builders import make_rows, make_source, write_jsonl

from tuneloop_trainer import costs
from tuneloop_trainer.contract import Template
from tuneloop_trainer.costs import TooCostly, bounded
from tuneloop_trainer.data.records import RowReader
from tuneloop_trainer.data.templates import RowTemplate
from tuneloop_trainer.errors import Invalid

LONG = "a" * 300_000
ENDLESS = {
    "loops in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over its text": "{% for a in text %}{% for b in text %}{% for c in text %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a text that doubles": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a | length }}",
    "a width": "{{ '%9999999999d' % number }}",
    "a width of a constant": "{{ '%9999999999d' % 1 }}",
    "a width of str.format": "{{ '{:9999999999}'.format(number) }}",
    "padding": "{{ text.ljust(9999999999) }}",
    "a filter's padding": "{{ 'a' | center(9999999999) }}",
    "a text in place of each letter": "{{ text.replace('a', text) | length }}",
    "a text between letters": "{{ text.join(text) | length }}",
}
WRONG = {
    "Python's classes": "{{ text.__class__.__mro__ }}",
    "a function's globals": "{{ cycler.__init__.__globals__ }}",
    "a format that reaches attributes": "{{ '{0.__class__}'.format(text) }}",
    "a product of numbers": "{% set n = namespace(a=7) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an encoding that is not there": "{{ text.encode('none') }}",
    "a place that is not there": "{{ text.index('z') }}",
    "a name that is not there": "{{ nothing }}",
    "another template": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.environ }}",
    "too deep a nest": "{% for a in text %}" * 30 + "{% endfor %}" * 30,
    "too many brackets": "{{ " + "(" * 5000 + "text" + ")" * 5000 + " }}",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.1)
    monkeypatch.setattr(costs, "BYTES", 64 << 20)


def rendered(source: str) -> str:
    return RowTemplate(source).render({"text": LONG, "number": 1})


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_loops_or_grows_is_ended(case: str) -> None:
    cpu, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooCostly, match=r"more than 0\.1 CPU seconds or 64 MiB"):
        rendered(ENDLESS[case])
    assert time.process_time() - cpu < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "in KiB"


@pytest.mark.parametrize("case", WRONG)
def test_a_template_that_reaches_out_or_fails_is_an_error_of_the_template(case: str) -> None:
    with pytest.raises((TemplateError, TooCostly)):
        rendered(WRONG[case])


def test_limits_are_taken_back() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for source in ("{{ text | length }}", ENDLESS["loops in a loop"], ENDLESS["padding"]):
        with suppress(TooCostly):
            rendered(source)
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert len(bytearray(100 << 20)) == 100 << 20


def test_the_job_is_told_which_template_and_row_at_once(tmp_path: Path) -> None:
    rows = [row | {"count": 99_999 if number == 3 else 1} for number, row in enumerate(make_rows(20), 1)]
    loop = "{% for i in range(count) %}{% for j in range(count) %}{% endfor %}{% endfor %}{{ text }}"
    source = make_source(write_jsonl(tmp_path / "rows.jsonl", rows), template=Template(prompt=loop, completion="{{ label }}"))
    reader = RowReader(source, "data.train[0]")
    with pytest.raises(Invalid, match=r"The template of data\.train\[0\] is refused at row 3: it needs more than"):
        list(reader.records())


def test_elsewhere_than_in_the_main_thread_nothing_is_bounded_and_nothing_fails() -> None:
    found: list[str] = []

    def work() -> None:
        with bounded():
            found.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["done"]


@pytest.mark.parametrize(
    ("source", "check"),
    [
        ("{{ text | length }}", lambda text: text == "300000"),
        ("{{ 3 * number * 2.5 }}", lambda text: text == "7.5"),
        ("{{ '-' * 20 }}", lambda text: text == "-" * 20),
        ("{{ text.replace('a', 'bc')[:4] }}", lambda text: text == "bcbc"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", lambda text: text == "012"),
        ("{{ ['no', 'yes'][number] }}", lambda text: text == "yes"),
    ],
)
def test_what_people_write_is_rendered(source: str, check: Callable[[str], bool]) -> None:
    assert check(rendered(source))
