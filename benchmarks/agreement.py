"""EK-FAC beside curvlinops' and kronfluence's on the same small networks and rows, each held against the dense matrix.

All in float64, cross-entropy of 5 classes, 256 independent rows, and of the one matrix that all three can take, Gauss-Newton: ours
takes no other; curvlinops has it as type-2; kronfluence, which draws a label for a row or takes its own, is given each row
once for each column S_c of a square root of the softmax's Hessian, with ⟨√5 S_c, logits⟩ for a loss. Cases:

    joined  three layers, a bias being the weight of a constant one, for kronfluence joins the two
    apart   the same with biases as blocks of their own, which kronfluence does not have
    exact   one layer, ± scaled unit vectors for inputs, all softmax Hessians with the same eigenvectors: the matrix is diagonal
            in the basis of each, so that EK-FAC is the matrix itself; its eigenvalues are no products, so K-FAC is not

Bases differ by definition: theirs are the eigenvectors of Σ δ δᵀ and Σ a aᵀ, of gradients at what leaves a layer and of what
enters it; ours those of Σ GGᵀ = Σ |a|² δ δᵀ and Σ GᵀG = Σ |δ|² a aᵀ. In one basis nothing may differ, so ours is made in theirs too.
Λ: the eigenvalues against a loop over single gradients in the same basis, theirs and ours. Then, of products, and of inverses damped
by 1, 0.1 and 0.01 times the mean eigenvalue, with the loss gradients of 20 held-out rows, relative differences from ours in that
basis (there), from ours, and from the dense matrix without what is between parameters (blocks) and with it (whole). Last,
Spearman's correlation of these queries' scores of 200 other rows with ours and with the whole matrix's: median and least.

    python -m venv peers && peers/bin/pip install torch==2.13.0 curvlinops-for-pytorch==3.0.1 kronfluence==1.0.1 -e .
    peers/bin/pip uninstall --yes torchvision      # of another torch
    peers/bin/python benchmarks/agreement.py --threads 1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import common
from nlpinf.curvature.ekfac import EKFAC, Factor, _add_squares
from nlpinf.curvature.perexample import PerExample
from nlpinf.parameters import Parameters
from nlpinf.stages import Stage
from nlpinf.tasks import Classification

PACKAGES = {"curvlinops": "curvlinops-for-pytorch", "kronfluence": "kronfluence"}
CASES, DAMPINGS = ("joined", "apart", "exact"), (1.0, 0.1, 0.01)
WIDTH, CLASSES, HELD, QUERIES = 10, 5, 200, 20
COLUMNS = ("Λ", "Λ ours", "ours there", "ours", "blocks", "whole", "rank, ours", "rank, whole")
Map = Callable[[Parameters], Parameters]


@dataclass(frozen=True)
class Case:
    """A network and rows as (inputs, labels): those of the matrix, and held-out ones."""

    name: str
    model: nn.Module
    rows: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]

    @cached_property
    def stage(self) -> Stage:
        return Stage(self.model, Classification(), list(zip(*self.rows)), name=self.name)

    def roots(self) -> Tensor:
        """Return S (rows, columns, classes) with Σ_c S_c S_cᵀ = diag(p) − p pᵀ."""
        p = self.model(self.rows[0]).detach().softmax(1)
        return p.sqrt()[:, :, None] * (torch.eye(CLASSES).to(p) - p[:, None])

    def gradients(self, inputs: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradients (rows · columns, P) of ⟨cotangent, outputs⟩, one after the other."""
        found, parameters = [], list(self.model.parameters())
        for x, columns in zip(inputs, cotangents):
            outputs = self.model(x[None])
            for u in columns:
                each = torch.autograd.grad(outputs, parameters, u[None], retain_graph=True)
                found.append(torch.cat([g.flatten() for g in each]))
        return torch.stack(found)

    def named(self, flat: Tensor) -> Parameters:
        """Return a vector (P,) as tensors by name."""
        parts = flat.split([t.numel() for t in self.stage.theta.values()])
        return {n: part.view_as(t) for (n, t), part in zip(self.stage.theta.items(), parts)}

    def images(self, way: Way | EKFAC, vectors: Tensor, shift: float | None) -> Tensor:
        """Return the products with vectors (K, P), or those of the inverse with so much added to the diagonal."""
        applied = way.product if shift is None else way.inverse(shift)
        made = [applied(self.named(v)) for v in vectors]
        return torch.stack([torch.cat([m[n].flatten() for n in self.stage.theta]) for m in made])


@dataclass(frozen=True)
class Way:
    """Another's EK-FAC, or K-FAC, which has no `factors`."""

    factors: dict[str, Factor]
    product: Map
    inverse: Callable[[float], Map]


