"""Personal data is found by pattern and checksum; what only looks like it stays."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop_gateway.canonical import canonical, is_card, is_iban


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to jo.doe+x@mail.example.co.uk now", "write to [EMAIL] now"),
        ("call +49 (0)30 1234-5678 today", "call [PHONE] today"),
        ("call 555-867-5309.", "call [PHONE]."),
        ("my IBAN is DE89 3704 0044 0532 0130 00, thanks", "my IBAN is [IBAN], thanks"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("from 192.168.10.1 and 2001:db8::1", "from [IP] and [IP]"),
        ("ssn 078-05-1120", "ssn [SSN]"),
    ],
)
def test_personal_data_is_replaced_by_what_it_was(text: str, redacted: str) -> None:
    assert canonical(text, redact=True) == redacted
    assert canonical(text, redact=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "in 2024 we sold 12 of 345",
        "at 12:30:45 on 2024-11-23",
        "version 1.2.3.4.5 and 999.999.1.1",
        "@friend #wow so good",
        "card 4111 1111 1111 1112 is none by its checksum",
        "DE89370400440532013001 is no IBAN",
        "DE89\u0130\u0130\u0130\u0130\u0130\u0130\u0130\u0130\u0130\u0130\u0130\u0130 is none either",
        "it costs 1,000,000 or 99.95",
        "std::vector",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert canonical(text, redact=True) == text


def test_checksums_are_checked() -> None:
    assert is_iban("GB82WEST12345698765432")
    assert not is_iban("GB82WEST12345698765431")
    assert is_card("5500005555555559")
    assert not is_card("0000000000000000")


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_the_canonical_form_is_a_fixed_point_of_white_space_and_storable(text: str) -> None:
    once = canonical(text, redact=False)
    assert canonical(once, redact=False) == once
    assert once == " ".join(once.split())
    assert "\x00" not in once
    once.encode()


@pytest.mark.parametrize("unit", ["1", "1-", "a@", "1:", "1.", "(1) ", "ab12 ", "1@1.", "a." * 30 + "@", "+1 "])
def test_hostile_texts_take_no_long_time(unit: str) -> None:
    started = time.process_time()
    canonical(unit * 20_000, redact=True)
    assert time.process_time() - started < 1.0
