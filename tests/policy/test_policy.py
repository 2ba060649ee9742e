"""The data policy: what each rule takes out, how well the finders do on labelled lines, and what the report says.

policy_cases.jsonl was written before any finder: made-up data only, near misses included. The finders were tuned on one
half; the other half was scored once, afterwards, and nothing was changed because of it. Both came from one hand, so
they flatter the finders. Measured, lines with a finding as positives:

    tuning    precision 81/82, recall 81/81    refusals 35/35
    held out  precision 81/82, recall 81/81    refusals 35/35

The secrets among them are spelled with JSON's \\u escapes, so that no scanner of repositories takes them for real.
"""

import json
import string
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t.config import PolicyConfig
from so8t.data import read_conversation
from so8t.policy.personal_data import FINDERS, has_my_number, has_payment_card, plain
from so8t.policy.rules import LONGEST_REFUSAL, RULES, broken_rule, is_refusal, make_report

CASES = [json.loads(line) for line in (Path(__file__).parent / "policy_cases.jsonl").read_text("utf-8").splitlines()]
SAMPLE = Path(__file__).parents[2] / "so8t" / "demo" / "sample.jsonl"
OWN = {"source": "own", "license": "CC0-1.0"}
WEB = OWN | {"source": "web", "url": "https://example.com/a", "robots": "allowed"}


def row_of(output: str, **fields: Any) -> dict[str, Any]:
    return OWN | {"instruction": "Q", "output": output} | fields


def rule_of(row: dict[str, Any], **switches: Any) -> str | None:
    return broken_rule(row, read_conversation(row).messages, PolicyConfig(**switches))


def found_in(text: str) -> set[str]:
    return {rule for rule, finds in FINDERS.items() if finds(plain(text))}


# ---- the labelled lines


@pytest.mark.parametrize("half", ["tuning", "held_out"])
def test_precision_and_recall_are_at_the_measured_levels(half: str) -> None:
    wanted, hit, false_alarms = Counter[str](), Counter[str](), []
    for case in CASES:
        if case["half"] != half or case["group"] == "nsfw":
            continue
        found = found_in(case["text"])
        if case["rule"] is None:
            false_alarms += [case["text"]] if found else []
        else:
            wanted[case["rule"]] += 1
            hit[case["rule"]] += case["rule"] in found
    assert hit == wanted  # recall
    assert wanted.total() == 81
    assert hit.total() / (hit.total() + len(false_alarms)) >= 81 / 82, false_alarms  # precision


@pytest.mark.parametrize("half", ["tuning", "held_out"])
def test_refusals_are_told_from_compliance_at_the_measured_level(half: str) -> None:
    finals = [case for case in CASES if case["half"] == half and case["group"] == "nsfw"]
    wrong = [case["text"] for case in finals if is_refusal(case["text"]) == (case["rule"] == "nsfw")]
    assert len(finals) == 35
    assert wrong == []


def test_the_sample_breaks_no_rule_and_its_refusals_are_seen() -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    assert [rule_of(row) for row in rows] == [None] * len(rows)
    unsafe = [row for row in rows if row["safety"].startswith("Unsafe")]
    assert sum(is_refusal(row["final"]) for row in unsafe) / len(unsafe) > 0.8
    assert sum(is_refusal(row["final"]) for row in rows if row not in unsafe) <= 1  # a party that is declined


# ---- the finders beyond their cases


def wide(text: str) -> str:
    return "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text)


@given(st.text(string.printable))
def test_full_width_text_is_read_like_its_ascii_form(text: str) -> None:
    assert plain(wide(text)) == plain(text)


@given(st.text())
def test_no_text_makes_a_finder_fail(text: str) -> None:
    assert found_in(text) <= set(RULES)


PLANTED = [
    ("email", "wren.f@brindlewick-mail.com"),
    ("phone", "090-1234-5678"),
    ("payment_card", "4000 0012 3456 7899"),
    ("my_number", "1234 5678 9018"),
    ("ip_address", "29.41.7.200"),
    ("mac_address", "D8:3A:DD:41:7C:0E"),
]


@given(st.sampled_from(PLANTED), st.text(), st.text(), st.booleans())
def test_personal_data_is_found_wherever_it_stands(
    planted: tuple[str, str], before: str, after: str, is_wide: bool
) -> None:
    rule, datum = planted
    datum = wide(datum) if is_wide else datum
    assert rule in found_in(f"{before}\n、 {datum} 、\n{after}")


def test_zero_width_characters_and_odd_dashes_hide_nothing() -> None:
    assert "phone" in found_in("090\u200b-1234\u2060-5678")
    for dash in "‐‑–—−ー－":
        assert "phone" in found_in(f"090{dash}1234{dash}5678")


def test_a_check_digit_decides_over_cards_and_individual_numbers() -> None:
    assert [has_payment_card(f"400000123456789{digit}") for digit in range(10)].count(True) == 1
    # a remainder of 0 and one of 1 both give the digit 0, so every stem has exactly one
    assert [has_my_number(f"12345678901{digit}") for digit in range(10)] == [digit == 8 for digit in range(10)]


