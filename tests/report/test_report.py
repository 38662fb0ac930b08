"""The page says what the store says: numbers against the scores, warnings, escaping, no network."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlpinf import report
from nlpinf.errors import BadInput
from nlpinf.growing import Growing
from nlpinf.influence import QueryVectors, query_vectors
from nlpinf.queries import Query
from nlpinf.report import numbers, svg
from nlpinf.report.notices import notices
from nlpinf.scoring.corpus import score
from nlpinf.scoring.store import Scores
from nlpinf.solvers import CG
from nlpinf.stages import Chain, Proximity, Stage, evaluation
from nlpinf.tasks import CausalLM, MaskedLM, Task
from tests.cases import case, tokenizer

CORPUS = [
    "the cat sat on the mat",
    "a dog ran",
    "a good film",
    "the bad dog sat",
    "cat ran on a mat",
    "bad film",
    "mat mat dog",
]
TWO = ("first question", "second question")


class Page(HTMLParser):
    """The page's text, tags and attributes, as a browser reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = re.sub(r"[ \n]+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def rows(self, kind: str) -> list[list[str]]:
        """The cells' texts of the sentence tables of a kind, one list a row."""
        tables = re.findall(rf'<table class="sentences {kind}">(.*?)</table>', self.source, re.S)
        return [
            [_text(cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)]
            for table in tables
            for row in re.findall(r"<tr>(<td.*?)</tr>", table, re.S)
        ]


def _text(html: str) -> str:
    from html import unescape

    return unescape(re.sub(r"<[^>]*>", "", html))


def _vectors(family: str = "bert sdpa", names: Sequence[str] = TWO, **changes: Any) -> QueryVectors:
    found = case(family, "proximity")
    asked = [Query.loss(found.asked[i % len(found.asked)], name) for i, name in enumerate(names)]
    return query_vectors(found.chain, asked, **{"curvature": "ggn", "damping": 0.1, **changes})


def _scores(texts: Sequence[str] = CORPUS, **changes: Any) -> Scores:
    return score(_vectors(**changes), list(texts), token_scores=True)


def test_the_tables_hold_the_stored_scores_with_their_predicted_changes(tmp_path: Path) -> None:
    scores = _scores()
    page = Page(report.write(scores, tmp_path / "report.html", tokenizer=tokenizer()))
    for kind in ("harmful", "helpful"):
        expected = []
        m = case("bert sdpa", "proximity").chain.stages[0].size
        for query in range(2):
            column = scores.column(query).astype(float)
            order = np.argsort(-column if kind == "harmful" else column, kind="stable")
            kept = [i for i in order if (column[i] > 0 if kind == "harmful" else column[i] < 0)]
            both = np.concatenate([column[column > 0], column[column < 0]])
            for rank, i in enumerate(kept, 1):
                change = -column[i] / m
                powers = [numbers.shared_power(both), numbers.shared_power(both / m)]
                expected.append((rank, CORPUS[i], change, powers[1], column[i], powers[0], scores.losses[i], i))
        shown = page.rows(kind)
        assert len(shown) == len(expected) > 0
        for cells, (rank, text, change, change_power, value, power, loss, row) in zip(shown, expected):
            assert cells[0] == str(rank) and cells[1] == text and cells[5] == str(row)
            for cell, number, scale in (
                (cells[2], change, change_power),
                (cells[3], value, power),
                (cells[4], loss, 0),
            ):
                written = float(cell.replace(numbers.MINUS, "-")) * 10.0**scale
                assert written == pytest.approx(number, rel=6e-3, abs=6e-5 * 10.0**scale)
            assert cells[2][0] == (numbers.MINUS if kind == "harmful" else "+")


