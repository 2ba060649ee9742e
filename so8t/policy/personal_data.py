"""Personal data and secrets in a text, English or Japanese.

Each finder is one predicate on a text that `plain` prepared. What is reserved for documentation or belongs to nobody
in particular does not count: example.com and its like (RFC 2606; example.jp by JPRS), 192.0.2.0/24 and 2001:db8::/32,
loopback and private addresses, public resolvers such as 8.8.8.8, version numbers, toll-free and emergency numbers,
555-0100 to 555-0199 (fiction), the card networks' published test numbers, tokens that are visibly placeholders.

These are patterns, not certainty. Of other numbers with 12 digits one in ten passes the check of a Japanese individual
number, so only the word before it (order, tracking, 注文番号) tells them apart. Names and street addresses are not
looked for. tests/policy/test_policy.py states precision and recall.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

from so8t.text import Fold

_DASHES = "‐‑‒–—―−⁃﹘﹣－─━"


def _plain_character(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # zero-width characters
        return ""
    return "-" if character in _DASHES else unicodedata.normalize("NFKC", character)


_PLAIN = Fold(_plain_character)
_LONG_VOWEL_AS_DASH = re.compile(r"(?<=\d)ー(?=\d)")  # how ０９０ー１２３４ is typed


def plain(text: str) -> str:
    """Full-width letters and digits as ASCII, every dash a hyphen, nothing invisible."""
    if text.isascii():
        return text
    return _LONG_VOWEL_AS_DASH.sub("-", text.translate(_PLAIN))


# ---- secrets

_PRIVATE_KEY = re.compile(
    # a header alone is talk about keys; some hundred characters of other headers may stand before the key
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:(?!-----).){0,200}?[A-Za-z0-9+/]{40}",
    re.DOTALL,
)


def has_private_key(text: str) -> bool:
    return "PRIVATE KEY" in text and bool(_PRIVATE_KEY.search(text))


# formats as their issuers document them; the group is what varies. A password that begins with ${<% is a variable
_KNOWN_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)([A-Z2-7]{16})(?![A-Z0-9])"  # Amazon
    r"|gh[oprsu]_([A-Za-z0-9]{36})|github_pat_([A-Za-z0-9_]{60,})|glpat-([\w-]{20,})"  # GitHub, GitLab
    r"|xox[abeoprs]-([A-Za-z0-9-]{20,})|hooks\.slack\.com/services/(T\w+/B\w+/\w{20,})"  # Slack
    r"|AIza([\w-]{35})|ya29\.([\w-]{30,})"  # Google
    r"|sk-(?:proj-|ant-|svcacct-)?([\w-]{32,})|hf_([A-Za-z0-9]{30,})"  # OpenAI, Anthropic and their like; Hugging Face
    r"|[rs]k_(?:live|test)_([A-Za-z0-9]{20,})"  # Stripe
    r"|SG\.([\w-]{20,24}\.[\w-]{40,})|npm_([A-Za-z0-9]{36})|pypi-([\w-]{60,})"  # SendGrid, npm, PyPI
    r"|d[op][ort]_v1_([a-f0-9]{64})|dapi([a-f0-9]{32})|key-([a-f0-9]{32})"  # DigitalOcean, Databricks, Mailgun
    r"|\d{8,10}:(AA[\w-]{33})"  # Telegram
    r"|eyJ([\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,})"  # JSON web tokens
    r"|\w+://[^\s:/@]+:(?![${<%])([^\s:/@]{8,})@(?!localhost\b|example\.)"  # a password in a URL
    r"|-u \w+:(?![${<%])(\S{12,})"  # and in a call of curl
    r")",
    re.ASCII,
)
_NAMED_TOKEN = re.compile(  # any value with a digit that is assigned to a name that means a secret
    r"(?:bearer\s|(?:(?:api|access|account|private)[ _-]?key|secret(?:[ _-]?(?:access[ _-]?)?key)?|token|passw(?:or)?d"
    r"|APIキー|トークン|パスワード|シークレット)[\"']?\s{0,3}(?:=>|[:=は])\s{0,3}[\"'「]?)"
    r"(?=[A-Za-z+/=._-]{0,80}\d)([\w+/=.-]{20,}+)(?!\()",  # not the call of a function
    re.ASCII | re.IGNORECASE,
)
_FEWEST_DISTINCT = 10  # characters of a random secret, not of a placeholder


# texts without any of these, which are most, need none of the two patterns
_KNOWN_HINTS = (
    "AKIA",
    "ASIA",
    "gho_",
    "ghp_",
    "ghr_",
    "ghs_",
    "ghu_",
    "github_pat_",
    "glpat-",
    "xox",
    "hooks.slack",
    "AIza",
    "ya29.",
    "sk-",
    "hf_",
    "_live_",
    "_test_",
    "SG.",
    "npm_",
    "pypi-",
    "_v1_",
    "dapi",
    "key-",
    ":AA",
    "eyJ",
)
_NAMED_HINTS = ("bearer", "key", "token", "passw", "secret", "apiキー", "トークン", "パスワード", "シークレット")

_LONG_WORD = re.compile(r"[\w+/=.-]{20}", re.ASCII)
_DIGIT = re.compile(r"\d", re.ASCII)


def has_api_token(text: str) -> bool:
    long = " ".join([word for word in text.split() if len(word) >= 20])  # all but passwords are in one of these
    is_known = "-u " in text or ("://" in text and "@" in text) or any(hint in long for hint in _KNOWN_HINTS)
    folded = text.casefold() if _DIGIT.search(long) and _LONG_WORD.search(long) else ""
    is_named = any(hint in folded for hint in _NAMED_HINTS)
    bodies = [match[match.lastindex or 0] for match in _KNOWN_TOKEN.finditer(text)] if is_known else []
    bodies += [match[1] for match in _NAMED_TOKEN.finditer(text)] if is_named else []
    return any(
        len(set(body)) >= _FEWEST_DISTINCT and re.search("[A-Z0-9]", body) and "example" not in body.lower()
        for body in bodies
    )


# ---- numbers with a check digit

_CARD = re.compile(
    r"(?<![\w-])(?<!\d\.)(?:\d{13,19}|\d{4}([ .-])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ .-])\d{6}\2\d{4,5})(?![\w-]|\.\d)",
    re.ASCII,
)
_CARD_NETWORK = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"  # Visa, Mastercard
    r"|3[47]\d{13}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"  # American Express, JCB, Diners
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17}"  # Discover, UnionPay
)
_TEST_CARDS = {
    "4111111111111111",
    "4012888888881881",
    "4242424242424242",
    "4000056655665556",
    "4222222222222",
    "5555555555554444",
    "5105105105105100",
    "2223003122003222",
    "5200828282828210",
    "378282246310005",
    "371449635398431",
    "3530111333300000",
    "3566002020360505",
    "6011111111111117",
    "6011000990139424",
    "30569309025904",
    "38520000023237",
}


# a term or the result of a sum: a number stands on the other side of the sign
_SUM_BEFORE, _SUM_BEHIND = re.compile(r"\d\s*[+=]\s*$|\d\s+[-−×*]\s+$"), re.compile(r"\s*[+=]\s*\d|\s+[-−×*]\s+\d")


def _is_in_sum(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 8) : match.start()]
    return bool(_SUM_BEFORE.search(before) or _SUM_BEHIND.match(text, match.end()))


# The hints begin with one class of characters, and no flag ignores case: so re skips to the next such character.
_NUMBER_HINT = re.compile(r"\d\d{3}[ .-]?\d{4}", re.ASCII)  # every number of twelve digits and more has it


@lru_cache(1)  # two rules ask about the same text
def _has_long_number(text: str) -> bool:
    return bool(_NUMBER_HINT.search(text))


def has_payment_card(text: str) -> bool:
    if not _has_long_number(text):
        return False
    for match in _CARD.finditer(text):
        number = re.sub(r"\D", "", match[0])
        is_other = number in _TEST_CARDS or _is_article(number) or _is_in_sum(text, match)
        if _CARD_NETWORK.fullmatch(number) and _passes_luhn(number) and not is_other:
            return True
    return False


def _passes_luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    digits = [int(digit) for digit in reversed(number)]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def _is_article(number: str) -> bool:
    """An EAN-13 or JAN code, which is what 13 digits mostly are today."""
    digits = [int(digit) for digit in reversed(number)]
    return len(number) == 13 and (sum(digits[::2]) + 3 * sum(digits[1::2])) % 10 == 0


_TWELVE_DIGITS = re.compile(r"(?<![\w-])(?<!\d\.)(?:\d{12}|\d{4}([ -])\d{4}\1\d{4})(?![\w-]|\.\d)", re.ASCII)
# what orders, parcels and the like are called by, directly before their number
_OTHER_NUMBER = re.compile(
    r"(?:(?:注文|伝票|追跡|受付|問い?合わ?せ|荷物|請求書?|管理|会員|予約|参照)番号|ロット|シリアル|arn:\S*"
    r"|\b(?:order|tracking|invoice|parcel|lot|serial|account|ticket)(?:\s(?:number|no|id))?)[^\d\n。]{0,4}$",
    re.IGNORECASE,
)


def has_my_number(text: str) -> bool:
    if not _has_long_number(text):
        return False
    for match in _TWELVE_DIGITS.finditer(text):
        number = re.sub(r"\D", "", match[0])
        is_called_other = _OTHER_NUMBER.search(text[max(0, match.start() - 40) : match.start()])
        is_other = is_called_other or _is_timestamp(number) or _is_in_sum(text, match)
        if _passes_my_number_check(number) and len(set(number)) > 1 and not is_other:
            return True
    return False


def _passes_my_number_check(number: str) -> bool:
    """Ordinance 85 of the Ministry of Internal Affairs and Communications (2014), article 5."""
    total = sum(int(digit) * weight for digit, weight in zip(number, (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2), strict=False))
    return int(number[-1]) == -total % 11 % 10


def _is_timestamp(number: str) -> bool:
    with suppress(ValueError):
        return 1900 < datetime.strptime(number, "%Y%m%d%H%M").year < 2100
    return False


# ---- ways to reach somebody

# as written, and as it is hidden from machines
_AT = r"(?:@|%40|&#0*64;|(?<=\w)★|\s?[\[({<]\s?(?:at|a|@|アット(?:マーク)?|あっと)\s?[\])}>]\s?)"
_DOT = r"(?:\.|\s?[\[({<]\s?(?:dot|\.|ドット|どっと)\s?[\])}>]\s?)"
_SPOKEN_AT, _SPOKEN_DOT = r"\s(?:at|アット(?:マーク)?|あっと)\s", r"\s(?:dot|ドット|どっと)\s"
_EMAIL = re.compile(
    r"(?<![\w.+%-])([a-z0-9][\w.+-]{0,63})"
    rf"(?:{_AT}((?:[a-z0-9-]{{1,63}}{_DOT}){{1,8}})|{_SPOKEN_AT}((?:[a-z0-9-]{{1,63}}{_SPOKEN_DOT}){{1,8}}))"
    r"([a-z]{2,18})(?![\w-])",
    re.ASCII | re.IGNORECASE,
)
# the countries' and the common others: `a @ b.transpose` is no address
_TOP_LEVEL_DOMAIN = re.compile(
    r"[a-z]{2}|com|net|org|edu|gov|mil|int|info|biz|name|pro|mobi|asia|app|dev|page|cloud|email|mail|online|site|shop"
    r"|store|tech|xyz|top|club|blog|work|life|live|world|news|media|art|design|studio|agency|company|link|website|icu"
    r"|tokyo|osaka|kyoto|nagoya|yokohama|okinawa|moe"
)
_PLACEHOLDER_DOMAIN = re.compile(  # what examples take for somebody's
    r"(?:.*\.)?(?:(?:my|your|our|the|some|any)?-?(?:company|domain|email|site|website|organi[sz]ation|business)|acme|foo|bar)"
    r"\.(?:com|org|net)"
)
_RESERVED_DOMAIN = re.compile(r"(?:.*\.)?(?:example\d?(?:\.[a-z]{2,3}){1,2}|example|test|invalid|localhost|local)")


_AT_HINTS = ("@", "%40", "&#", "★", "アット", "あっと")  # or it is spelled, between brackets or words
_AT_HINT = re.compile(r"[\[({<]\s?(?:at|a)\s?[\])}>]", re.ASCII | re.IGNORECASE)


def has_email(text: str) -> bool:
    if not (any(hint in text for hint in _AT_HINTS) or "dot" in text.casefold() or _AT_HINT.search(text)):
        return False
    for match in _EMAIL.finditer(text):
        user, ending = match[1].lower(), match[4].lower()
        domain = re.sub(f"{_DOT}|{_SPOKEN_DOT}", ".", (match[2] or match[3]).lower()) + ending
        is_reserved = _RESERVED_DOMAIN.fullmatch(domain) or _PLACEHOLDER_DOMAIN.fullmatch(domain)
        is_domain = _TOP_LEVEL_DOMAIN.fullmatch(ending) and not is_reserved
        is_nobody = user == "git" or len(set(user)) == 1 or user.startswith("your")
        if is_domain and not is_nobody:
            return True
    return False


_KANJI_DIGITS = str.maketrans("〇零一二三四五六七八九", "00123456789")
_GAP = r"[ .()の-]{1,2}"
_PHONE = re.compile(
    r"(?<![\w.-])(?:"
    r"\+(?!0|800|1[ .(-]{0,2}8(?:00|33|44|55|66|77|88))\d(?:[ .()-]{0,2}\d){8,14}"  # any country
    # Japan: mobile and internet telephony with 11 digits, others with 10
    rf"|\(?0[5-9]0\)?(?:{_GAP})?[1-9]\d{{3}}(?:{_GAP})?\d{{4}}"
    rf"|\(?(?!0120|0570|0800|0990)0[1-9](?:{_GAP}\d{{4}}|\d{_GAP}\d{{3}}|\d\d{_GAP}\d\d|\d{{3}}{_GAP}\d){_GAP}\d{{4}}"
    # North America
    r"|(?:0{0,2}1[ .-])?(?!\(?8(?:00|33|44|55|66|77|88))(?:\([2-9]\d\d\) ?|[2-9]\d\d(?:(?P<gap>[.-])|[ ](?=\d{3}-)))"
    r"(?!555.01)[2-9]\d\d(?(gap)(?P=gap)|[ -])\d{4}"
    r")(?!(?!x\d)\w|[.-]\d)"
    # without gaps, or with spaces as between any numbers, only where the text says so
    r"|(?:電話|連絡先|携帯|\b(?:tel|phone|mobile|cell|call|fax)\b)[^\d\n]{0,8}"
    r"(?:0[1-9]\d{8}|[2-9]\d\d ?[2-9]\d\d ?\d{4})(?!\d)",
    re.ASCII | re.IGNORECASE,
)


_PHONE_HINT = re.compile(r"\d[ .()の-]{0,3}\d[ .()の-]{0,3}\d[ .()の-]{0,3}\d[ .()の-]{0,3}\d", re.ASCII)


def has_phone(text: str) -> bool:
    if not text.isascii():
        text = text.translate(_KANJI_DIGITS)
    if not _PHONE_HINT.search(text):
        return False
    return any(
        not _OTHER_NUMBER.search(text[max(0, match.start() - 40) : match.start()]) and not _is_addend(text, match)
        for match in _PHONE.finditer(text)
    )


def _is_addend(text: str, match: re.Match[str]) -> bool:
    """Say whether the plus of an international number adds it to another one."""
    return (
        match[0].startswith("+") and re.search(r"\d\s*$", text[max(0, match.start() - 4) : match.start()]) is not None
    )


# ---- machines of somebody

_IPV4 = re.compile(r"(?<![\w.-])(?<![^/]/)(?<![=<>~!]=)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(  # only 2000::/3 is given to anybody
    r"(?<![\w.])(?<!::)(?<!\b[0-9a-f]{4}:)[23][0-9a-f]{3}:[0-9a-f:]*[0-9a-f](?!\w)", re.ASCII | re.IGNORECASE
)
_VERSION = re.compile(
    r"(?:\br?v|ver\.?|version|build|release|firmware|section|chapter|第|バージョン|ファームウェア|版|§)[\s:]*$",
    re.IGNORECASE,
)


_RANGE = re.compile(r"/(?!32\b|128\b)\d{1,3}(?!\d|\.\d)", re.ASCII)  # of many machines, as providers publish them
_IPV4_HINT = re.compile(r"\d\.\d{1,3}\.\d", re.ASCII)
_IPV6_HINT = re.compile(r"[23][0-9A-Fa-f]{3}:")


def has_ip_address(text: str) -> bool:
    matches = [*_IPV4.finditer(text)] if _IPV4_HINT.search(text) else []
    matches += _IPV6.finditer(text) if text.count(":") > 1 and _IPV6_HINT.search(text) else []
    for match in matches:
        with suppress(ValueError):
            address = ipaddress.ip_address(match[0])
            # with four such small numbers it is a version, a section or a public resolver
            is_small = address.version == 4 and max(address.packed) < 10
            is_version = _VERSION.search(text[max(0, match.start() - 20) : match.start()])
            is_range = _RANGE.match(text, match.end())
            if address.is_global and not address.is_multicast and not (is_small or is_version or is_range):
                return True
    return False


_MAC = re.compile(
    r"(?<![\w.-])(?<!\b[0-9a-f]{2}:)(?:[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}"
    r"|[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4})(?!\w|[:.-]\w)",
    re.ASCII | re.IGNORECASE,
)
# broadcast, placeholders, RFC 9542
_NO_DEVICE = re.compile("0{12}|f{12}|aabbccddeeff|001122334455|00005e0053..|01005e9010..")


_MAC_HINT = re.compile(r"[:.-][0-9A-Fa-f]{2}(?:[:-]|[0-9A-Fa-f]{2}\.)")


def has_mac_address(text: str) -> bool:
    if not _MAC_HINT.search(text):
        return False
    for match in _MAC.finditer(text):
        number = re.sub("[:.-]", "", match[0].lower())
        is_number = match[1] != ":" and number.isdecimal()  # draws and codes, far more often than a device
        if not is_number and not _NO_DEVICE.fullmatch(number):
            return True
    return False


FINDERS: dict[str, Callable[[str], bool]] = {
    "private_key": has_private_key,
    "api_token": has_api_token,
    "payment_card": has_payment_card,
    "my_number": has_my_number,
    "email": has_email,
    "phone": has_phone,
    "ip_address": has_ip_address,
    "mac_address": has_mac_address,
}
