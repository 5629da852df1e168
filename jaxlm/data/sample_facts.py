"""Facts that Unicode CLDR states in Korean and English, read through babel."""

import functools
import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_currency_symbol, get_territory_currencies

HELD_OUT_SHARE = 10  # One fact in ten.
ENGLISH, KOREAN = Locale("en"), Locale("ko")
# Codes that name no place, or whose status is disputed: an example text need not take sides.
_NO_PLACE = {"EU", "EZ", "UN", "QO", "XA", "XB", "ZZ", "CQ", "UM", "EH", "PS"}
_NO_CITY = {"Europe/Simferopol", "Asia/Jerusalem"}
_WITH_ARTICLE = re.compile(
    r"^United |(Islands|Territor(y|ies)|Netherlands|Bahamas|Gambia|Maldives|Comoros|Philippines|Republic)$|^Isle ")
_ODD_SCRIPTS = {"Hans", "Hant", "Jpan", "Kore", "Cans", "Egyp", "Xsux", "Sgnw"}
_UNITS = re.compile(r"(area|digital|duration|electric|energy|force|frequency|length|light|mass|power|pressure|volume)-")


class Fact(NamedTuple):
    """`kind` says what `value` is of `entity`; both are (type, code) pairs that `names` can spell."""

    kind: str
    entity: tuple[str, str]
    value: tuple[str, str]

    @property
    def held_out(self) -> bool:
        """Decided by what the fact says, so it is the same in every language, template and seed."""
        # By names, not by codes: St. Barthélemy is a territory and a city, and both are called the same.
        said = [self.kind, *(names().get(item, item[1:]) for item in (self.entity, self.value))]
        digest = hashlib.sha256(repr(said).encode()).digest()
        return int.from_bytes(digest[:8]) % HELD_OUT_SHARE == 0


@functools.cache
def names() -> dict[tuple[str, str], tuple[str, str]]:
    """(type, code) to (Korean, English) names, only those that read well in both."""
    found: dict[tuple[str, str], tuple[str, str]] = {}

    def add(kind: str, code: str, korean: str | None, english: str | None) -> None:
        if korean and english and korean != code and not re.search(r"[()]| - |-.*-|,| SAR ", korean + english):
            found[kind, code] = korean, english.replace(" & ", " and ")

    for code, english in ENGLISH.territories.items():
        if re.fullmatch("[A-Z]{2}", code) and code not in _NO_PLACE:
            add("territory", code, KOREAN.territories.get(code), english)
            for currency in get_territory_currencies(code):
                add("currency", currency, get_currency_name(currency, locale=KOREAN),
                    get_currency_name(currency, count=1, locale=ENGLISH))
    for code in sorted(_main_languages()):
        add("language", code, KOREAN.languages.get(code), ENGLISH.languages.get(code))
    for code, english in ENGLISH.scripts.items():
        if (KOREAN.scripts.get(code) or "").endswith(("문자", "로마자")) and code not in _ODD_SCRIPTS:
            add("script", code, KOREAN.scripts[code], english)
    for zone, territory in get_global("zone_territories").items():
        if zone.count("/") == 1 and territory not in _NO_PLACE and zone not in _NO_CITY:
            english = ENGLISH.time_zones.get(zone, {}).get("city") or zone.partition("/")[2].replace("_", " ")
            add("city", zone, KOREAN.time_zones.get(zone, {}).get("city"), english)
    korean_units, english_units = KOREAN.unit_display_names, ENGLISH.unit_display_names
    for code in english_units:
        # "Imp." and the like are abbreviations, and one calorie is enough.
        if _UNITS.match(code) and code != "energy-foodcalorie" and "." not in (english_units[code].get("long") or "."):
            add("unit", code, korean_units.get(code, {}).get("long"), english_units[code].get("long"))
    for day in range(7):
        add("weekday", str(day), KOREAN.days["format"]["wide"][day], ENGLISH.days["format"]["wide"][day])
    for month in range(1, 13):
        add("month", str(month), KOREAN.months["format"]["wide"][month], ENGLISH.months["format"]["wide"][month])
    return found | {("mark", "."): ("마침표", "period"), ("mark", ","): ("쉼표", "comma")}


@functools.cache
def facts(held_out: bool) -> tuple[Fact, ...]:
    """All facts of one side of the split, in a fixed order."""
    return tuple(sorted({fact for fact in _all_facts() if fact.held_out == held_out}))


def spell(item: tuple[str, str], language: str, plain: bool = False) -> str:
    """The name of an entity or value as it stands in a sentence, in English with its article unless `plain`."""
    if item[0] in ("code", "symbol"):
        return item[1]
    korean, english = names()[item]
    if language == "ko":
        return korean
    if plain:
        return english
    if item[0] == "currency" or (item[0] == "territory" and _WITH_ARTICLE.search(english)):
        return f"the {english}"
    return f"the {english} script" if item[0] == "script" else english


def _main_languages() -> set[str]:
    listed = {language for code in ENGLISH.territories for language in get_official_languages(code, de_facto=True)}
    return {code for code in ENGLISH.languages if len(code) == 2 or code in listed}


def _all_facts() -> Iterator[Fact]:
    known, likely = names(), get_global("likely_subtags")
    for item in known:
        kind, code = item
        if kind in ("territory", "language", "currency", "city"):
            yield Fact("name", item, item)
        elif kind in ("unit", "weekday", "month"):
            yield Fact("word", item, item)
        if kind == "territory":
            yield from _territory_facts(item)
        elif kind == "language":
            if len(code) == 2:
                yield Fact("language_code", item, ("code", code))
            script = ("script", likely.get(code, "__").split("_")[1])
            if script in known:
                yield Fact("script", item, script)
        elif kind == "currency":
            yield Fact("currency_code", item, ("code", code))
            symbol = get_currency_symbol(code, KOREAN)
            # CLDR adds letters (MX$) to tell currencies apart; what they are written with at home is another matter.
            if symbol == get_currency_symbol(code, ENGLISH) and not re.search("[A-Za-z]", symbol):
                yield Fact("symbol", item, ("symbol", symbol))
        elif kind == "city":
            territory = ("territory", get_global("zone_territories")[code])
            # "Singapore is in Singapore" tells nothing.
            if territory in known and not any(a in b or b in a for a, b in zip(known[item], known[territory],
                                                                              strict=True)):
                yield Fact("city", item, territory)
    for day in range(7):
        yield Fact("day_after", ("weekday", str(day)), ("weekday", str((day + 1) % 7)))
    for month in range(1, 13):
        yield Fact("month_after", ("month", str(month)), ("month", str(month % 12 + 1)))


def _territory_facts(item: tuple[str, str]) -> Iterator[Fact]:
    code = item[1]
    yield Fact("territory_code", item, ("code", code))
    currencies = get_territory_currencies(code)
    if len(currencies) == 1 and ("currency", currencies[0]) in names():
        yield Fact("currency", item, ("currency", currencies[0]))
    languages = [language for language in get_official_languages(code, de_facto=True)
                 if ("language", language) in names()]
    for language in languages:
        yield Fact("language", item, ("language", language))
    try:
        locale = Locale(languages[0], territory=code) if languages else None
    except UnknownLocaleError:
        return
    if locale is None:
        return
    yield Fact("first_day", item, ("weekday", str(locale.first_week_day)))
    mark = locale.number_symbols.get("latn", {}).get("decimal")
    if locale.default_numbering_system == "latn" and ("mark", mark) in names():
        yield Fact("decimal", item, ("mark", mark))