def test_the_page_says_what_was_asked(tmp_path: Path) -> None:
    scores = _scores()
    page = Page(report.write(scores, tmp_path / "report.html"))
    for words in (
        *TWO,
        "7 sentences scored",
        "pretrain",
        "GGN",
        "proximity α = 0.2",
        "masked LM",
        "sequence classification",
        "cg",
    ):
        assert words in page.text.replace("\u00a0", " "), words
    assert f"m = {case('bert sdpa', 'proximity').chain.stages[0].size} sentences" in page.text
    for query in scores.manifest["queries"]:
        assert f"{query['value']:.4g}" in page.text
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {"#query-1", "#query-2", "#asked"} <= links and {str(link)[1:] for link in links} <= anchors


def test_nothing_of_the_corpus_becomes_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'and' & </td></svg>"
    texts = [f"{evil} {text}" for text in CORPUS]
    scores = _scores(texts, names=[f"query {evil}"])
    removal = [{"name": f"set {evil}", "rows": 1, "predicted": 1.0, "actual": 2.0}]
    for name, given in (("plain", None), ("shaded", tokenizer())):
        page = Page(report.write(scores, tmp_path / f"{name}.html", tokenizer=given, removal=removal))
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "img", "iframe", "object", "link"}
        assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
        assert {cells[1] for cells in page.rows("harmful") + page.rows("helpful")} <= set(texts)
        assert page.source.count(f"query {evil}") == 0 and f"query {evil}" in page.text
        for chart in re.findall(r"<svg.*?</svg>", page.source, re.S):
            ET.fromstring(chart)


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = Page(report.write(_scores(), tmp_path / "report.html", tokenizer=tokenizer()))
    assert "http:" not in page.source and "https:" not in page.source and "url(" not in page.source
    assert "@import" not in page.source
    assert not any(key in ("src", "srcset") for _, attributes in page.tags for key in attributes)
    policies = [attributes for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert "default-src 'none'" in str(policies)


def test_a_sound_run_has_no_warning(tmp_path: Path) -> None:
    page = Page(report.write(_scores(), tmp_path / "report.html"))
    assert "every solve converged" in page.text and "Warning." not in page.text and "Note." not in page.text


def test_warnings_stand_first(tmp_path: Path) -> None:
    scores = _scores(solver=CG(tolerance=1e-9, max_iterations=1), allow_unconverged=True)
    page = Page(report.write(scores, tmp_path / "report.html"))
    assert page.text.count("Warning.") == 4  # two queries, two stages
    assert "ended “not converged”" in page.text and "Unconverged solves were allowed" in page.text
    assert page.text.index("Warning.") < page.text.index("A score is the derivative") < page.text.index("Most harmful")
    residual = scores.manifest["queries"][0]["verdicts"]["pretrain"]["residual"]
    assert f"relative residual of {residual:.2g}, where 1e-09 was asked for" in page.text
    assert page.source.count('class="badge no"') == 4


def test_each_warning() -> None:
    verdict = {"verdict": "converged", "residual": 1e-4, "second_residual": 0.2, "tolerance": 1e-3}
    manifest = {"queries": [{"name": "q", "verdicts": {"pretrain": verdict}}], "corpus": {"skipped": {"empty": 0}}}
    column = np.array([1.0, -2.0])
    assert notices(manifest, [column], 0) == []

    def only(missing: int = 0, scores: np.ndarray = column, skipped: int = 0, **changes: Any) -> tuple[bool, str]:
        changed = {**verdict, **changes}
        given = {
            "queries": [{"name": "q", "verdicts": {"pretrain": changed}}],
            "corpus": {"skipped": {"empty": skipped}},
        }
        (found,) = notices(given, [scores], missing)
        assert found.advice
        return found.serious, found.text

    assert only(missing=1200) == (True, "1\u2009200 rows of the corpus have no score yet, so the lists may change.")
    serious, text = only(second_residual=0.7)
    assert not serious and "second curvature sample" in text and "0.7" in text
    for ending in ("negative curvature", "diverged", "not finite", "not converged"):
        serious, text = only(verdict=ending, residual=None)
        assert serious and ending in text and "not finite" in text
    assert "1 scores of “q” are not finite" in only(scores=np.array([1.0, np.nan]))[1]
    assert "zero" in only(scores=np.zeros(3))[1]
    assert only(skipped=3) == (False, "3 sentences of the corpus were skipped (empty) and have no score.")
    (found,) = notices({**manifest, "query_vectors": {"truncated": [4]}}, [column], 0)
    assert not found.serious and "too short for 4 texts of “q”: their" in found.text
    several = {"queries": manifest["queries"] * 3, "query_vectors": {"truncated": [1, 0, 2]}}
    (found,) = notices(several, [column], 0)
    assert "too short for 2 texts of “q” and some of 1 other query: their" in found.text
    (found,) = notices({"queries": [{"name": "q"}]}, [column], None)
    assert found.serious and "No verdict" in found.text


def test_rows_that_are_missing_are_counted(tmp_path: Path) -> None:
    scores = _scores()
    scores.manifest["identity"]["rows"] = 12
    page = Page(report.write(scores, tmp_path / "report.html"))
    assert "5 rows of the corpus have no score yet" in page.text


def _language_stage(task: Task, family: str) -> Stage:
    return dataclasses.replace(case(family, "proximity").chain.stages[0], task=task)


TASKS: dict[str, tuple[Task, str]] = {
    "masked": (MaskedLM(tokenizer(), 9, probability=0.4, seed=2), "bert sdpa"),
    "several masks": (MaskedLM(tokenizer(), 9, probability=0.4, masks=3, seed=2), "bert sdpa"),
    "causal": (CausalLM(tokenizer(), 9), "gpt2 sdpa"),
    "causal, cut": (CausalLM(tokenizer(), 5), "gpt2 sdpa"),
    "causal, boundaries": (CausalLM(tokenizer(), 9, boundaries=True), "gpt2 sdpa"),
}


@pytest.mark.parametrize("name", TASKS)
def test_pieces_join_to_the_text_and_their_scores_to_its_score(name: str) -> None:
    task, family = TASKS[name]
    stage = _language_stage(task, family)
    generator = torch.Generator().manual_seed(3)
    vector = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in stage.theta.items()}
    texts, rows = ["the cat  sat on the mat", " a dog ran the the", "a film"], [3, 10, 11]
    shaded = report.shaded(stage, [vector], texts, rows)
    special = set(tokenizer().all_special_tokens)
    for text, row, pieces in zip(texts, rows, shaded):
        batch = stage.on_device(task.collate(task.encode([text]), [row]))
        step = 1e-5  # the sentence's score as a central difference of its loss
        with evaluation(stage.model), torch.no_grad():
            losses = [
                float(stage.example_losses(batch, {n: stage.theta[n] + s * v for n, v in vector.items()}))
                for s in (step, -step)
            ]
        assert math.fsum(s for _, s in pieces if s is not None) == pytest.approx(
            (losses[0] - losses[1]) / (2 * step), rel=1e-5
        )
        assert "".join(piece for piece, _ in pieces if piece not in special) == text
        named = [piece for piece, s in pieces if s is not None]
        expected = {tokenizer().convert_ids_to_tokens(int(t)) for t in batch.targets}
        assert set(named) == expected


