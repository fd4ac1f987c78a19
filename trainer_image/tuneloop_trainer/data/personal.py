"""Finds personal data by pattern and checksum: what the gateway redacts in captured traffic, and counts it by kind.

Names and postal addresses have no form and stay. The gateway has the same rules (it shares no code with the trainer), and a test
holds both to the same texts, so that what is trained on looks like what is captured.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}\w{2,24}")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,4})?\b", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.])(?:\+|\(|\d)[\d() ./-]{5,24}\d(?!\w)")
_HINT = re.compile(r"[@\d:]")
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")


def redact(text: str, found: Counter[str]) -> str:
    """The text with each find replaced by its kind in brackets, `[EMAIL]`; counts them by kind."""
    if not _HINT.search(text):
        return text
    for pattern, is_real, kind in _RULES:

        def mark(match: re.Match[str], is_real: Callable[[str], bool] = is_real, kind: str = kind) -> str:
            if not is_real(match.group()):
                return match.group()
            found[kind] += 1
            return f"[{kind}]"

        text = pattern.sub(mark, text)
    return text


def is_iban(text: str) -> bool:
    """ISO 13616: the number with its first four places moved to the end is 1 modulo 97."""
    compact = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(place, 36)) for place in compact[4:] + compact[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """ISO/IEC 7812: the Luhn sum is a multiple of 10, and not all digits are the same."""
    digits = [int(place) for place in text if place.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_address(text: str) -> bool:
    """An IPv4 or IPv6 address; `::` and clock times are none."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(place.isalnum() for place in text)


def is_phone(text: str) -> bool:
    """7 to 15 digits (E.164), with a plus sign, or grouped as people write numbers; dates, amounts and plain long numbers are none."""
    digits = sum(place.isdigit() for place in text)
    if not 7 <= digits <= 15:
        return False
    if text.startswith(("+", "(")) or (text.startswith("00") and digits > 9):
        return True
    if _DATE.fullmatch(text):
        return False
    groups = re.findall(r"\d+", text)
    if len(groups) == 1:
        return (text.startswith("0") and digits >= 9) or digits in (10, 11)
    return len(groups) <= 6 and len(groups[-1]) >= 2 and all(len(group) <= 5 for group in groups[:-1]) and digits >= 9


def _always(_: str) -> bool:
    return True


_RULES: tuple[tuple[re.Pattern[str], Callable[[str], bool], str], ...] = (
    (_EMAIL, _always, "EMAIL"),
    (_IBAN, is_iban, "IBAN"),
    (_CARD, is_card, "CARD"),
    (_IPV4, is_address, "IP"),
    (_IPV6, is_address, "IP"),
    (_SSN, _always, "SSN"),
    (_PHONE, is_phone, "PHONE"),
)