@pytest.mark.parametrize(
    "text",
    [
        "01-02-2024 10:30",
        "widths 256 512 1024, then 384 768 1536",
        "05.06.2023 14:30 Uhr",
        "月曜 01-02-2024 10時30分",
        "a gain of +0.0001234567",
        "access_token = oauth2.get_access_token(client)",
        "postgres://user:${DB_PASSWORD}@db.brindlewick.com/app",
        'f"postgresql://{USER_NAME}:{DB_PASSWORD}@{HOST}/db"',
        "curl -u admin:$ADMIN_PASSWORD1 https://brindlewick.com",
        "123456789018 + 5 = 123456789023",
        "Add 400000123456 and 7: 400000123456 + 7",
        "7 + 123456789018",
        "The sum is 5 + 4000001234567899 = 4000001234567904",
        "2000000000000 +123456789012345",
        "Write to jane@company.com, ann@mycompany.com or info@email.com.",
        "The provider publishes 29.40.0.0/10 and 29.41.7.0/24.",
    ],
)
def test_dates_calls_variables_sums_placeholders_and_ranges_are_nobodys_data(text: str) -> None:
    assert found_in(text) == set()


def test_a_landline_is_found_with_an_area_code_of_any_length_and_only_with_ten_digits() -> None:
    numbers = ["03-1234-5678", "(045)123-4567", "0467 12 3456", "04992-1-2345"]
    assert [found_in(number) for number in numbers] == [{"phone"}] * 4
    assert found_in("03-123-4567") == found_in("0467-1-2345 6") == set()


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1-", "a.", "ab:", "2001:", "0(", "+1 ", "0 ", "token=", "token ", "a (at) ", "a at ", "x@", "a://b:"),
        *("eyJa.", "-----BEGIN PRIVATE KEY-----", "hooks.slack.com/services/T", "e\u0301\u0323"),
    ],
)
def test_finders_take_time_in_proportion_to_the_text(piece: str) -> None:
    started = time.process_time()
    found_in(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2  # where it grew with the square it took over a minute


# ---- provenance


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        (OWN, True),
        (OWN | {"url": None, "robots": None}, True),  # columns that a data set has for other rows
        (WEB, True),
        (WEB | {"source": "ja.wikipedia.org"}, True),
        ({}, False),
        ({"source": "own"}, False),
        ({"license": "MIT"}, False),
        (OWN | {"source": " "}, False),
        (OWN | {"license": ["MIT"]}, False),
        (OWN | {"source": "web"}, False),
        (OWN | {"source": "ja.wikipedia.org"}, False),
        (OWN | {"source": "web: a crawl of blogs"}, False),
        (OWN | {"source": "web crawl"}, False),
        (OWN | {"source": "blog.example.info:8080"}, False),
        (OWN | {"source": " ja.wikipedia.org "}, False),
        (OWN | {"source": "webbing of spiders, own notes"}, True),
        (OWN | {"source": "https://example.com/a"}, False),
        (OWN | {"url": "https://example.com/a"}, False),
        (OWN | {"robots": "allowed"}, False),
        (WEB | {"robots": "disallowed"}, False),
        (WEB | {"robots": True}, False),
        (WEB | {"robots": None}, False),
        (WEB | {"url": "example.com/a"}, False),
        (WEB | {"url": 3}, False),
    ],
)
def test_a_row_says_where_it_comes_from_and_from_the_web_that_robots_may(fields: dict[str, Any], passes: bool) -> None:
    row = {"instruction": "Q", "output": "A"} | fields
    assert rule_of(row) == (None if passes else "provenance")
    assert rule_of(row, provenance=False) is None


# ---- rows marked nsfw

MARKED = OWN | {"nsfw": True, "safety_label": "REFUSE"}
PARTS = {"task": "Asks for sexual content.", "safety": "Unsafe: no consent.", "policy": "Decline and offer help."}
QUERY = "Write how Tove and the stranger undress each other in the hotel room by the sea"
REFUSAL = "I can't write that. A story of their friendship is something I could do."


def four_parts(final: str, **parts: str) -> dict[str, Any]:
    return MARKED | {"query": QUERY, **PARTS, "final": final} | parts


def chat(*answers: str) -> dict[str, Any]:
    turns = [({"role": "user", "content": QUERY}, {"role": "assistant", "content": answer}) for answer in answers]
    return MARKED | {"messages": [message for pair in turns for message in pair]}


@pytest.mark.parametrize(
    "row",
    [
        four_parts(REFUSAL),
        four_parts(REFUSAL) | {"safety_label": "ESCALATE"},
        four_parts("それは書けません。ほかの物語なら喜んで考えます。"),
        chat("I won't continue this scene.", REFUSAL),
        MARKED | {"instruction": QUERY, "output": REFUSAL},
    ],
)
def test_a_marked_row_that_only_refuses_is_used(row: dict[str, Any]) -> None:
    assert rule_of(row) is None