@pytest.mark.parametrize("name", ["several masks", "causal"])
def test_stored_token_scores_give_the_same_pieces_as_scoring_anew(name: str, tmp_path: Path) -> None:
    task, family = TASKS[name]
    found = case(family, "proximity")
    stage = _language_stage(task, family)
    chain = Chain([stage, found.chain.stages[1]], Proximity(0.2))
    vectors = query_vectors(chain, [Query.loss(found.asked[0]), Query.loss(found.asked[1])], damping=0.1)
    scores = score(vectors, CORPUS, token_scores=True)
    stored = report.write(scores, tmp_path / "stored.html", tokenizer=tokenizer()).read_text()
    anew = report.write(scores, tmp_path / "anew.html", shade=report.shader(stage, vectors.vectors)).read_text()
    marks = re.findall(r'<mark class="(harm|help)" style="--a:([\d.]+)" title="(.*?)">(.*?)</mark>', stored)
    again = re.findall(r'<mark class="(harm|help)" style="--a:([\d.]+)" title="(.*?)">(.*?)</mark>', anew)
    assert len(marks) > 10
    assert [(m[0], m[3]) for m in marks] == [(m[0], m[3]) for m in again]
    for one, other in zip(marks, again):
        assert float(one[2]) == pytest.approx(float(other[2]), rel=1e-2)
        assert (one[0] == "harm") == (float(one[2]) > 0) and 0 <= float(one[1]) <= 1
    assert max(float(m[1]) for m in marks) == 1.0


