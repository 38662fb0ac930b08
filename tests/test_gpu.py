"""On a GPU: products, factors, solvers, scores and commands give what the dense matrices and the CPU give.

Skipped where there is none. NLPINF_TEST_DEVICE=cpu runs the same tests on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Shifted
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.influence import query_vectors
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.scoring.compiled import CompiledScorer
from nlpinf.scoring.forward import ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.solvers import CG, MINRES, LiSSA, Refined
from nlpinf.stages import Chain, Stage
from nlpinf.systems import System
from tests import oracle
from tests.cases import FAMILIES, NAMES, case, scores_of
from tests.gated import GATED, gated_stage
from tests.runs import make_runs
from tests.scoring.common import apart, by_loop, directions, pretrain_stage, sentences

DEVICE = os.environ.get("NLPINF_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="there is no GPU on this machine"
)


def placed(stage: Stage, dtype: torch.dtype = torch.float64) -> Stage:
    """The stage with a copy of its model on the device."""
    return replace(stage, model=copy.deepcopy(stage.model).to(DEVICE, dtype))


def moved(tree: Parameters, device: str = DEVICE) -> Parameters:
    return {name: tensor.to(device) for name, tensor in tree.items()}


def flat(tree: Parameters) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tree.values()]).double().cpu()


def error(found: Parameters, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(flat(found) - expected) / torch.linalg.norm(expected))


@cache
def chain(family: str, path: str) -> Chain:
    links = case(family, path).chain.links
    later = links[1:]
    return Chain([placed(k.stage) for k in links], [k.transfer for k in later], [k.received for k in later])


@pytest.mark.parametrize(("family", "path"), NAMES)
def test_query_vectors_and_scores_equal_the_dense_ones(family: str, path: str) -> None:
    c = case(family, path)
    kinds = ["ggn"] * len(c.chain.stages)
    dampings = [oracle.safe_damping(family, path, k, "ggn", 0.4) for k in range(len(kinds))]
    made = query_vectors(
        chain(family, path), [Query.mean_loss(list(c.asked))], curvature=kinds, damping=dampings, solver=CG(1e-10)
    )
    assert made.converged
    expected = oracle.vector(
        family, path, oracle.query_gradient(family, path, list(c.asked), slice(None)), kinds, dampings
    )
    first = oracle.dense(family, path, 0)
    trained = list(c.chain.stages[0].trained)
    assert error({n: made.vectors[0][n] for n in trained}, expected) < 1e-8
    scores = scores_of(chain(family, path).stages[0], list(made.vectors))
    right = first.gradients[:, first.where(trained)] @ expected
    assert (scores[:, 0] - right).abs().max() <= 1e-8 * right.abs().max()


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_equal_the_dense_matrix(family: str, kind: str) -> None:
    for k in (0, 1):
        stage, d = chain(family, "proximity").stages[k], oracle.dense(family, "proximity", k)
        where = d.where(list(stage.trained))
        matrix = d.curvature(kind, seed=5)[where][:, where]
        operator = Curvature(stage, kind, seed=5)  # type: ignore[arg-type]
        vectors = [P.random_like(stage.theta, seed) for seed in (3, 4)]
        for product, vector in zip([operator @ vectors[0], *operator.many(vectors)], [vectors[0], *vectors]):
            assert error(product, matrix @ flat(vector)) < 1e-10


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_loop_of_autograd(family: str, queries: int) -> None:
    own = pretrain_stage(family)
    vectors = directions(own, queries)
    truth, losses = by_loop(own, vectors)
    stage = placed(own)
    scorers = [kind(stage, [moved(v) for v in vectors]) for kind in (ForwardScorer, ReverseScorer)]
    for batch in stage.batches():
        for scorer in scorers:
            found, rows = scorer(batch), batch.rows.cpu()
            assert apart(found.scores.cpu(), truth[rows]) < 1e-10 and apart(found.losses.cpu(), losses[rows]) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_is_single_precision(family: str) -> None:
    """Float32 products of matrices and convolutions are not cut to TensorFloat-32, whose error is 1,000 times as large."""
    own = pretrain_stage(family)
    vectors = directions(own, 2)
    truth, _ = by_loop(own, vectors)
    stage = placed(own, torch.float32)
    low = [{n: t.to(DEVICE, torch.float32) for n, t in v.items()} for v in vectors]
    for scorer in (ForwardScorer(stage, low), ReverseScorer(stage, low)):
        for batch in stage.batches():
            assert apart(scorer(batch).scores.cpu(), truth[batch.rows.cpu()]) < 2e-5
    double = chain(family, "frozen").stages[0]
    v = P.random_like(double.theta, 3)
    product = Curvature(stage, "ggn") @ {n: t.float() for n, t in v.items()}
    assert error(product, flat(Curvature(double, "ggn") @ v)) < 2e-5


@pytest.mark.parametrize("name", GATED)
def test_gated_models_are_scored_as_on_the_cpu(name: str) -> None:
    own = gated_stage(name)
    vector = P.random_like(own.theta, 0)
    on_cpu = scores_of(own, [vector])
    stage = placed(own)
    reverse = ReverseScorer(stage, [moved(vector)])
    for batch in stage.batches():
        assert apart(reverse(batch).scores.cpu(), on_cpu[batch.rows.cpu()]) < 1e-5  # their norms compute in float32
    product = Curvature(stage, "ggn") @ moved(vector)
    assert error(product, flat(Curvature(own, "ggn") @ vector)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_and_their_inverse_equal_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    own, stage = pretrain_stage(family), placed(pretrain_stage(family))
    v = P.random_like(own.theta, 1)
    expected = flat(EKFAC.fit(own).inverse(0.1)(v))
    fitted = EKFAC.fit(stage)
    assert error(fitted.inverse(0.1)(moved(v)), expected) < 1e-8
    folder = fitted.save(tmp_path / "factors", stage)
    assert error(EKFAC.load(folder, stage).inverse(0.1)(moved(v)), expected) < 1e-8


@pytest.mark.parametrize("preconditioner", ["none", "diagonal", "ekfac", "nystrom", "ekfac+nystrom", "spectral"])
@pytest.mark.parametrize(
    "solver", [CG(1e-9), CG(1e-9, block=1), MINRES(1e-9), LiSSA(1e-2, 300)], ids=lambda s: str(s)[:24]
)
def test_solvers_equal_the_dense_solution(solver: Any, preconditioner: str) -> None:
    matrix = oracle.matrix("bert sdpa", "frozen", 0, "ggn")
    damping = 0.3 * float(torch.linalg.eigvalsh(matrix)[-1])
    link = chain("bert sdpa", "frozen").links[0]
    rights = [P.random_like(link.stage.theta, seed) for seed in (1, 2)]
    for right, solution in zip(rights, System(link, "ggn", damping, None, 0, preconditioner).solve(solver, rights)):
        assert solution.converged, solution
        expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), flat(right))
        assert error(solution.vector, expected) <= (1e-6 if solver.tolerance < 1e-6 else 5 * solution.residual)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 sdpa", "elmo"])
def test_low_precision_reaches_the_residual_of_single_precision(family: str, precision: str) -> None:
    """The residual told is the true one, measured anew in float64."""
    stage = placed(pretrain_stage(family), torch.float32)
    operator = Shifted(Curvature(stage, "ggn"), stage.decay, 0.1)
    right = P.random_like(stage.theta, 1)
    solution = Refined(CG(1e-4), precision)(operator, right)  # type: ignore[arg-type]
    assert solution.converged, solution
    exact = chain(family, "frozen").stages[0]
    product = Shifted(Curvature(exact, "ggn"), exact.decay, 0.1) @ {n: t.double() for n, t in solution.vector.items()}
    assert error(product, flat(right)) < 2e-4


@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 sdpa"])
def test_compiled_scores_are_the_same(family: str) -> None:
    own = pretrain_stage(family)
    vectors = directions(own, 2)
    truth, _ = by_loop(own, vectors)
    scorer = CompiledScorer(ReverseScorer(placed(own), [moved(v) for v in vectors]))
    for batch in scorer.reverse.stage.batches():
        assert apart(scorer(batch).scores.cpu(), truth[batch.rows.cpu()]) < 1e-8


def nlpinf(*arguments: Any, device: str, processes: int = 1) -> Any:
    """Run a command on a device and return what it prints as JSON."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "nlpinf", "--device", device, *map(str, arguments), "--json"]
    places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def table(folder: Path) -> dict[str, list[Any]]:
    return pq.ParquetDataset(sorted(folder.rglob("*.parquet"))).read().to_pydict()


