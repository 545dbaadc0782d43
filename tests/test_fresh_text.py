"""Text that the results page measures on: nothing in it was read before."""

import numpy as np

from benchmarks.fresh_text import fresh_openings, share_in_common

SEEN = "A title\n\nThe first line that was read.\nThe second line that was read.\n"


def openings(*documents: str, shortest: int = 10, longest: int = 100) -> list[str]:
    return list(fresh_openings(documents, [SEEN], shortest=shortest, longest=longest))


def test_a_document_with_a_line_that_was_read_is_left_out_however_it_is_indented():
    fresh = "A title\n\nA line that nobody has read.\n"  # The title is too short to tell.
    assert openings(SEEN, fresh, "Other text.\n    The second  line that was read.\n") == [fresh]


def test_documents_that_repeat_each_other_are_taken_once():
    one = "A line that is in both.\n" * 2
    assert openings(one, "More.\nA line that is in both.\n") == [one]


def test_long_documents_are_cut_at_the_end_of_a_line_and_short_ones_left_out():
    text = "".join(f"This is line number {i:2}\n" for i in range(9))  # 23 characters each
    assert openings(text, "Short.", longest=50) == [text[: 2 * 23]]
    assert openings(text, shortest=47, longest=50) == []
    # What was cut off need not be fresh.
    assert openings("".join(f"Line number {i} of another\n" for i in range(2)) + SEEN, longest=60) != []


def test_a_token_in_a_long_enough_run_that_was_read_is_in_common():
    seen = np.array([1, 2, 3, 4, 5, 6])
    assert share_in_common(np.array([9, 2, 3, 4, 9, 5, 6, 1], np.int32), seen, 3) == 3 / 8
    assert share_in_common(np.array([2, 3, 4, 5]), seen, 3) == 1
    assert share_in_common(np.array([2, 3, 1, 2]), seen, 3) == 0