@pytest.mark.parametrize(
    "row",
    [
        four_parts(REFUSAL) | {"safety_label": "ALLOW"},
        four_parts(REFUSAL) | {"safety_label": "refuse"},
        {key: value for key, value in four_parts(REFUSAL).items() if key != "safety_label"},
        four_parts("Tove smiled and closed the door."),
        four_parts(f"I can't write that, but here is a draft. {'They kissed. ' * (LONGEST_REFUSAL // 12)}"),
        four_parts(f"I can't write this: {QUERY}."),
        four_parts(REFUSAL, task=f"Asks: {QUERY}"),  # a thought is a target too
        four_parts(REFUSAL, safety="Unsafe: Tove and the stranger undress each other in the hotel room."),
        four_parts(REFUSAL, safety=f"Unsafe. {'They kissed. ' * 90}"),
        chat("Tove smiled and closed the door.", REFUSAL),  # so is an earlier answer
        four_parts("Tove smiled.", task="I can't help with that.") | {"nsfw": "yes"},
        MARKED | {"instruction": QUERY, "output": "Tove smiled and closed the door."},
        MARKED | {"messages": [{"role": "system", "content": QUERY}, chat(f"I can't write: {QUERY}")["messages"][-1]]},
    ],
)
def test_a_marked_row_that_complies_or_quotes_its_query_is_not_used(row: dict[str, Any]) -> None:
    assert rule_of(row) == "nsfw"
    assert rule_of(row, nsfw=False) is None
    assert rule_of(row | {"nsfw": False}) is None


# ---- rows


@pytest.mark.parametrize("case", [next(case for case in CASES if case["rule"] == rule) for rule in FINDERS])
def test_a_rule_holds_for_every_message_and_can_be_switched_off(case: dict[str, Any]) -> None:
    rule, text = case["rule"], case["text"]
    others = dict.fromkeys(set(FINDERS) - {rule}, False)
    rows = [row_of(text), row_of("A", instruction=text), row_of("A", input=text)]
    system: list[dict[str, str]] = [{"role": "system", "content": text}, {"role": "assistant", "content": "A"}]
    for row in (*rows, OWN | {"messages": system}):
        assert rule_of(row, **others) == rule
        assert rule_of(row, **dict.fromkeys(FINDERS, False)) is None


def test_what_is_not_trained_on_is_not_searched() -> None:
    assert rule_of(row_of("A") | WEB | {"url": "https://example.org/?mail=wren@brindlewick-mail.com"}) is None


def test_the_report_counts_by_rule_lists_by_line_and_names_what_is_off() -> None:
    config = PolicyConfig(phone=False, mac_address=False)
    dropped = [("a.jsonl:3", "email"), ("C:/b:c.jsonl:12", "nsfw"), ("a.jsonl:9", "email")]
    report = make_report(config, rows_read=20, rows_used=16, dropped=dropped, files=[])
    assert report.counts == dict.fromkeys(set(RULES) - {"phone", "mac_address"}, 0) | {"email": 2, "nsfw": 1}
    assert report.dropped[1] == {"file": "C:/b:c.jsonl", "line": 12, "rule": "nsfw"}
    assert report.summary() == "data.policy left out 3 rows (nsfw 1, email 2), with phone, mac_address switched off"
    assert make_report(PolicyConfig(), 1, 1, [], []).summary() == "data.policy left out 0 rows"


def test_the_report_is_written_by_the_main_rank_only(tmp_path: Path) -> None:
    report = make_report(PolicyConfig(mode="error"), 2, 2, [], ["a.jsonl"])
    report.write(tmp_path, is_main=False)
    assert list(tmp_path.iterdir()) == []
    report.write(tmp_path, is_main=True)
    written = json.loads((tmp_path / "policy.json").read_text(encoding="utf-8"))
    counts = dict.fromkeys(RULES, 0)
    assert written == {
        "mode": "error",
        "rows_read": 2,
        "rows_used": 2,
        "counts": counts,
        "dropped": [],
        "files": ["a.jsonl"],
    }


def test_every_rule_has_a_switch_that_is_on_by_default() -> None:
    switches = {name for name, value in vars(PolicyConfig()).items() if value is True}
    assert switches == set(RULES)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("my number = 1234 5678 9018", "my_number"),
        ("Call +44 7911 123456.", "phone"),
        ("mail: wren@brindlewick.com", "email"),
        ("Its address is 29.41.7.200/32.", "ip_address"),
        ("29.41.7.200/index.html", "ip_address"),
    ],
)
def test_beside_other_signs_they_are_somebodys(text: str, rule: str) -> None:
    assert found_in(text) == {rule}


def test_calls_of_tools_and_reasoning_are_held_against_the_rules_too() -> None:
    call = {"function": {"name": "send", "arguments": {"to": "wren@brindlewick-mail.com"}}}
    for fields in ({"tool_calls": [call]}, {"reasoning_content": "Ask wren@brindlewick-mail.com."}):
        answer = {"role": "assistant", "content": "Done."} | fields
        assert rule_of(OWN | {"messages": [{"role": "user", "content": "Q"}, answer]}) == "email"
