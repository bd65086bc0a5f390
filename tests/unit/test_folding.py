"""Text without case and accents."""

import sys
import unicodedata

import pytest

from app.analytics.folding import fold, places


def characters():
    return (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Điều kiện tham gia ĐẤU THẦU?", "dieu kien tham gia dau thau?"),
        (
            "ắằẳẵặấầẩẫậếềểễệốồổỗộớờởỡợứừửữự",
            "aaaaaaaaaaeeeeeooooooooooouuuuu"[:10] + "eeeee" + "o" * 10 + "u" * 5,
        ),
        ("Crème BRÛLÉE, Žižek, ångström", "creme brulee, zizek, angstrom"),
        ("ΆΛΦΑ Ёлка", "αλφα елка"),
        ("日本語 한국어 😀 \\%_", "日本語 한국어 😀 \\%_"),
    ],
)
def test_case_and_accents_go_in_any_form(text, folded, form):
    assert unicodedata.normalize("NFC", fold(unicodedata.normalize(form, text))) == folded


def test_a_character_folds_to_one_or_none_and_no_further():
    assert [one for one in characters() if len(fold(one)) > 1 or fold(fold(one)) != fold(one)] == []


def test_all_that_decomposes_to_ascii_is_folded():
    decomposed = {one: unicodedata.normalize("NFD", one) for one in characters()}

    assert [one for one, whole in decomposed.items() if whole[0].isascii() and fold(whole) != fold(one)] == []


def test_a_place_in_folded_text_is_known_in_the_text():
    text = "o\u0323\u0302 Đ"

    assert (fold(text), places(text)) == ("o d", [0, 3, 4, 5])
