"""The one form in which users' texts are stored and compared: personal data redacted, white space normalised."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

MAX_CHARS = 16_384
"""Longer texts are cut before anything else is done with them."""

_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}\w{2,24}")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,4})?\b", re.IGNORECASE | re.ASCII)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.])(?:\+|\(|\d)[\d() ./-]{5,24}\d(?!\w)")
_HINT = re.compile(r"[@\d:]")
_SPACE = re.compile(r"\s+")


def canonical(text: str, *, redact: bool) -> str:
    """Same text, same bytes. Applied to both sides of every comparison."""
    return normalise(redact_personal_data(text[:MAX_CHARS]) if redact else text[:MAX_CHARS])


def normalise(text: str) -> str:
    """White space of any kind becomes one space."""
    return _SPACE.sub(" ", storable(text)).strip()


def storable(text: str) -> str:
    """Without NUL and lone surrogates, which databases refuse."""
    text = text.replace("\x00", " ")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def redact_personal_data(text: str) -> str:
    """Replaces e-mail addresses, IBANs and card numbers (by checksum), IP addresses, US social security numbers, phone numbers.

    By pattern: names and postal addresses stay. Numbers that pass no checksum and look like no phone number stay too.
    """
    if not _HINT.search(text):
        return text
    if "@" in text:
        text = _EMAIL.sub("[EMAIL]", text)
    for pattern, is_real, mark in _RULES:
        text = pattern.sub(lambda match, is_real=is_real, mark=mark: mark if is_real(match.group()) else match.group(), text)  # type: ignore[misc]  # mypy infers no default arguments of a lambda
    return text


def _compact(text: str) -> str:
    return re.sub(r"[ -]", "", text)


def is_iban(text: str) -> bool:
    """ISO 13616: mod-97 of the rearranged number is 1."""
    compact = _compact(text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """ISO/IEC 7812: the Luhn sum is a multiple of 10, and not all digits are the same."""
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [d * 2 - 9 if d > 4 else d * 2 for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_ip(text: str) -> bool:
    """An IPv4 or IPv6 address; `::` and clock times are none."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(c.isalnum() for c in text)


def is_phone(text: str) -> bool:
    """7 to 15 digits (E.164), with a plus sign, or grouped as people write numbers; years, amounts and plain long numbers are none."""
    digits = sum(c.isdigit() for c in text)
    if not 7 <= digits <= 15:
        return False
    groups = re.findall(r"\d+", text)
    if text.startswith(("+", "(")) or (text.startswith("00") and digits > 9):
        return True
    if re.fullmatch(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}", text):
        return False  # a date
    if len(groups) == 1:
        return (text.startswith("0") and digits >= 9) or digits in (10, 11)
    return len(groups) <= 6 and len(groups[-1]) >= 2 and all(len(g) <= 5 for g in groups[:-1]) and digits >= 9


def _always(_: str) -> bool:
    return True


_RULES: tuple[tuple[re.Pattern[str], Callable[[str], bool], str], ...] = (
    (_IBAN, is_iban, "[IBAN]"),
    (_CARD, is_card, "[CARD]"),
    (_IPV4, is_ip, "[IP]"),
    (_IPV6, is_ip, "[IP]"),
    (_SSN, _always, "[SSN]"),
    (_PHONE, is_phone, "[PHONE]"),
)