def build(name: str, count: int, seed: int) -> Case:
    """Return a case; the larger networks have learnt a little of labels drawn from a linear model."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = torch.randn(count + HELD + QUERIES, WIDTH, generator=draw).double()
    teacher = torch.randn(WIDTH, CLASSES, generator=draw).double()
    y = torch.multinomial((x @ teacher).softmax(1), 1, generator=draw)[:, 0]
    layers: list[nn.Module] = []
    if name == "exact":
        signs = 1 - 2 * torch.randint(2, (count, 1), generator=draw).double()
        x[:count] = 1.5 * signs * torch.eye(WIDTH).double()[torch.randint(WIDTH, (count,), generator=draw)]
        only = nn.Linear(WIDTH, CLASSES, bias=False)
        only.weight.data.mul_(4.0)[1:] = 0.0  # one logit moves, the other classes share the rest
        layers = [only, nn.Identity()]
    else:
        for before, after in ((WIDTH, 16), (16, 12), (12, CLASSES)):
            joined = [nn.ConstantPad1d((0, 1), 1.0), nn.Linear(before + 1, after, bias=False)]
            layers += [*(joined if name == "joined" else [nn.Linear(before, after)]), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(0 if name == "exact" else 100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:count]), y[:count]).backward()
        optimizer.step()
    return Case(name, model, (x[:count], y[:count]), (x[count:], y[count:]))


def within(case: Case, bases: dict[str, Factor]) -> EKFAC:
    """Return ours in another's basis."""
    sums = {n: replace(f, eigenvalues=torch.zeros_like(f.eigenvalues)) for n, f in bases.items()}
    for uses in PerExample(case.stage, list(sums))(range(case.stage.size)):
        for name, made in uses.items():
            _add_squares(made, sums[name])
    means = {n: replace(f, eigenvalues=f.eigenvalues / case.stage.size) for n, f in sums.items()}
    return EKFAC(case.stage.theta, means, {})


def curvlinops(case: Case) -> Iterator[tuple[str, Way]]:
    """Its EK-FAC, and its K-FAC."""
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    names, data = list(case.stage.theta), list(zip(*(t.split(64) for t in case.rows)))
    given = case.model, nn.CrossEntropyLoss(), list(case.model.parameters()), data

    def by(operator: Any, v: Parameters) -> Parameters:
        return dict(zip(names, operator @ [v[n] for n in names]))

    for label, of in (("curvlinops", EKFACLinearOperator), ("curvlinops K-FAC", KFACLinearOperator)):
        made = of(*given, fisher_type="type-2", check_deterministic=False)
        by(made, case.stage.theta)  # computes the factors
        state, factors = made.state_dict(), {}
        for place, name in enumerate(names if of is EKFACLinearOperator else []):
            module, _, role = name.rpartition(".")
            values = state["corrected_eigenvalues"][module][place]
            left = state["gradient_covariances_eigenvectors"][module][None]
            right = state["input_covariances_eigenvectors"][module][None] if role == "weight" else None
            factors[name] = Factor(values.view(1, len(values), -1), left, right)

        def inverse(damping: float, made: Any = made) -> Map:
            solver = KFACInverseLinearOperator(made, damping=damping, use_exact_damping=True)
            return partial(by, solver)

        yield label, Way(factors, partial(by, made), inverse)


