"""What counts as an answer, and as the right one: cases written by hand."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron_mdm.inference.math.answers import find_answer, is_same

# (text, where the answer stands, the number that a reader would say it is)
FOUND = [
    ("48 / 2 = 24\n48 + 24 = 72\n#### 72", "hashes", "72"),
    ("#### 72.", "hashes", "72"),
    ("####72 clips", "hashes", "72"),
    ("#### 1,234", "hashes", "1234"),
    ("#### 12,345,678", "hashes", "12345678"),
    ("#### $1,234.50", "hashes", "1234.5"),
    ("#### -5", "hashes", "-5"),
    ("#### \u22125", "hashes", "-5"),
    ("#### $-5", "hashes", "-5"),
    ("#### -$5", "hashes", "-5"),
    ("#### \u20ac7", "hashes", "7"),
    ("#### 50%", "hashes", "50"),
    ("#### .5", "hashes", "0.5"),
    ("#### 1/2", "hashes", "0.5"),
    ("#### 1 1/2 cups", "hashes", "1.5"),
    ("#### -2 1/4", "hashes", "-2.25"),
    ("#### \\boxed{72}", "hashes", "72"),
    # What follows the first answer belongs to another question.
    ("#### 18\n\nQuestion: and then?\nAnswer: #### 99", "hashes", "18"),
    ("The answer is 5.\n#### 6", "hashes", "6"),
    # A heading is none.
    ("#### Step 1\nHe has 4.\nThe answer is 7.", "phrase", "7"),
    ("####\nThe answer is 8", "phrase", "8"),
    ("The answer is 72.", "phrase", "72"),
    ("the ANSWER is: $72.", "phrase", "72"),
    ("Answer: 7 apples, and 3 are left over", "phrase", "7"),
    ("answer = -3", "phrase", "-3"),
    ("The answer is 5. No: the answer is 6, of 10.", "phrase", "6"),
    ("The answer is \\boxed{3,000}", "boxed", "3000"),
    ("\\boxed{71} is wrong, so \\boxed{72}. I am 100% sure.", "boxed", "72"),
    ("\\boxed{\\frac{1}{2}}", "boxed", "0.5"),
    ("\\boxed{\\dfrac{3}{4}}", "boxed", "0.75"),
    ("\\boxed{\\$12\\text{ per day}}", "boxed", "12"),
    ("\\boxed{2\\sqrt{3}}", "boxed", "3.4641016151"),
    ("\\boxed{3 \\times 4}", "boxed", "12"),
    ("\\boxed{72", "last_number", "72"),
    ("so 5 and 7 make 12 dollars.", "last_number", "12"),
    ("x = 1/3", "last_number", "0.33333333"),
    ("10-15", "last_number", "15"),
    ("5 - 3", "last_number", "3"),
    ("it fell to -2", "last_number", "-2"),
    ("born on 2024-11-22", "last_number", "22"),
    ("3.14.15", "last_number", "15"),
    ("1,23", "last_number", "23"),
    ("100!", "last_number", "100"),
]
NOT_FOUND = [
    "",
    "no idea",
    "####",
    "#### many",
    "\\boxed{}",
    "\\boxed{x}",
    "5/0",
    "9" * 5000,
    "$",
    "-",
]


@pytest.mark.parametrize(("text", "how", "value"), FOUND)
def test_an_answer_is_found_where_it_stands(text, how, value):
    found = find_answer(text)
    assert found.how == how
    assert is_same(found.value, value), found
    # Not right by accident: a neighbour is wrong.
    assert not is_same(found.value, f"{float(value) + 0.01}")
    assert not is_same(found.value, f"{-float(value)}")


@pytest.mark.parametrize("text", NOT_FOUND)
def test_a_text_without_a_number_is_wrong_whatever_is_asked(text):
    found = find_answer(text)
    assert (found.value, found.how) == (None, "none")
    assert not is_same(found.value, "0")


@pytest.mark.parametrize(
    ("found", "reference", "same"),
    [
        ("72", "72.0", True),
        ("72.0", "72", True),
        ("1/2", "0.5", True),
        ("2/4", "1/2", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("72", "-72", False),
        ("72", "720", False),
        ("7", "72", False),
        ("1234", "1.234", False),
        ("0", "0.0", True),
        ("007", "7", True),
        ("\\frac{1}{0}", "0", False),
        ("\\frac{1}{0}", "1", False),
        ("123456789012345678901234567890", "123456789012345678901234567890", True),
        ("100000000000001", "100000000000002", False),
    ],
)
def test_numbers_are_compared_not_their_spelling(found, reference, same):
    assert is_same(found, reference) is same


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{10^{10^{10^{10}}}}",
        "\\boxed{99999999999!}",
        "\\boxed{\\binom{99999999}{5000000}}",
        "#### 10**10**10",
        "#### " + "9" * 100_000,
        "\\boxed{" * 20_000,
        "answer is " * 20_000,
        "1 " * 50_000,
        "- $" * 50_000,
    ],
)
def test_no_text_keeps_the_checker_busy(text):
    started = time.process_time()
    is_same(find_answer(text).value, "72")
    assert time.process_time() - started < 4


def test_nothing_of_a_text_is_run(tmp_path):
    target = tmp_path / "made"
    call = f"__import__('pathlib').Path('{target}').write_text('1')"
    texts = [f"#### {call}", f"\\boxed{{{call}}}", f"The answer is {call}", call]
    code = (
        "import sys\n"
        "from megatron_mdm.inference.math.answers import find_answer, is_same\n"
        "for text in sys.argv[1:]: is_same(find_answer(text).value, '1')"
    )
    subprocess.run([sys.executable, "-c", code, *texts], check=True, timeout=120)
    assert not target.exists()
