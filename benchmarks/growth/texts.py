"""What is said in the archive: questions and answers out of whole sentences, prebuilt, in Vietnamese and English.

The lengths are log-normal, and a question is shorter than its answer. Generating a message is then a look into a list.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

QUESTION_BYTES_MEDIAN, QUESTION_SIGMA = 90, 0.6
ANSWER_BYTES_MEDIAN, ANSWER_SIGMA = 700, 0.7
#: The tail of a log-normal has no end, the product's messages have one.
CONTENT_BYTES_MAX = 32_768

_QUESTIONS = 5_000
_ANSWERS = 20_000
_SENTENCES = 2_000
_SENTENCES_OF_PARAGRAPH = 4

_LAWS = (
    "Luật Đấu thầu 2023",
    "Nghị định 24/2024/NĐ-CP",
    "Nghị định 63/2014/NĐ-CP",
    "Thông tư 06/2024/TT-BKHĐT",
    "Luật Xây dựng 2014",
    "Luật Doanh nghiệp 2020",
    "Luật Đầu tư công 2019",
    "Bộ luật Dân sự 2015",
)
_WHO_VI = (
    "nhà thầu",
    "bên mời thầu",
    "chủ đầu tư",
    "tổ chuyên gia",
    "nhà đầu tư",
    "cơ quan thẩm định",
    "liên danh",
)
_DO_VI = (
    "nộp hồ sơ dự thầu trước thời điểm đóng thầu",
    "chứng minh năng lực tài chính trong ba năm gần nhất",
    "đăng tải thông tin trên Hệ thống mạng đấu thầu quốc gia",
    "bảo đảm cạnh tranh, công bằng, minh bạch và hiệu quả kinh tế",
    "có hạch toán tài chính độc lập và không đang trong quá trình giải thể",
    "thương thảo, hoàn thiện hợp đồng với đơn vị được xếp hạng thứ nhất",
    "nộp bảo đảm thực hiện hợp đồng trước khi hợp đồng có hiệu lực",
    "thẩm định và phê duyệt kết quả lựa chọn trong thời hạn quy định",
)
_WHAT_VI = (
    "điều kiện tham gia đấu thầu",
    "giá trị bảo đảm dự thầu",
    "hồ sơ mời thầu",
    "chào hàng cạnh tranh",
    "chỉ định thầu rút gọn",
    "ưu đãi đối với hàng hóa trong nước",
    "thời gian đánh giá hồ sơ dự thầu",
    "xử lý tình huống khi giá dự thầu vượt giá gói thầu",
)
_WHO_EN = (
    "the bidder",
    "the procuring entity",
    "the investor",
    "the expert group",
    "the joint venture",
    "the appraiser",
)
_DO_EN = (
    "submit its bid before the deadline",
    "prove its financial capacity over the last three years",
    "publish the notice on the national bidding network",
    "ensure competition, fairness, transparency and economic efficiency",
    "sign the contract within the period of validity",
    "provide the performance security before the contract takes effect",
)
_WHAT_EN = (
    "eligibility to bid",
    "the bid security",
    "competitive quotation",
    "direct appointment",
    "preferences for domestic goods",
    "the evaluation period",
)


@dataclass(frozen=True, slots=True)
class Language:
    """UTF-8, ready to be stored. `sources` are what answers cite."""

    questions: Sequence[bytes]
    answers: Sequence[bytes]


@lru_cache(maxsize=1)
def languages() -> tuple[Language, Language]:
    """Vietnamese and English. The same in every process and for every seed: what is drawn from them differs."""
    rnd = random.Random("texts")
    return (
        _language(rnd, _question_vi, _answer_vi),
        _language(rnd, _question_en, _answer_en),
    )


@lru_cache(maxsize=1)
def sources() -> tuple[str, ...]:
    """Documents that answers cite, the most cited ones first."""
    return tuple(f"{law}, Điều {article}" for article in range(1, 31) for law in _LAWS)


def text_of_bytes(size: int) -> str:
    """Exactly so many bytes of such text: ASCII at its end, where a character would be cut."""
    answers = languages()[0].answers
    parts, left = [], size
    for answer in answers:
        parts.append(answer[: max(0, left)].decode(errors="ignore"))
        left -= len(answer) + 1
        if left <= 0:
            break
    text = " ".join(parts)
    while len(text.encode()) > size:
        text = text[:-1]
    return text + "." * (size - len(text.encode()))


def _language(
    rnd: random.Random,
    question: Callable[[random.Random], str],
    answer: Callable[[random.Random], str],
) -> Language:
    questions = [question(rnd).encode() for _ in range(_SENTENCES)]
    answers = [answer(rnd).encode() for _ in range(_SENTENCES)]
    return Language(
        questions=[_joined(rnd, questions, QUESTION_BYTES_MEDIAN, QUESTION_SIGMA) for _ in range(_QUESTIONS)],
        answers=[_joined(rnd, answers, ANSWER_BYTES_MEDIAN, ANSWER_SIGMA) for _ in range(_ANSWERS)],
    )


def _joined(rnd: random.Random, sentences: Sequence[bytes], median: int, sigma: float) -> bytes:
    """Whole sentences, about as many bytes as a log-normal draw says; the last one ends early to come near it."""
    wanted = min(CONTENT_BYTES_MAX, median * rnd.lognormvariate(0, sigma))
    text = bytearray(rnd.choice(sentences))
    count = 1
    while len(text) < wanted:
        text += b"\n\n" if count % _SENTENCES_OF_PARAGRAPH == 0 else b" "
        text += rnd.choice(sentences)
        count += 1
    cut = text.find(b" ", int(wanted))
    return bytes(text) if cut < 0 else bytes(text[:cut]).rstrip(b",.?\n") + text[-1:]


def _question_vi(rnd: random.Random) -> str:
    what = rnd.choice(_WHAT_VI)
    return rnd.choice(
        (
            f"Quy định về {what} là gì?",
            f"Cho tôi hỏi về {what} theo {rnd.choice(_LAWS)}?",
            f"{rnd.choice(_WHO_VI).capitalize()} có phải {rnd.choice(_DO_VI)} không?",
            f"Với gói thầu {rnd.randint(1, 500)} tỷ đồng thì {what} ra sao?",
        )
    )


def _answer_vi(rnd: random.Random) -> str:
    who, do = rnd.choice(_WHO_VI), rnd.choice(_DO_VI)
    cited = f"Điều {rnd.randint(1, 90)} của {rnd.choice(_LAWS)}"
    return rnd.choice(
        (
            f"Theo {cited}, {who} phải {do}.",
            f"Khoản {rnd.randint(1, 9)} {cited} quy định rõ {rnd.choice(_WHAT_VI)}.",
            f"Trong thời hạn {rnd.randint(3, 45)} ngày, {who} cần {do}, trừ trường hợp pháp luật có quy định khác.",
            f"Nếu không, {rnd.choice(_WHO_VI)} có thể yêu cầu {who} {do}.",
        )
    )


def _question_en(rnd: random.Random) -> str:
    what = rnd.choice(_WHAT_EN)
    return rnd.choice(
        (
            f"What are the rules on {what}?",
            f"Does {rnd.choice(_WHO_EN)} have to {rnd.choice(_DO_EN)}?",
            f"How does {what} work for a package of {rnd.randint(1, 500)} billion dong?",
        )
    )


def _answer_en(rnd: random.Random) -> str:
    who, do = rnd.choice(_WHO_EN), rnd.choice(_DO_EN)
    return rnd.choice(
        (
            f"Under Article {rnd.randint(1, 90)} of the Law on Bidding, {who} shall {do}.",
            f"Within {rnd.randint(3, 45)} days {who} has to {do}, unless the law says otherwise.",
            f"The decree is explicit about {rnd.choice(_WHAT_EN)}.",
        )
    )
