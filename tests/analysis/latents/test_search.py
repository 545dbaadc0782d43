"""What a query finds: where a term begins and ends, on which token it lies, and in which order latents come."""

import json
import shutil
import subprocess

import pytest

from analysis.latents.search import DOUBT, folded, search, strength, terms
from analysis.latents.windows import Context
from analysis.report.markup import page_file


def context(texts: list[str], place: int, activation: float = 1.0) -> Context:
    lengths = "".join(chr(48 + len(text)) for text in texts)
    return Context("".join(texts), lengths, place, "0" * len(texts), activation, 0, [0], True)


@pytest.mark.parametrize(
    ("texts", "place", "query", "expected"),
    [
        (["an", " event", " loop"], 2, "event loop", 1),
        (["an", " event", " loop"], 1, "Event  Loop", 1),
        (["an", " event", " loop"], 0, "event loop", 0),  # it fires beside the phrase
        (["an", " event", " loop"], 1, "loop", 0),
        ([" cor", "outine", "s"], 1, "coroutine", 1),  # whole tokens
        ([" coroutines"], 0, "coroutine", 0.5),  # inside a word
        ([" cor", "outine"], 1, "outine", 1),
        ([" coroutine"], 0, "outine", 0),  # begins in the middle of a token and of a word
        ([" asyncio", "."], 0, "async", 0.5),
        ([" a", "\n", "b"], 1, "\\n", 1),
        (["x", " await"], 1, "asyncio, await", 1),
        (["x", " STRASSE\u0130"], 1, "stra\u00dfe", 0),
        (["\u00c9t\u00e9"], 0, "\u00e9t\u00e9", 1),
        (["f", "(", ")"], 1, "f(", 1),
        (["aaa"], 0, "a", 0.5),
    ],
)
def test_what_counts_as_a_hit(texts: list[str], place: int, query: str, expected: float) -> None:
    assert strength(context(texts, place), terms(query)) == expected


def test_the_most_specific_comes_first_and_one_context_says_little() -> None:
    contexts = {
        3: [context([" asyncio"], 0, 5.0)],  # the only one
        5: [context([" asyncio"], 0, 4.0 - i / 10) for i in range(9)] + [context([" other"], 0, 1.0)],
        7: [context([" the"], 0, 9.0), context([" asyncio"], 0, 3.0)],
        8: [context([" the"], 0, 9.0)],
        9: [],
    }
    found = search(contexts, "asyncio")
    assert [hit.latent for hit in found] == [5, 3, 7]
    mass = sum((4.0 - i / 10) / 4.0 for i in range(9))
    scores = [mass / (mass + 0.25 + DOUBT), 1 / (1 + DOUBT), (1 / 3) / (1 + 1 / 3 + DOUBT)]
    assert [hit.score for hit in found] == pytest.approx(scores)
    assert found[0].times == pytest.approx(scores[0] / (sum(scores) / 5))
    assert (found[0].hits, found[0].contexts) == (9, 10)
    assert search(contexts, "asyncio", 1) == found[:1]
    assert found[0].why.startswith("fires on it in 9 of its 10 strongest contexts")
    assert search(contexts, " , ") == search({}, "x") == search(contexts, "coroutine") == []


TEXTS = [
    [" cor", "outine", "s", " an", " event", " loop"],
    ["Async", "io", ".", "run", "(", "\u00c9t\u00e9", "\n", "\n"],
    [" \U0001f600x", "\t", "\u0130stanbul", "\u03a3\u03c3\u03c2", " na\u00efve", "_x1"],
    ["", "a", "aa", " aaa", " \u0661\u0662", "\u00bd"],
]


def test_the_page_ranks_by_the_same_rule() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("the page's script runs in node, which is not on this machine")
    contexts: dict[int, list[Context]] = {}
    for latent in range(12):
        for i in range(1 + latent % 5):
            texts = TEXTS[(latent + i) % 4]
            place = max(j for j in range(len(texts)) if (j <= (latent + 2 * i) % len(texts) and texts[j]) or j == 1)
            contexts.setdefault(latent, []).append(context(texts, place, round(1 + (latent * 7 + i * 3) % 5 / 3, 3)))
    packed = [
        {"texts": [c[:3] for c in own], "contexts": {"activation": [c.activation for c in own]}}
        for own in contexts.values()
    ]
    queries = [
        "event loop",
        "coroutine",
        "a",
        "async, loop",
        "\\n",
        "\u00e9t\u00e9",
        "\u03c3",
        "\U0001f600",
        "\u0130",
        "x",
    ]
    queries += ["run(", "\u0661", "na\u00efve_x", "\u2192", "aa", "", "s an"]
    script = (
        page_file("search.js")
        + f"""
        const contents = {json.dumps(packed)};
        console.log(JSON.stringify({json.dumps(queries)}.map((query) => rank(contents, query))));"""
    )
    said = subprocess.run([node, "-"], input=script, capture_output=True, text=True, check=True).stdout
    for query, rows in zip(queries, json.loads(said), strict=True):
        found = search(contexts, query)
        names = ("latent", "hits", "contexts")
        assert [[row[name] for name in names] for row in rows] == [[getattr(h, name) for name in names] for h in found]
        for name in ("score", "times"):  # Python's sum is exact to the last digit from 3.12 on, a page's is not
            assert [row[name] for row in rows] == pytest.approx([getattr(h, name) for h in found], rel=1e-12), query
    assert folded("\u0130\n") == "\u0130\u23ce"