def test_pages_without_token_scores_or_texts(tmp_path: Path) -> None:
    vectors = _vectors()
    page = Page(report.write(score(vectors, CORPUS), tmp_path / "a.html", tokenizer=tokenizer()))
    assert "Token scores:" not in page.text and {c[1] for c in page.rows("harmful")} <= set(CORPUS)
    page = Page(report.write(score(vectors, CORPUS, text=False), tmp_path / "b.html", tokenizer=tokenizer()))
    assert {c[1] for c in page.rows("harmful")} == {"The text of this row was not stored."}


def test_another_tokenizer_shades_nothing(tmp_path: Path) -> None:
    scores = _scores(["mat mat dog", "a film", *CORPUS[2:]])
    other = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, pad_token="[PAD]")
    other._tokenizer.post_processor = None
    page = Page(report.write(scores, tmp_path / "report.html", tokenizer=other))
    assert "mat mat dog" in page.text  # whole, whatever the tokens


def test_removals(tmp_path: Path) -> None:
    removal = [
        {"name": "most harmful 5 %", "rows": 1500, "predicted": -0.012, "actual": -0.0095, "accuracy": 0.784},
        {
            "name": "random 5 %",
            "rows": 1500,
            "predicted": [1e-4, -2e-4],
            "actual": [2e-3, -1e-3],
            "accuracy": [0.75, 0.77],
        },
        {"name": "other question", "rows": 2, "predicted": 0.5, "actual": 0.25, "query": 1},
    ]
    page = Page(report.write(_scores(), tmp_path / "report.html", removal=removal))
    section = page.text[page.text.index("Removed and retrained", page.text.index("Most helpful")) :]
    for words in ("1\u2009500", f"{numbers.MINUS}12.0", f"{numbers.MINUS}9.50", "78.4 %", "76.0 %", "+0.500", "+0.250"):
        assert words in section, words
    # Two draws: their mean in the table, themselves as ticks.
    assert "+0.500" in section and page.source.count('class="tick"') == 2
    with pytest.raises(BadInput, match="lacks 'actual'"):
        report.write(_scores(), tmp_path / "x.html", removal=[{"name": "a", "rows": 1, "predicted": 1.0}])
    with pytest.raises(BadInput, match="query 2"):
        report.write(_scores(), tmp_path / "x.html", removal=[{**removal[0], "query": 2}])
    assert not (tmp_path / "x.html").exists()


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        report.write(_scores(), tmp_path / "a.html", examples=0)
    with pytest.raises(BadInput, match="cannot be written"):
        report.write(_scores(), tmp_path / "no folder" / "a.html")
    assert list(tmp_path.iterdir()) == []


def _points(chart: str) -> list[tuple[float, float]]:
    found = re.search(r'points="([^"]*)"', chart)
    assert found
    return [tuple(float(v) for v in pair.split(",")) for pair in found[1].split()]  # type: ignore[misc]


def test_the_residual_curve_is_logarithmic() -> None:
    points = _points(str(svg.residual_curve([1e-1, 1e-2, 1e-3], 1e-3, 1e-3, 0.1)))
    assert len(points) == 4  # x = 0 before the first product
    steps = np.diff(np.array(points), axis=0)
    assert np.allclose(steps, steps[0], atol=0.11) and steps[0][1] > 0  # equal factors are equal steps, downwards
    marks = [
        tuple(map(float, m))
        for m in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', str(svg.residual_curve([1e-1, 1e-2], 1e-3, 1e-2, 0.1)))
    ]
    assert marks[0][0] == marks[1][0] and marks[1][1] < marks[0][1]  # the second sample's is larger, so higher
    assert len(_points(str(svg.residual_curve(list(np.geomspace(1, 1e-6, 5000)), None, 1e-6, None)))) < 400
    assert svg.residual_curve([], 1e-3, 0.0, None) == ""