@pytest.mark.parametrize("processes", [1, 2])
def test_commands_give_what_they_give_on_the_cpu(processes: int, tmp_path: Path) -> None:
    """Also a folder made on a GPU is read on a CPU, and several processes share a GPU."""
    runs = make_runs(tmp_path / "runs")
    first, last = runs.folders
    query = ("query", "--pretrain", first, "--finetune", last, "--test", tmp_path / "runs/rows.jsonl", "--alpha", 0.1, "--damping", 1.0, "--tolerance", 1e-5)  # fmt: skip
    corpus = tmp_path / "runs/corpus.txt"
    for name, device, number in (("cpu", "cpu", 1), ("gpu", DEVICE, processes)):
        nlpinf(*query, "--out", tmp_path / name / "query", device=device, processes=number)
        score = ("score", "--query", tmp_path / name / "query", "--corpus", corpus, "--out", tmp_path / name / "scores")
        nlpinf(*score, device=device, processes=number)
    crossed = ("score", "--query", tmp_path / "gpu/query", "--corpus", corpus, "--out", tmp_path / "crossed")
    nlpinf(*crossed, device="cpu")
    tables = [table(tmp_path / name) for name in ("cpu/scores", "gpu/scores", "crossed")]
    columns = [name for name, values in tables[0].items() if isinstance(values[0], float)]
    assert columns
    for name in columns:
        values = [torch.tensor(t[name], dtype=torch.float64) for t in tables]
        for other in values[1:]:
            assert (other - values[0]).abs().max() <= 1e-4 * values[0].abs().max()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, a query and scores, all made on the device."""
    root = tmp_path_factory.mktemp("made")
    runs = make_runs(root / "runs")
    asked = ("--pretrain", runs.folders[0], "--finetune", runs.folders[1], "--test", root / "runs/rows.jsonl", "--alpha", 0.1)  # fmt: skip
    nlpinf("query", *asked, "--damping", 1.0, "--out", root / "query", device=DEVICE)
    nlpinf("score", "--query", root / "query", "--out", root / "scores", device=DEVICE)
    (root / "more.txt").write_text("\n".join(sentences(1500)) + "\n")
    return root


@pytest.mark.parametrize("command", ["check", "damping", "predict", "plan", "report", "score", "compress", "screen"])
def test_other_commands_run(command: str, made: Path, tmp_path: Path) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "check": (made / "runs/pretrain", made / "runs/finetune"),
        "damping": ("--pretrain", made / "runs/pretrain", "--finetune", made / "runs/finetune", "--test", made / "runs/rows.jsonl", "--alpha", 0.1),
        "predict": ("--query", made / "query", "--scores", made / "scores", "--drop", "25%"),
        "plan": ("--query", made / "query", "--corpus", made / "runs/corpus.txt"),
        "report": (made / "scores", "--query", made / "query", "--out", tmp_path / "report.html"),
        "score": ("--query", made / "query", "--precision", "bfloat16", "--token-scores", "--out", tmp_path / "scores"),
        "compress": ("--query", made / "query", "--corpus", made / "more.txt", "--compress", 0.05, "--out", tmp_path / "scores"),
        "screen": ("--query", made / "query", "--corpus", made / "more.txt", "--screen", "80%", "--out", tmp_path / "scores"),
    }  # fmt: skip
    own = {"compress": "score", "screen": "score"}.get(command, command)
    nlpinf(own, *arguments[command], device=DEVICE)
