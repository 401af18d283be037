"""Answers are compared without losing their meaning, in any script, and end where their sentence does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.data.answers import may_go_on, normalise_answer, sentence_ends


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Lion, the Witch ", "lion witch"),
        ("U.S.A.", "usa"),
        ("An  apple\na day", "apple day"),
        ("theatre", "theatre"),
        ("A", "a"),
        ("A.", "a"),
        ("The The", "the the"),
        ("!", "!"),
        ("", ""),
        ("Cafe\u0301", "café"),
        ("COVID-19", "covid19"),
        ("well-known", "wellknown"),
        ("$5", "5"),
    ],
)
def test_normalised(text, expected):
    assert normalise_answer(text) == expected


SAME = [
    ("里昂。", "里昂"),
    ("《红楼梦》", "红楼梦"),
    ("「東京」です。", "東京です"),
    ("ジョン・レノン", "ジョンレノン"),
    ("“Paris”", "Paris"),
    ("«Париж»…", "париж"),
    ("¿Madrid?", "madrid"),
    ("باريس؟", "باريس"),
    ("पेरिस।", "पेरिस"),
    ("углеводородное сырьё", "Углеводородное сырье"),
    ("ё", "е\u0308"),
    ("ＡＢＣ１２", "abc12"),
    ("٣٫١٤", "3.14"),
    ("550,000", "550000"),
    ("1,234,567.8", "1234567.8"),
    ("5,50,000", "550000"),
    ("1'000'000", "1000000"),
    ("1.234.567,8", "1234567.8"),
    ("3,14", "3.14"),
    (".5", "0.5"),
    ("about 1.2 million.", "about 1.2 million"),
    ("−40 %", "-40%"),
    ("1939–1945", "1939-1945"),
    ("-$5", "$-5"),
    ("550,000's", "550000s"),
    ("550 000", "550000"),
    ("550\u202f000", "550,000"),
    ("1\u00a0234\u2009567", "1234567"),
    ("-1 234,5", "-1234.5"),
    ("about 12 500 % of", "about 12500% of"),
    ("c++", "C++."),
    ("(C#)", "c#"),
    ("zero\u200bwidth", "zerowidth"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same(one, other):
    assert normalise_answer(one) == normalise_answer(other)


DIFFERENT = [
    ("1.2 million", "12 million"),
    ("3.14", "314"),
    ("3,14", "314"),
    ("0,123", "123"),
    ("-40%", "40%"),
    ("−40", "40"),
    ("40%", "40"),
    (".5", "5"),
    ("1/2", "12"),
    ("12:30", "1230"),
    ("7-8", "78"),
    ("2..3", "23"),
    ("1,2,3", "123"),
    ("10^6", "106"),
    ("f(-5)", "f(5)"),
    ("5°", "5"),
    ("€5", "£5"),
    ("école", "ecole"),
    ("Zürich", "Zurich"),
    ("мой", "мои"),
    ("が", "か"),
    ("里昂", "里斯本"),
    ("550.000", "550000"),
    ("550 00", "55000"),
    ("1234 567", "1234567"),
    ("12 34 567", "1234567"),
    ("0 500", "0500"),
    ("1 000 00", "100000"),
    ("C", "C++"),
    ("C", "C#"),
    ("C++", "C#"),
    ("blood group A+", "blood group A"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_not_the_same(one, other):
    assert normalise_answer(one) != normalise_answer(other)


PIECES = st.sampled_from(
    [*"0159.,'-−%$€/: \n_()–^٣ａe\u0301\u0308еёа。।\u0338=\u200b+#c\u202f", "the", " a ", "1,000", " 000"]
)


@given(st.text() | st.lists(PIECES, max_size=9).map("".join))
@settings(max_examples=1500)
def test_normalising_twice_changes_nothing_and_something_is_left(text):
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert bool(once) == bool(text.strip().strip("\u200b\u200e\u200f\u00ad\u2060\ufeff").strip())


@given(st.integers(-(10**9), 10**9), st.integers(0, 99))
def test_thousands_and_cents_never_change_a_number(whole, cents):
    sign = "-" if whole < 0 else ""
    plain, grouped = f"{sign}{abs(whole)}.{cents:02}", f"{sign}{abs(whole):,}.{cents:02}"
    german = grouped.replace(",", "_").replace(".", ",").replace("_", ".")
    assert normalise_answer(plain) == normalise_answer(grouped) == normalise_answer(german) == plain


@given(st.floats(-1e6, 1e6).map("{:.3f}".format), st.floats(-1e6, 1e6).map("{:.3f}".format))
def test_two_numbers_are_the_same_only_if_they_are(one, other):
    assert (normalise_answer(one) == normalise_answer(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Paris. It is", 5),
        ("1.2 million. Or", 11),
        ("里昂。它位于法国", 2),
        ("カナダ！です", 3),
        ("在哪里？在", 3),
        ("هو باريس؟ نعم", 8),
        ("یہ لاہور ہے۔ یہ", 11),
        ("यह पेरिस है। और", 11),
        ("１．２百万。", 5),
        ("in 1969. Then", 7),
        ("St. Louis", 2),
        ("no end", None),
        ("really! yes? ", None),
        ("v1.2.3", None),
    ],
)
def test_where_sentences_end(text, first):
    assert next(iter(sentence_ends(text)), None) == first


def test_a_stop_behind_a_digit_may_be_a_decimal_point():
    assert may_go_on("about 1.") and may_go_on("１．")
    assert not may_go_on("about 1.2") and not may_go_on("one.") and not may_go_on("1。")