def kronfluence(case: Case) -> Iterator[tuple[str, Way]]:
    """Its EK-FAC with its own inverse; it has no product, so that is of its factors."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.factor.config import FactorConfig
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Linear(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return (model(batch[0]) * batch[1]).sum()

        compute_measurement: Any = compute_train_loss

    if any(name.endswith("bias") for name in case.stage.theta):
        return
    fitting, scoring = FactorArguments(strategy="ekfac", use_empirical_fisher=True), ScoreArguments()
    for arguments in (fitting, scoring):
        vars(arguments).update({k: torch.float64 for k, v in vars(arguments).items() if v is torch.float32})
    rows = TensorDataset(case.rows[0].repeat_interleave(CLASSES, 0), CLASSES**0.5 * case.roots().flatten(0, 1))
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(copy.deepcopy(case.model), Linear())
        analyzer = Analyzer("job", model, Linear(), cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("f", rows, per_device_batch_size=64, factor_args=fitting)
        found = analyzer.load_all_factors("f")
    parts = {n: {k: t[n.removesuffix(".weight")] for k, t in found.items()} for n in case.stage.theta}
    factors, ekfac, sides = {}, FactorConfig.CONFIGS["ekfac"], ("gradient_eigenvectors", "activation_eigenvectors")
    for name, p in parts.items():
        factors[name] = Factor((p["lambda_matrix"] / p["num_lambda_processed"])[None], *(p[k][None] for k in sides))

    def inverse(damping: float) -> Map:
        ready = {n: {k: t.clone() for k, t in p.items()} for n, p in parts.items()}
        for storage in ready.values():
            ekfac.prepare(storage, replace(scoring, damping_factor=damping), torch.device("cpu"))
        return lambda v: {n: ekfac.precondition_gradient(t[None], ready[n])[0] for n, t in v.items()}

    yield "kronfluence", Way(factors, EKFAC(case.stage.theta, factors, {}).product, inverse)


def off(found: Tensor, truth: Tensor) -> float:
    """Return the relative difference, in the Frobenius norm."""
    return float((found - truth).norm() / truth.norm())


def ranks(one: Tensor, other: Tensor) -> list[float]:
    """Return the median and the least Spearman correlation of scores (queries, rows)."""
    each = [float(spearmanr(a, b).statistic) for a, b in zip(one, other)]
    return [statistics.median(each), min(each)]


def dense(matrix: Tensor, vectors: Tensor, shift: float | None) -> Tensor:
    """Return the products of a dense matrix, or of its inverse with so much added to the diagonal."""
    damped = matrix + (shift or 0.0) * torch.eye(len(matrix)).to(matrix)
    return vectors @ damped if shift is None else torch.linalg.solve(damped, vectors, left=False)


def compare(case: Case, ways: dict[str, Way | EKFAC]) -> Iterator[dict[str, Any]]:
    """Yield the records of a case."""
    residuals = case.model(case.held[0]).detach().softmax(1) - F.one_hot(case.held[1], CLASSES)
    rows, vectors = case.gradients(case.held[0], residuals[:, None]).split([HELD, QUERIES])
    training, count = case.gradients(case.rows[0], case.roots()), len(case.rows[0])
    block = torch.repeat_interleave(torch.tensor([t.numel() for t in case.stage.theta.values()]))
    whole = training.T @ training / count
    blocks, mean = whole * (block[:, None] == block), float(whole.trace()) / len(whole)
    for name, way in ways.items():
        record: dict[str, Any] = {}
        if way.factors:
            loop = {n: torch.zeros_like(f.eigenvalues) for n, f in way.factors.items()}
            for gradient in training:
                for n, g in case.named(gradient).items():
                    loop[n] += way.factors[n].rotated(g.view(loop[n].shape)) ** 2 / count
            same = within(case, way.factors)
            for key, factors in (("Λ", way.factors), ("Λ ours", same.factors)):
                record[key] = max(off(f.eigenvalues, loop[n]) for n, f in factors.items())
        for damping in (None, *DAMPINGS):
            shift = None if damping is None else damping * mean
            theirs, ours = (case.images(w, vectors, shift) for w in (way, ways["nlpinf"]))
            parted, truth = (dense(m, vectors, shift) for m in (blocks, whole))
            record |= {"blocks": off(theirs, parted), "whole": off(theirs, truth)}
            record["rank, whole"] = ranks(theirs @ rows.T, truth @ rows.T)
            if name != "nlpinf":
                record |= {"ours": off(theirs, ours), "rank, ours": ranks(theirs @ rows.T, ours @ rows.T)}
                record["ours there"] = off(theirs, case.images(same, vectors, shift)) if way.factors else None
            yield {"case": case.name, "way": name, "damping": damping, **record}
            record = {}


def line(record: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [record["case"].ljust(6), record["way"].ljust(16)]
    cells.append("product" if record["damping"] is None else f"{record['damping']:7g}")
    for value in map(record.get, COLUMNS):
        text = f"{value:.1e}" if isinstance(value, float) else " ".join(f"{v:.3f}" for v in value or [])
        cells.append(f"{text or '–':>11}")
    return "  ".join(cells)


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", default=CASES, choices=CASES, help="which (all)")
    options.add_argument("--seed", type=int, default=0, help="of rows, labels and weights (0)")
    options.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    options.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = options.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(arguments.threads)
    versions = {k: next((d.version for d in metadata.distributions(name=p)), None) for k, p in PACKAGES.items()}
    results: list[dict[str, Any]] = []
    for name in arguments.cases:
        case = build(name, 256, arguments.seed)
        ways: dict[str, Way | EKFAC] = {"nlpinf": EKFAC.fit(case.stage)}
        for contestant in (curvlinops, kronfluence):
            ways |= contestant(case) if versions[contestant.__name__] else {}
        results += compare(case, ways)
    record = {
        "benchmark": "agreement", "seed": arguments.seed, "peers": versions, "results": results,
        "machine": common.machine(arguments.threads),
    }  # fmt: skip
    lines = [f"{name}: {release or 'not installed'}" for name, release in versions.items()]
    lines.append("  ".join(["case  ", " " * 16, "damping", *(f"{key:>11}" for key in COLUMNS)]))
    common.show(record, arguments.json, [*lines, *map(line, results)])


if __name__ == "__main__":
    main()
