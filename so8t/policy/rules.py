"""What may be trained on. Every rule has a switch of its own name in [data.policy].

- `provenance`: a row says where it comes from: "source" and "license", and from the web also "url" and
  "robots": "allowed". From the web is what has "url" or "robots", or "web", an address or a host name as its source.
- `nsfw`: a row whose "nsfw" is there and not false serves refusal only: its "safety_label" is REFUSE or ESCALATE, every
  answer's final is a refusal, and no answer, thoughts included, is long or quotes a piece of a message that is not the
  assistant's. So that text is never a target. A row is marked by whoever wrote it; nothing here looks for what is not
  marked.
- the rest: no message of a row, prompt or answer, holds such personal data or secret. See personal_data.py.

What breaks a rule is told by file, line and rule, never by content.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from so8t.config import InputError, PolicyConfig
from so8t.files import atomic_write
from so8t.policy.personal_data import FINDERS, plain
from so8t.text import to_utf8
from so8t.thinking import LONGEST_ECHO, final_only, repeats

REPORT_FILE = "policy.json"

# in the order in which a row is held against them, with what a row must be
RULES = {
    "provenance": 'write [[data.sources]] with path, source and license, for the web url and robots = "allowed" too, '
    'or give these as fields of the row ("source", "license", "url", "robots")',
    "nsfw": 'a row with "nsfw" needs "safety_label" REFUSE or ESCALATE and answers that refuse and quote nothing',
    "private_key": "a row must not hold a private key",
    "api_token": "a row must not hold a token, an API key or a password",
    "payment_card": "a row must not hold the number of a payment card",
    "my_number": "a row must not hold a Japanese individual number",
    "email": "a row must not hold an e-mail address",
    "phone": "a row must not hold a phone number",
    "ip_address": "a row must not hold a public IP address",
    "mac_address": "a row must not hold a MAC address",
}
_BETWEEN = "\n\0\n"  # no pattern reaches from one message into the next
LONGEST_REFUSAL = 600  # characters; a longer final does more than refuse
LONGEST_REFUSING_ANSWER = 1200  # characters with thoughts and tags; longer thoughts do more than judge

_FROM_WEB = re.compile(
    r"web(?:\W.*)?|https?:.*|(?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|info|dev|app|[a-z]{2})(?:[:/].*)?",
    re.IGNORECASE | re.DOTALL,
)

_CANNOT = r"(?:can(?:not|'t| not)|won't|will not|unable to|not (?:able|going|willing) to|rather not|do(?:n't| not))"
_DO = (
    r"(?:help(?! but)|assist|write|create|make|draw|produce|generate|invent|provide|give|share|show|describe|discuss"
    r"|advise|look up|support|continue|engage|fulfil|comply|do (?:that|this|it))"
)
_JAPANESE_CANNOT = (
    r"(?:(?<!我慢)(?<!ことが)でき|書け|作れ|描け|続けられ|(?:応|答)えられ|手伝え|(?:教え|見せ|考え|調べ|勧め)られ|扱え|話せ|なれ|沿え"
    r"|応じられ|(?:作成|生成|出力|提供|紹介)し)ません(?!でした|か|、?と)"
)
_REFUSAL = re.compile(
    rf"\bI(?:'m|'d)?(?: \w+){{0,2}}? (?:{_CANNOT}(?: \w+)? {_DO}|{_CANNOT} {_DO})\b"
    r"|\bI(?:'m)?(?: \w+){0,2}? (?:must|have to) (?:decline|refuse|say no)\b|\bI decline\b|\bnot something I can\b"
    rf"|{_JAPANESE_CANNOT}|かね(?:ます|る)|お断り|控え(?:ます|させ)|遠慮(?:し|させ|いたし)",
    re.IGNORECASE,
)
_REFUSES_WITHIN = 160  # characters from the start: a refusal says so first


def broken_rule(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], config: PolicyConfig) -> str | None:
    """The first rule that is on and that the row breaks. `messages` are those of its conversation."""
    switches = vars(config)
    if switches["provenance"] and not _has_provenance(row):
        return "provenance"
    if switches["nsfw"] and row.get("nsfw") not in (None, False) and not _only_refuses(row, messages):
        return "nsfw"
    text = plain(_BETWEEN.join(map(_text_of, messages)))
    return next((rule for rule, finds in FINDERS.items() if switches[rule] and finds(text)), None)


def _text_of(message: Mapping[str, Any]) -> str:
    """All that a message says, calls of tools too."""
    if len(message) == 2:
        return str(message["content"])
    return _BETWEEN.join(
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in message.values()
    )


def _has_provenance(row: Mapping[str, Any]) -> bool:
    source, license_, url, robots = (row.get(name) for name in ("source", "license", "url", "robots"))
    if not all(isinstance(text, str) and text.strip() for text in (source, license_)):
        return False
    if url is None and robots is None and not _FROM_WEB.fullmatch(str(source).strip()):
        return True
    return isinstance(url, str) and re.match(r"https?://\w", url) is not None and robots == "allowed"


def _only_refuses(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
    prompts = [message["content"] for message in messages if message["role"] != "assistant"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return row.get("safety_label") in ("REFUSE", "ESCALATE") and all(
        is_refusal(final_only(answer) or answer)
        and len(answer) <= LONGEST_REFUSING_ANSWER
        and not any(repeats(answer, prompt, LONGEST_ECHO["safety"]) for prompt in prompts)
        for answer in answers
    )


def is_refusal(final: str) -> bool:
    """Whether a final, English or Japanese, declines. A heuristic; tests/policy/test_policy.py measures it."""
    text = plain(final).replace("’", "'")
    return len(text) <= LONGEST_REFUSAL and _REFUSAL.search(text[:_REFUSES_WITHIN]) is not None


@dataclass(frozen=True)
class PolicyReport:
    """What the policy left out of some files; the fields are those of policy.json. No content of a row is in it."""

    mode: str
    rows_read: int  # bad rows included
    rows_used: int  # of those read, however many rows of tokens they become
    counts: dict[str, int]  # rows dropped by each rule; a rule that is off is not in it
    dropped: list[dict[str, str | int]]  # {"file", "line", "rule"}: the first rule that the row breaks
    files: list[str] = field(default_factory=list)  # that were read; older versions did not write it

    def summary(self) -> str:
        """One clause for the `data:` line."""
        found = ", ".join(f"{rule} {count}" for rule, count in self.counts.items() if count)
        off = ", ".join(rule for rule in RULES if rule not in self.counts)
        return (
            f"data.policy left out {len(self.dropped)} rows"
            + (f" ({found})" if found else "")
            + (f", with {off} switched off" if off else "")
        )

    def write(self, output_dir: Path, is_main: bool) -> None:
        """Write policy.json; only the main rank does."""
        if is_main:
            with atomic_write(output_dir / REPORT_FILE) as file:
                file.write(to_utf8(json.dumps(asdict(self), ensure_ascii=False, indent=1)) + b"\n")


def files_read(report: PolicyReport | None, train_data: Sequence[str]) -> Sequence[str]:
    """The files that a run was trained on; what its config names if it left no report, or an older version did."""
    return report.files if report is not None and report.files else train_data


def read_report(folder: Path) -> PolicyReport | None:
    """What policy.json in a run's folder says; None if there is none. Raises InputError if it is no such file."""
    path = folder / REPORT_FILE
    try:
        return PolicyReport(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # no JSON in UTF-8; no object, or not of these keys
        raise InputError(f"{path} is no policy report of so8t ({error}); delete it to leave it out") from error


def make_report(
    config: PolicyConfig, rows_read: int, rows_used: int, dropped: Sequence[tuple[str, str]], files: Sequence[str]
) -> PolicyReport:
    """dropped: "file:line" and rule of every row that broke one; files: all that were read."""
    counts = {rule: sum(broken == rule for _, broken in dropped) for rule in RULES if vars(config)[rule]}
    listed: list[dict[str, str | int]] = []
    for location, rule in dropped:
        file, _, line = location.rpartition(":")
        listed.append({"file": file, "line": int(line), "rule": rule})
    return PolicyReport(config.mode, rows_read, rows_used, counts, listed, list(files))