def test_the_histogram_counts_every_finite_score() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=5000), [50.0, -80.0, np.nan]])
    chart = str(svg.histogram(values))
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)".*?<title>([\d\u2009]+) sentences', chart)
    counts = [int(number.replace("\u2009", "")) for _, _, number in bars]
    assert sum(counts) == 5002
    middle = svg.LEFT + (svg.WIDTH - svg.LEFT - svg.RIGHT) / 2
    for kind, x, _ in bars:
        assert kind in ("harm", "help", "neutral")
        if kind != "neutral":
            assert (float(x) > middle) == (kind == "harm")
    assert svg.histogram(np.array([np.nan])) == ""
    assert "rect" in svg.histogram(np.zeros(3))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.6931, "0.693"),
        (-1234.0, "−1,230"),
        (12345678.0, "1.23 × 10<sup>7</sup>"),
        (-1.2345e-7, "−1.23 × 10<sup>−7</sup>"),
        (9.999e-4, "0.00100"),
        (float("nan"), "not finite"),
        (None, "not finite"),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    assert numbers.figure(value) == text


def test_columns_share_a_power() -> None:
    assert [numbers.shared_power([v]) for v in (0.0, 5.0, 0.5, 999.0, 12345.0, 0.05, 2e-6, 2e-7)] == [
        0,
        0,
        0,
        0,
        3,
        -3,
        -6,
        -9,
    ]
    assert numbers.in_column(-4.5e-6, -6) == "−4.50" and numbers.in_column(4.5e-6, -6, signed=True) == "+4.50"
    assert numbers.in_column(0.0, -6, signed=True) == "0"


def test_the_curve_of_a_sample_that_grew_and_error_bars_are_shown(tmp_path: Path) -> None:
    """Numbers from the manifest, a mark for each size, the warning of a growth without an end; ± beside the scores."""
    found = case("bert sdpa", "proximity")
    asked = [Query.loss(found.asked[0], name) for name in TWO]
    settings: dict[str, Any] = {"damping": 0.1, "solver": CG(1e-6)}
    grown = score(query_vectors(found.chain, asked, sample=Growing(start=1, limit=3), **settings))
    curve = grown.manifest["query_vectors"]["growth"]
    assert len(curve["sizes"]) > 1
    page = Page(report.write(grown, tmp_path / "grown.html"))
    assert "before the order of the scores was stable" not in page.text
    curve["ended"] = "limit reached"
    page = Page(report.write(grown, tmp_path / "grown.html"))
    last = curve["sizes"][-1]
    assert f"reached its limit of {last['rows']} rows before the order of the scores was stable" in page.text
    assert f"with the size before is {last['spearman']:.2f}, where 0.98 was asked for" in page.text
    for size in curve["sizes"]:
        assert f"{size['second_residual']:.2f}" in page.text
    assert f"{curve['sizes'][-1]['spearman']:.3f}" in page.text
    section = page.source[page.source.index('id="growth"') : page.source.index('id="query-1"')]
    assert section.count('class="mark"') == len(curve["sizes"]) - 1
    assert section.count('class="mark hollow"') == len(curve["sizes"])
    assert "±" not in page.text

    barred = score(query_vectors(found.chain, asked, sample=1, error_bars=2, **settings))
    page = Page(report.write(barred, tmp_path / "barred.html"))
    assert "from 2 disjoint samples" in page.text and 'id="growth"' not in page.source
    row = barred.top(1)[0]
    assert row.standard_error is not None
    power = numbers.shared_power([r.score for r in (*barred.top(20), *barred.top(20, helpful=True))])
    cell = f"{numbers.in_column(row.score, power)} ± {numbers.in_column(row.standard_error, power)}"
    assert page.rows("harmful")[0][3] == cell
